"""Do the patches that survive lie on objects? Counts on clips whose objects are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.cli.figures import find_survivors
from svitt_ops.training.corpora.shapes import CorpusSpec, Film
from svitt_ops.training.data.sampling import sample_positions
from svitt_ops.training.tasks.parts.gallery import Gallery, GalleryClips

if TYPE_CHECKING:
    from svitt_ops.models import SViTTForPreTraining

COVERED = 0.5
"""A patch lies on an object if so much of it does, at least."""


def patches_on_objects(films: Sequence[Film], spec: CorpusSpec, config: Any) -> Tensor:
    """Which patches of the clips that are evaluated lie on objects.

    Args:
        films: of which both orders are clips, one after the other.
        spec: how they were filmed.
        config: of the model, whose frames and patches they are.

    Returns:
        bool ``(2 * films, 2, patches)``: on what the caption names, and on any object.
    """
    chosen = sample_positions(range(spec.frames), config.num_frames, "middle")
    clips = [torch.from_numpy(mask[chosen]) for f in films for mask in f.masks(spec).values()]
    masks = torch.stack(clips)  # (clips, frames, 2, size, size)
    both = torch.stack([masks[:, :, 0], masks.any(2)], 1).float()
    covered = F.adaptive_avg_pool2d(both.flatten(0, 2), config.grid_size)
    return covered.view(*both.shape[:2], -1) >= COVERED


def survivor_shares(
    model: SViTTForPreTraining,
    tokenizer: PreTrainedTokenizerBase,
    gallery: Gallery,
    on_objects: Tensor,
    *,
    text_length: int,
) -> dict[str, dict[str, float]]:
    """Shares of the survivors of all clips that lie on objects.

    Args:
        model: put into eval mode.
        tokenizer: the model's.
        gallery: clips with one caption each, in the same order.
        on_objects: of `patches_on_objects`.
        text_length: longest text, in tokens.

    Returns:
        ``visual``: of any object, the ``share`` of what visual pruning leaves, and that of all
        patches, ``random``. ``multimodal``: the same of what the caption names and multimodal
        pruning leaves, with ``visual_share`` of the patches that come into the fusion layers.
    """
    clips = GalleryClips(gallery, model.config.num_frames)
    left: dict[str, list[Tensor]] = {"visual": [], "multimodal": [], "visual_share": []}
    for number, (named, seen) in enumerate(on_objects):
        frames = clips[number].frames
        assert frames is not None
        found = find_survivors(
            model, tokenizer, frames[0], gallery.texts[number], text_length=text_length
        )
        visual = found.visual[-1]
        left["visual"].append(seen[visual])
        left["visual_share"].append(named[visual])
        left["multimodal"].append(named[visual if found.multimodal is None else found.multimodal])
    shares = {name: torch.cat(kept).double().mean().item() for name, kept in left.items()}
    named, seen = on_objects.double().mean((0, 2)).tolist()
    return {
        "visual": {"share": shares["visual"], "random": seen},
        "multimodal": {
            "share": shares["multimodal"],
            "random": named,
            "visual_share": shares["visual_share"],
        },
    }

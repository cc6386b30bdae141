"""Checkpoints that Frozen's authors released."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from svitt_ops.models.frozen.configuration import FrozenConfig
from svitt_ops.models.frozen.model import FrozenForRetrieval
from svitt_ops.models.parts.conversion import convert_into
from svitt_ops.models.parts.key_maps import (
    VIT,
    Rules,
    below,
    renamed,
    sizes,
    split_projections,
)
from svitt_ops.models.parts.loading import check_fixed, check_share
from svitt_ops.models.parts.resolution import resize_places
from svitt_ops.models.parts.unpickling import read_tensors

_BLOCK = r"blocks\.(\d+)\."
_LAYER = r"transformer\.layer\.(\d+)\."
VIDEO: Rules = (
    *VIT,
    (_BLOCK + r"norm3\.(.+)", r"video.layers.\1.norm_time.\2"),
    (_BLOCK + r"timeattn\.(query|key|value)\.(.+)", r"video.layers.\1.attention_over_time.\2.\3"),
    (_BLOCK + r"timeattn\.proj\.(.+)", r"video.layers.\1.attention_over_time.out.\2"),
    (r"(?:head|pre_logits)\..+", ""),
)
DISTILBERT: Rules = (
    (r"embeddings\.(word|position)_embeddings\.weight", r"text.embeddings.\1.weight"),
    (r"embeddings\.LayerNorm\.(.+)", r"text.embeddings.norm.\1"),
    (r"embeddings\.position_ids", ""),
    (_LAYER + r"attention\.q_lin\.(.+)", r"text.layers.\1.attention.query.\2"),
    (_LAYER + r"attention\.k_lin\.(.+)", r"text.layers.\1.attention.key.\2"),
    (_LAYER + r"attention\.v_lin\.(.+)", r"text.layers.\1.attention.value.\2"),
    (_LAYER + r"attention\.out_lin\.(.+)", r"text.layers.\1.attention.out.\2"),
    (_LAYER + r"sa_layer_norm\.(.+)", r"text.layers.\1.attention_norm.\2"),
    (_LAYER + r"ffn\.lin1\.(.+)", r"text.layers.\1.mlp.up.\2"),
    (_LAYER + r"ffn\.lin2\.(.+)", r"text.layers.\1.mlp.down.\2"),
    (_LAYER + r"output_layer_norm\.(.+)", r"text.layers.\1.mlp_norm.\2"),
)
OFFICIAL_CHECKPOINT: Rules = (
    *below(r"video_model\.", VIDEO),
    *below(r"text_model\.", DISTILBERT),
    (r"vid_proj\.0\.(.+)", r"video_projection.\1"),
    (r"txt_proj\.1\.(.+)", r"text_projection.\1"),
)
"""Names in the checkpoints that Frozen's authors released, after `_split`."""
TASKS = ("pretraining", "retrieval")


def load_official(
    source: str | Path | Mapping[str, Any],
    config: FrozenConfig | None = None,
    *,
    task: str = "pretraining",
    compat: str | None = None,
) -> FrozenForRetrieval:
    """A model with the weights of a released Frozen checkpoint, for evaluation.

    A file is read without running anything that it contains. Its number of frames, that of its
    temporal positions, replaces the configuration's; `expand_frames` leads to another one.
    Positions of another resolution are interpolated to the configuration's. Under
    ``attention="joint"`` the weights of attention over time have no place, and are named in a
    warning.

    Args:
        source: file written by the authors' training code, or the tensors in it by name.
        config: of the model; the base model with divided attention by default.
        task: "pretraining" or "retrieval", which have one model.
        compat: None; what the code does is what the paper says.

    Raises:
        ValueError: the source holds nothing that belongs to such a model, another field of the
            configuration is not that of the source, or a tensor is not finite.
    """
    who = "load_official"
    if task not in TASKS:
        raise ValueError(f"{who}: task must be one of {', '.join(TASKS)}, got {task!r}")
    if compat is not None:
        raise ValueError(f"{who}: compat must be None for Frozen, got {compat!r}")
    tensors = {name.removeprefix("module."): x for name, x in read_tensors(source).items()}
    name = "the mapping" if isinstance(source, Mapping) else source
    if config is None:
        config = FrozenConfig(attention="divided", edge_sparsity=False, keep_rate=1)
    frames, tensors = _split(tensors, config.grid_size, who, name)
    check_fixed(who, sizes(renamed(tensors, OFFICIAL_CHECKPOINT)), config, name)
    model = FrozenForRetrieval(FrozenConfig(**{**config.to_dict(), "num_frames": frames}))
    found = convert_into(model, tensors, OFFICIAL_CHECKPOINT)
    check_share(who, len(found.loaded), len(found.missing), name)
    found.report(name)
    return model.eval()


def _split(
    tensors: Mapping[str, Tensor], grid_size: int, who: str, source: object
) -> tuple[int, dict[str, Tensor]]:
    """Frames, and the tensors with projections one by one and positions of (frame, patch)."""
    places, times = (f"video_model.{name}_embed" for name in ("pos", "temporal"))
    for key in (places, times):
        if key not in tensors or tensors[key].dim() != 3:
            got = list(tensors[key].shape) if key in tensors else "none"
            raise ValueError(f"{who}: {source} must have {key} of shape (1, n, dim), got {got}")
    position, time = tensors[places][0], tensors[times][0]
    patches = resize_places(position[None, 1:], grid_size) + time[:, None]
    found = {
        "video_model.cls_position": position[None, :1],
        "video_model.patch_positions": patches,
    }
    others = {name: x for name, x in tensors.items() if name not in (places, times)}
    return time.shape[0], found | split_projections(others)

"""Figures: which visual and multimodal tokens survive, over the frames of a clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.augment import to_pixel_values
from svitt_ops.training.collate import encode_texts
from svitt_ops.training.paths import output_file

if TYPE_CHECKING:
    from svitt_ops.models import SViTTForPreTraining

FADE = 0.82  # of white over a patch that was dropped


@dataclass(frozen=True, kw_only=True)
class Survivors:
    """A clip and its tokens that are left after each pruning."""

    frames: Tensor  # uint8 (frames, 3, size, size), as the model saw them
    caption: str
    grid: int
    visual: tuple[Tensor, ...]  # int64 (tokens,), original patch numbers, after each stage
    multimodal: Tensor | None
    fusion_trained: bool


@torch.inference_mode()
def find_survivors(
    model: SViTTForPreTraining,
    tokenizer: PreTrainedTokenizerBase,
    frames: Tensor,
    caption: str,
    *,
    text_length: int = 32,
) -> Survivors:
    """Run a clip and its caption, and note which patches survive.

    Args:
        model: put into eval mode.
        tokenizer: the model's.
        frames: uint8 (frames, 3, height, width).
        caption: what the multimodal pruning looks for.
        text_length: longest text, in tokens.
    """
    model.eval()
    config = model.config
    device = next(model.parameters()).device
    pixels = to_pixel_values(frames[None].to(device), config.image_size)
    video = model.encode_video(pixels)
    ids, mask = (
        t.to(device) for t in encode_texts(tokenizer, [caption], text_length, "longest").values()
    )
    text = model.encode_text(ids, mask)
    fused = model.fuse(text.states, mask, video.states, video.indices)
    left = fused.video_indices
    stages = video.indices_per_stage or (video.indices,)
    shown = ((pixels[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Survivors(
        frames=shown.cpu(),
        caption=caption,
        grid=config.image_size // config.patch_size,
        visual=tuple(stage[0].cpu() for stage in stages),
        multimodal=None if left is None else left[0].cpu(),
        fusion_trained=any(config.loss_weights.get(name, 1) for name in ("vtm", "mlm")),
    )


def figure_file(path: str | Path, name: str) -> Path:
    """A file that a figure can be written to; without a suffix it gets that of PNG.

    Raises:
        ValueError: it cannot be written, or has a suffix of no known format; begins with `name`.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    file = output_file(path, name)
    if not file.suffix:
        return output_file(file.with_name(f"{file.name}.png"), name)
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix[1:].lower() not in known:
        raise ValueError(f"{name}: must end in one of .{', .'.join(known)}, got {str(path)!r}")
    return file


def draw_survivors(samples: Sequence[Survivors], path: str | Path) -> Path:
    """Draw clips with the patches that were dropped faded out, one row for each pruning.

    The first row of each clip shows all of it, the next ones what is left after each visual
    pruning, and the last what is left after multimodal pruning.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    parts = [_rows(sample) for sample in samples]
    columns = max(sample.frames.shape[0] for sample in samples)
    heights = [len(rows) + 0.35 for rows in parts]  # the caption takes some
    figure = Figure(
        figsize=(1.1 * columns + 1.2, 1.15 * sum(heights)),
        layout=ConstrainedLayoutEngine(h_pad=0.05, w_pad=0.05, hspace=0, wspace=0),
        facecolor="white",
    )
    subfigures = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for sample, rows, part in zip(samples, parts, subfigures, strict=True):
        part.suptitle(f"“{sample.caption}”", fontsize=11)
        for axis, (name, pictures) in zip(part.subplots(len(rows)), rows, strict=True):
            axis.imshow(_strip(pictures), interpolation="nearest")
            axis.set_axis_off()
            axis.text(-0.01, 0.5, name, ha="right", va="center", transform=axis.transAxes)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _rows(sample: Survivors) -> list[tuple[str, list[Any]]]:
    """The rows of a clip: what they are called, and their pictures."""
    total = sample.frames.shape[0] * sample.grid**2
    rows = [(f"all\n{total} patches", [_picture(f) for f in sample.frames])]
    for number, kept in enumerate(sample.visual):
        name = "visual" if len(sample.visual) == 1 else f"visual {number + 1}"
        rows.append((f"{name}\n{len(kept)} left", _faded(sample, kept)))
    if sample.multimodal is not None:
        kept = sample.multimodal
        note = "" if sample.fusion_trained else "\n(not trained)"
        rows.append((f"multimodal\n{len(kept)} left{note}", _faded(sample, kept)))
    return rows


def _strip(pictures: Sequence[Any]) -> Any:
    """Pictures beside each other, with white between them."""
    height, width, _ = pictures[0].shape
    gap = np.full((height, max(1, width // 16), 3), 255, dtype=np.uint8)
    return np.concatenate([part for picture in pictures for part in (gap, picture)], axis=1)


def _picture(frame: Tensor) -> Any:
    return frame.permute(1, 2, 0).numpy()


def _faded(sample: Survivors, kept: Tensor) -> list[Any]:
    """The frames, with every patch that is not kept faded to white."""
    count, _, height, width = sample.frames.shape
    grid = sample.grid
    mask = np.zeros(count * grid * grid, dtype=bool)
    mask[kept.numpy()] = True
    patches = mask.reshape(count, grid, grid)
    full = patches.repeat(height // grid, axis=1).repeat(width // grid, axis=2)
    pictures = []
    for frame, here in zip(sample.frames, full, strict=True):
        picture = _picture(frame).astype(np.float32)
        pale = picture * (1 - FADE) + 255 * FADE
        pictures.append(np.where(here[..., None], picture, pale).astype(np.uint8))
    return pictures

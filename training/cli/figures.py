"""Figures: which visual and multimodal tokens survive, over the frames of a clip."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.data.augment import to_pixel_values
from svitt_ops.training.data.collate import encode_texts
from svitt_ops.training.data.paths import output_file
from svitt_ops.training.tasks.parts.checks import check_finite

if TYPE_CHECKING:
    from svitt_ops.models import SViTTForPreTraining

FADE = 0.82  # of white over a patch that was dropped
# Of figures, in inches, and points for letters.
PICTURE, GAP, CAPTION_LINE, MIN_WIDTH = 1.05, 0.1, 0.2, 3.0
TITLE, LABEL = 11, 10
MAX_LINES = 4  # of a caption
DPI = 130
SHOWN = 112  # pixels of a frame on a page, at least


@dataclass(frozen=True, kw_only=True)
class Survivors:
    """A clip and its tokens that are left after each pruning."""

    frames: Tensor  # uint8 (frames, 3, size, size), as the model saw them
    caption: str
    grid: int
    visual: tuple[Tensor, ...]  # int64 (tokens,), original patch numbers, after each stage
    multimodal: Tensor | None
    fusion_trained: bool
    truth: Tensor | None = None
    """Those that lie on what the caption names, where that is known."""


@torch.inference_mode()
def find_survivors(
    model: SViTTForPreTraining,
    tokenizer: PreTrainedTokenizerBase,
    frames: Tensor,
    caption: str,
    *,
    text_length: int = 32,
    resize: str = "antialias",
) -> Survivors:
    """Run a clip and its caption, and note which patches survive.

    Args:
        model: put into eval mode.
        tokenizer: the model's.
        frames: uint8 (frames, 3, height, width).
        caption: what the multimodal pruning looks for.
        text_length: longest text, in tokens.
        resize: as in `to_pixel_values`.

    Raises:
        ValueError: what the model computes is not finite, so that its survivors mean nothing.
    """
    model.eval()
    config = model.config
    device = next(model.parameters()).device
    pixels = to_pixel_values(frames[None].to(device), config.image_size, resize=resize)
    video = model.encode_video(pixels)
    ids, mask = (
        t.to(device) for t in encode_texts(tokenizer, [caption], text_length, "longest").values()
    )
    text = model.encode_text(ids, mask)
    fused = model.fuse(text.states, mask, video.states, video.indices)
    for what, states in (("clips", video.states), ("texts", fused.states)):
        check_finite(states, f"visualize: states of {what}", lambda _: repr(caption))
    left = fused.video_indices
    stages = video.indices_per_stage or (video.indices,)
    shown = ((pixels[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Survivors(
        frames=shown.cpu(),
        caption=caption,
        grid=config.image_size // config.patch_size,
        visual=tuple(stage[0].cpu() for stage in stages),
        multimodal=None if left is None else left[0].cpu(),
        fusion_trained=any(config.weights[name] for name in ("vtm", "mlm")),
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
    pruning and after multimodal pruning; the last, if it is known, what the caption names.
    """
    from matplotlib.figure import Figure

    parts = [_rows(sample) for sample in samples]
    strips = [[_strip(pictures) for _, pictures in rows] for rows in parts]
    names = [line for rows in parts for name, _ in rows for line in name.split("\n")]
    # Everything has its place in inches, which no layout engine moves out of the picture.
    left = max(text_width(line, LABEL) for line in names) + 2 * GAP
    widths = [PICTURE * rows[0].shape[1] / rows[0].shape[0] for rows in strips]
    width = max(*widths, MIN_WIDTH) + left + GAP
    captions = [wrapped(f"“{sample.caption}”", width - 2 * GAP) for sample in samples]
    heights = [
        CAPTION_LINE * (caption.count("\n") + 1) + 2 * GAP + (PICTURE + GAP) * len(rows)
        for caption, rows in zip(captions, strips, strict=True)
    ]
    height = sum(heights) + GAP  # above the first
    figure = Figure(figsize=(width, height), facecolor="white")
    top = height - GAP
    for caption, rows, pictures, across, down in zip(
        captions, parts, strips, widths, heights, strict=True
    ):
        # A caption is no formula, whatever dollars it has.
        place: dict[str, Any] = {"ha": "center", "va": "top", "parse_math": False}
        figure.text(0.5, top / height, caption, fontsize=TITLE, **place)
        bottom = top - down + GAP + (PICTURE + GAP) * len(rows)
        for (name, _), strip in zip(rows, pictures, strict=True):
            bottom -= PICTURE
            box = (left / width, bottom / height, across / width, PICTURE / height)
            axis = figure.add_axes(box)
            axis.imshow(strip, interpolation="nearest", aspect="auto")
            axis.set_axis_off()
            middle = (bottom + PICTURE / 2) / height
            x = (left - GAP) / width
            figure.text(x, middle, name, ha="right", va="center", fontsize=LABEL)
            bottom -= GAP
        top -= down
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def survivor_strip(sample: Survivors | Tensor) -> Any:
    """The rows of a clip's figure as one picture without words, uint8 (height, width, 3).

    Args:
        sample: a clip with its survivors; or frames alone, uint8 (frames, 3, height, width).
    """
    if isinstance(sample, Tensor):
        rows = [[_picture(frame) for frame in sample]]
    else:
        rows = [pictures for _, pictures in _rows(sample)]
    strip = np.concatenate([_strip(pictures) for pictures in rows])
    times = -(-SHOWN // rows[0][0].shape[0])  # a small model's frames are hard to see
    return strip.repeat(times, axis=0).repeat(times, axis=1)


def text_width(line: str, size: float) -> float:
    """Inches of a line of text."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    found = text_to_path.get_text_width_height_descent(line, FontProperties(size=size), False)
    return float(found[0]) / 72


def wrapped(caption: str, width: float) -> str:
    """A caption in lines that are no wider, the end left out where they are too many."""
    letters = min(len(caption), int(width * 72 / TITLE * 4))  # four of them in an em: few are less
    while True:
        lines = textwrap.wrap(caption, max(letters, 1), max_lines=MAX_LINES, placeholder=" …")
        if letters <= 4 or max(text_width(line, TITLE) for line in lines) <= width:
            return "\n".join(lines)
        letters -= 1


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
    if sample.truth is not None:
        rows.append((f"named\n{len(sample.truth)} patches", _faded(sample, sample.truth)))
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

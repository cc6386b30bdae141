"""Augmentation on the training device: crop, flip, changes, the same for all frames of a clip."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kornia.geometry.transform import hflip
from kornia.geometry.transform import resize as resize_bicubic
from torch import Tensor

from svitt_ops.training.data import RESIZES
from svitt_ops.training.data.rand_augment import Change, change, draw_changes

Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What may happen to a clip; the default is a plain resize."""

    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Share of the picture that a crop keeps; (1, 1) keeps all of it."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a crop."""
    flip: bool = False
    """Mirror half of the clips."""
    rand_augment: tuple[int, int] | None = None
    """How many changes of RandAugment, and their strength, 0 to 10; None: no changes."""

    def draw(self, rng: random.Random, height: int, width: int) -> tuple[Box, bool]:
        """The box to cut out and whether to mirror, as torchvision's RandomResizedCrop draws."""
        flip = self.flip and rng.random() < 0.5
        if self.crop_scale == (1.0, 1.0):
            return (0, 0, height, width), flip
        for _ in range(10):
            area = height * width * rng.uniform(*self.crop_scale)
            ratio = math.exp(rng.uniform(*(math.log(r) for r in self.crop_ratio)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return (rng.randint(0, height - h), rng.randint(0, width - w), h, w), flip
        # No box of such a shape fits: the largest in the middle that does.
        h = min(height, round(width / self.crop_ratio[0]))
        w = min(width, round(height * self.crop_ratio[1]))
        return ((height - h) // 2, (width - w) // 2, h, w), flip

    def changes(self, rng: random.Random) -> tuple[Change, ...]:
        """What RandAugment does to a clip."""
        return () if self.rand_augment is None else draw_changes(rng, *self.rand_augment)


def to_pixel_values(
    clips: Tensor | Sequence[Tensor],
    size: int,
    boxes: Sequence[Box] | None = None,
    flips: Sequence[bool] | None = None,
    changes: Sequence[Sequence[Change]] | None = None,
    *,
    resize: str = "antialias",
) -> Tensor:
    """Cut, resize, mirror, change and normalise clips on the device they are on.

    Args:
        clips: uint8 (clips, frames, 3, height, width), or a list where sizes differ.
        size: height and width of the result.
        boxes: what to cut out of every frame of a clip; default: nothing is cut.
        flips: which clips to mirror; default: none.
        changes: of each clip, by RandAugment; default: none.
        resize: "antialias" is bicubic with antialiasing; "official" is what the released SViTT and
            Singularity do, bicubic without, rounded to whole numbers of 0 to 255. On large photos
            the two differ by up to 7 of 255 in the mean.

    Returns:
        fp32 (clips, frames, 3, size, size) with mean and deviation 0.5 taken out, as BEiT wants.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize: must be one of {', '.join(RESIZES)}, got {resize!r}")
    whole = boxes is None or all(
        tuple(box) == (0, 0, *clip.shape[-2:]) for clip, box in zip(clips, boxes, strict=True)
    )
    if whole and isinstance(clips, Tensor):
        pixels = _resized(clips.flatten(0, 1), size, resize).unflatten(0, clips.shape[:2])
    else:
        cut = []
        for number, clip in enumerate(clips):
            if boxes is not None:
                top, left, height, width = boxes[number]
                clip = clip[..., top : top + height, left : left + width]
            cut.append(_resized(clip, size, resize))
        pixels = torch.stack(cut)
    if flips is not None and any(flips):
        which = torch.tensor(flips, device=pixels.device).view(-1, 1, 1, 1, 1)
        pixels = torch.where(which, hflip(pixels), pixels)
    if changes is not None and any(changes):
        pixels = torch.stack([change(*pair) for pair in zip(pixels, changes, strict=True)])
    return pixels * 2 - 1


def _resized(frames: Tensor, size: int, how: str) -> Tensor:
    """uint8 (frames, 3, height, width) to fp32 in [0, 1] of the wanted size."""
    if frames.shape[-2:] == (size, size):
        return frames.float() / 255
    if how == "official":
        pixels = F.interpolate(frames.float(), (size, size), mode="bicubic", align_corners=False)
        return pixels.clamp(0, 255).round() / 255
    pixels = resize_bicubic(
        frames.float() / 255, (size, size), interpolation="bicubic", antialias=True
    )
    return pixels.clamp(0, 1)  # bicubic overshoots

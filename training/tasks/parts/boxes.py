"""Boxes, and which of them a saliency map means.

A box is (left, top, width, height) in pixels. A map (rows, columns) says how much each patch of a
picture matters; it becomes pixels by bicubic interpolation.
Source: the grounding of ALBEF (NeurIPS 2021) and SIMLA on RefCOCO+; the pointing game is of Zhang
et al., Top-down neural attention by excitation backprop (ECCV 2016).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[float, float, float, float]
ALPHA = 0.5
"""By which power of its area a box's sum is divided: 0 prefers large ones, 1 the mean."""
OVERLAP = 0.5
"""Intersection over union from which a box counts as the right one."""


@dataclass(frozen=True, kw_only=True)
class Grounded:
    """What a saliency map says of where one thing is."""

    right: bool
    """The box that it means overlaps enough with the true one."""
    points: bool
    """Its maximum is in the true box."""
    area: float
    """Share of the picture that is in the true box."""
    by_chance: float
    """Probability that a box that is chosen without looking is right."""


def ground_thing(
    saliency: Tensor, box: Box, detections: Sequence[Box], size: tuple[int, int]
) -> Grounded:
    """Compare what a map means with the true box; a flat map means nothing.

    Args:
        saliency: ``(rows, columns)``.
        box: the true one.
        detections: boxes to choose from by `best_detection`; where there are none, the box is
            `best_box`, and chance is that of the whole picture.
        size: width and height of the picture.
    """
    pixels = upsample(saliency, size)
    chosen = best_detection(pixels, detections) if detections else best_box(saliency, size)
    others = detections or [(0.0, 0.0, float(size[0]), float(size[1]))]
    flat = bool((saliency == saliency[0, 0]).all())
    return Grounded(
        right=not flat and box_iou(chosen, box) >= OVERLAP,
        points=not flat and points_into(pixels, box),
        area=area_share(box, size),
        by_chance=sum(box_iou(other, box) >= OVERLAP for other in others) / len(others),
    )


def grounding_accuracies(found: Sequence[Grounded]) -> dict[str, float]:
    """Shares in percent: `accuracy` of boxes, `pointing`, and what both are by chance.

    `chance` is that of a random detection, or of the whole picture; `pointing_chance` the mean
    share of the picture that is in the true box, as that of a random point.
    """
    if not found:
        raise ValueError("accuracies: must be of at least one reference, got none")
    sums = {
        "accuracy": sum(one.right for one in found),
        "chance": sum(one.by_chance for one in found),
        "pointing": sum(one.points for one in found),
        "pointing_chance": sum(one.area for one in found),
    }
    return {name: 100 * total / len(found) for name, total in sums.items()}


def to_number(value: object) -> float:
    """A number as a float; NaN for all that is none, or is too large for one."""
    try:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number else math.nan  # type: ignore[arg-type]
    except OverflowError:
        return math.nan


def parse_box(value: object, what: str = "box") -> Box:
    """A box from four numbers; a ValueError where they are none, or have no area."""
    listed = list(value) if isinstance(value, list | tuple) else []
    numbers = [x for x in map(to_number, listed) if math.isfinite(x)]
    if len(listed) != 4 or len(numbers) != 4:
        raise ValueError(f"{what} must be 4 numbers: left, top, width, height, got {value!r:.80}")
    x, y, width, height = numbers
    if width <= 0 or height <= 0:
        raise ValueError(f"{what} must have an area, got {value!r}")
    return x, y, width, height


def check_inside(box: Box, size: tuple[float, float], what: str = "box") -> None:
    """Refuse a box of which nothing is in a picture of some width and height."""
    x, y, width, height = box
    if x + width <= 0 or y + height <= 0 or x >= size[0] or y >= size[1]:
        raise ValueError(f"{what} is outside of the picture of {size[0]:g} x {size[1]:g}: {box}")


def box_iou(box: Box, other: Box) -> float:
    """Intersection over union."""
    overlap = 1.0
    for k in (0, 1):
        end = min(box[k] + box[k + 2], other[k] + other[k + 2])
        overlap *= max(0.0, end - max(box[k], other[k]))
    return overlap / (box[2] * box[3] + other[2] * other[3] - overlap)


def area_share(box: Box, size: tuple[float, float]) -> float:
    """The share of a picture of some width and height that is in a box."""
    return box_iou(_clip(box, size), (0.0, 0.0, *size))


def upsample(saliency: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (rows, columns) for every pixel of a picture of some width and height."""
    if saliency.dim() != 2 or not saliency.is_floating_point():
        raise ValueError(
            "saliency: must be a floating map (rows, columns), got"
            f" {saliency.dtype} {tuple(saliency.shape)}"
        )
    picture = saliency.float()[None, None]
    return F.interpolate(picture, size[::-1], mode="bicubic", align_corners=False)[0, 0]


def box_scores(pixels: Tensor, boxes: Sequence[Box]) -> Tensor:
    """How much of a map each box holds: sum / area^0.5, as many numbers as boxes.

    Args:
        pixels: ``(height, width)``, as of `upsample`.
        boxes: the pixels of each are those from the whole part of its left to that of its right,
            at least one; what is outside counts nothing.
    """
    height, width = pixels.shape
    sums = F.pad(pixels.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    scores = []
    for box in boxes:
        x, y, w, h = box
        left, right = _pixels(x, w, width)
        top, bottom = _pixels(y, h, height)
        held = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        scores.append(held / (w * h) ** ALPHA)
    return torch.stack(scores)


def best_detection(pixels: Tensor, boxes: Sequence[Box]) -> Box:
    """The box that holds most of a map by `box_scores`; of equal ones the first."""
    if not boxes:
        raise ValueError("boxes: must be at least one, got none")
    return boxes[int(box_scores(pixels, boxes).argmax())]


def best_box(saliency: Tensor, size: tuple[int, int]) -> Box:
    """Of all boxes that are made of patches, the one that holds most of the map.

    It is what `best_detection` would find among all rectangles of whole patches, without
    interpolation; O(rows^2 columns^2) of them.

    Args:
        saliency: ``(rows, columns)``.
        size: width and height of the picture.
    """
    rows, columns = saliency.shape
    sums = F.pad(saliency.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    top, bottom = torch.triu_indices(rows + 1, rows + 1, offset=1, device=saliency.device)
    left, right = torch.triu_indices(columns + 1, columns + 1, offset=1, device=saliency.device)
    strips = sums[bottom] - sums[top]
    held = strips[:, right] - strips[:, left]
    areas = (bottom - top)[:, None] * (right - left)
    number = int((held / areas**ALPHA).argmax())
    tall, wide = divmod(number, len(left))
    x_step, y_step = size[0] / columns, size[1] / rows
    x, y = int(left[wide]) * x_step, int(top[tall]) * y_step
    return x, y, int(right[wide]) * x_step - x, int(bottom[tall]) * y_step - y


def points_into(pixels: Tensor, box: Box) -> bool:
    """Whether the centre of the pixel that matters most is in a box; of equal ones the first."""
    y, x = divmod(int(pixels.argmax()), pixels.shape[1])
    left, top, width, height = box
    return left <= x + 0.5 < left + width and top <= y + 0.5 < top + height


def _pixels(start: float, length: float, extent: int) -> tuple[int, int]:
    first = int(min(max(start, 0), extent))
    last = int(min(max(start + length, 0), extent))
    return first, max(last, min(first + 1, extent))


def _clip(box: Box, size: tuple[float, float]) -> Box:
    x, y = max(box[0], 0.0), max(box[1], 0.0)
    right, bottom = min(box[0] + box[2], size[0]), min(box[1] + box[3], size[1])
    return x, y, max(right - x, 0.0), max(bottom - y, 0.0)

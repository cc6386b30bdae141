"""Another resolution for trained weights: what belongs to offsets and places is interpolated.

Source: BEiT (ICLR 2022), whose released code resizes relative position bias in this way, and
SViTT's and Singularity's after it; absolute positions are resized as DeiT's (ICML 2021).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RATIOS = (1.01, 1.5)
"""Bounds of the ratio by which old offsets lie further apart, step by step from the middle."""


def resize_offsets(planes: Tensor, grid_size: int) -> Tensor:
    """Resize planes of relative position bias ``(planes, w * w, heads)``, w = 2 side - 1.

    Old offsets are spread over the new ones in a geometric progression, so that near offsets keep
    their bias, and a cubic spline is drawn through them; what lies outside takes the border's bias.

    Args:
        planes: one for each temporal offset.
        grid_size: patches along a side from now on; the same as before changes nothing.
    """
    width = round(planes.shape[1] ** 0.5)
    if width == 2 * grid_size - 1:
        return planes
    weights = _spline_weights((width + 1) // 2, grid_size).to(planes.device)
    old = planes.double().unflatten(1, (width, width))
    new = torch.einsum("ra,cb,pabh->prch", weights, weights, old)
    return new.flatten(1, 2).to(planes.dtype)


def resize_places(positions: Tensor, grid_size: int) -> Tensor:
    """Resize absolute positions ``(frames, side * side, dim)``, bicubic, frame by frame."""
    side = round(positions.shape[1] ** 0.5)
    if side == grid_size:
        return positions
    if not side or side * side != positions.shape[1]:
        raise ValueError(
            "resize_places: positions must have shape (frames, side * side, dim), got "
            f"{tuple(positions.shape)}"
        )
    old = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    new = F.interpolate(old.double(), (grid_size, grid_size), mode="bicubic", align_corners=False)
    return new.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)


def _spline_weights(old: int, new: int) -> Tensor:
    """fp64 ``(2 new - 1, 2 old - 1)``: what the bias at each old offset adds to a new one's."""
    known = _spread(old - 1, new - 1)
    wanted = torch.arange(1 - new, new, dtype=torch.float64).clamp(known[0], known[-1])
    degree = min(3, len(known) - 1)  # 2 for a side of two patches, 0 for one
    ends = known[0].expand(degree + 1), known[-1].expand(degree + 1)
    # Not-a-knot: a cubic has no knot beside its ends.
    knots = torch.cat([ends[0], known[2:-2] if degree == 3 else known[:0], ends[1]])
    return torch.linalg.solve(_basis(known, knots, degree).T, _basis(wanted, knots, degree).T).T


def _spread(old: int, new: int) -> Tensor:
    """Places of the old offsets -old to old, the last one at about ``new``."""
    low, high = RATIOS
    ratio = low
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (ratio**old - 1) / (ratio - 1) > new:
            high = ratio
        else:
            low = ratio
    steps = ratio ** torch.arange(old, dtype=torch.float64)
    right = steps.cumsum(0)
    return torch.cat([-right.flip(0), torch.zeros(1, dtype=torch.float64), right])


def _basis(x: Tensor, knots: Tensor, degree: int) -> Tensor:
    """Values of the B-splines over the knots, ``(len(x), len(knots) - degree - 1)``."""
    if degree == 0:
        return torch.ones(len(x), 1, dtype=x.dtype)
    # The interval of each x; the last one is closed.
    interval = torch.searchsorted(knots, x, right=True).clamp(max=len(knots) - degree - 1) - 1
    basis = F.one_hot(interval, len(knots) - 1).to(x.dtype)
    for d in range(1, degree + 1):
        spans = (knots[d:] - knots[:-d]).clamp(min=1e-12)  # an empty one has a zero above it
        rising = (x[:, None] - knots[:-d]) / spans
        left, right = rising[:, :-1], 1 - rising[:, 1:]
        basis = left * basis[:, :-1] + right * basis[:, 1:]
    return basis

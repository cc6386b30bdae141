"""Orders of the patches of a clip: which patch comes when, before blocks are cut from them.

Source: SViTT (CVPR 2023), supplement, table A7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svitt_ops.models.parts.configuration import OFFICIAL


def token_order(order: str, grid: tuple[int, int, int], *, compat: str | None = None) -> Tensor:
    """Numbers of the patches of a (frames, rows, columns) grid, in an order.

    Args:
        order: "standard" is by frame, row and column; "morton" and "hilbert" follow the curve
            through the smallest cube of 2^k a side around the grid, without what lies outside.
        grid: T frames, H rows, W columns.
        compat: "svitt-official" is the order of the released code: its Morton curve has the frame's
            bit below the row's and the column's, and a cube of twice the side is drawn around a
            grid whose longest side is a power of two, which turns its Hilbert curve.

    Returns:
        int64 ``(T * H * W,)``: entry p is the patch, numbered in standard order, that comes p-th.
    """
    numbers = torch.arange(grid[0] * grid[1] * grid[2])
    if order == "standard":
        return numbers
    coordinates = torch.unravel_index(numbers, grid)
    official = compat == OFFICIAL
    bits = (max(grid) if official else max(grid) - 1).bit_length()
    if order == "hilbert":
        coordinates = _transpose_hilbert(coordinates, bits)
    elif order == "morton":
        coordinates = coordinates[::-1] if official else coordinates
    else:
        raise ValueError(
            f"token_order: order must be 'standard', 'morton' or 'hilbert', got {order!r}"
        )
    return _interleave(coordinates, bits).argsort()


def _interleave(coordinates: tuple[Tensor, ...], bits: int) -> Tensor:
    """One number of the bits of all coordinates, the first coordinate's above the others'."""
    code = torch.zeros_like(coordinates[0])
    for bit in reversed(range(bits)):
        for axis in coordinates:
            code = code * 2 + (axis >> bit & 1)
    return code


def _transpose_hilbert(coordinates: tuple[Tensor, ...], bits: int) -> tuple[Tensor, ...]:
    """Coordinates whose interleaved bits are the place on the Hilbert curve.

    Skilling, "Programming the Hilbert curve" (2004): undo the rotations of every level from the
    top, then Gray-encode.
    """
    axes = list(coordinates)
    for bit in reversed(range(1, bits)):
        low = (1 << bit) - 1
        for i in range(len(axes)):
            upper = (axes[i] >> bit & 1).bool()
            swap = torch.where(upper, 0, (axes[0] ^ axes[i]) & low)
            axes[0] = torch.where(upper, axes[0] ^ low, axes[0] ^ swap)
            axes[i] = axes[i] ^ swap if i else axes[0]
    for i in range(1, len(axes)):
        axes[i] = axes[i] ^ axes[i - 1]
    flip = torch.zeros_like(axes[0])
    for bit in range(1, bits):
        flip = torch.where((axes[-1] >> bit & 1).bool(), flip ^ ((1 << bit) - 1), flip)
    return tuple(axis ^ flip for axis in axes)

"""More frames for a trained model: inflation of image weights and temporal expansion.

Source: SViTT (CVPR 2023), equations 4-11.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svitt_ops as so
from svitt_ops.models.configuration import OFFICIAL
from svitt_ops.nn import RelativePositionBias3D

if TYPE_CHECKING:
    from svitt_ops.models.svitt import TwoTowers

Mode = Literal["nearest-exact", "nearest"]
Model = TypeVar("Model", bound="TwoTowers")
GLOBAL_ROWS = 3
"""Rows of a bias table that belong to [CLS]: to a token, from a token, to itself."""


def expand_frames(model: Model, num_frames: int, *, mode: Mode | None = None) -> Model:
    """Make a model one of clips of another length, in place.

    Every relative position bias table is resized along its temporal offsets, and absolute positions
    along the frames; all other weights stay. The slice of offset 0 stays what it is, and a table of
    one frame is repeated for every offset. How many frames the tables were for is inferred from
    their rows.

    Args:
        model: any model of this package.
        num_frames: frames from now on. Fewer than before are taken as well.
        mode: which of the old offsets a new one takes. "nearest-exact" treats past and future
            alike; "nearest" rounds down, as the released code does, and is the default under
            ``compat="svitt-official"`` only.

    Returns:
        The same model. Its parameters are new: make optimizers afterwards.
    """
    if num_frames < 1:
        raise ValueError(f"expand_frames: num_frames must be at least 1, got {num_frames}")
    config = model.config
    if mode is None:
        mode = "nearest" if config.compat == OFFICIAL else "nearest-exact"
    if mode not in ("nearest-exact", "nearest"):
        raise ValueError(f"expand_frames: mode must be 'nearest-exact' or 'nearest', got {mode!r}")
    tower, grid = model.video, (num_frames, config.grid_size, config.grid_size)
    for layer in tower.layers:
        bias = layer.attention.bias
        if isinstance(bias, RelativePositionBias3D):
            old = bias.table
            wanted = resize_bias_table(old.detach(), config.grid_size, num_frames, mode)
            bias.table = _like(old, wanted)
            bias.grid = grid
            bias.codes = so.position_codes(grid, device=old.device)
    if tower.patch_positions is not None:
        old = tower.patch_positions
        tower.patch_positions = _like(old, _resize(old.detach(), num_frames, mode))
    config.num_frames = num_frames
    tower.reset_positions(tower.cls_token.device)
    return model


def frames_of_bias_table(rows: int, grid_size: int) -> int:
    """Frames that a bias table of so many rows is for; a table of one frame is two-dimensional."""
    per_offset = (2 * grid_size - 1) ** 2
    offsets, left = divmod(rows - GLOBAL_ROWS, per_offset)
    if left or offsets < 1 or offsets % 2 == 0:
        raise ValueError(
            f"bias table: rows must be an odd multiple of {per_offset} and {GLOBAL_ROWS} more "
            f"for a {grid_size} x {grid_size} grid, got {rows}"
        )
    return (offsets + 1) // 2


def resize_bias_table(
    table: Tensor, grid_size: int, num_frames: int, mode: Mode = "nearest-exact"
) -> Tensor:
    """Resize a relative position bias table ``(rows, heads)`` along its temporal offsets."""
    offsets = 2 * frames_of_bias_table(table.shape[0], grid_size) - 1
    own, of_globals = table[:-GLOBAL_ROWS], table[-GLOBAL_ROWS:]
    resized = _resize(own.unflatten(0, (offsets, -1)), 2 * num_frames - 1, mode)
    return torch.cat([resized.flatten(0, 1), of_globals])


def _resize(x: Tensor, size: int, mode: Mode) -> Tensor:
    """Repeat or drop entries along the first dimension."""
    places = torch.arange(x.shape[0], dtype=torch.float64)[None, None]
    chosen = F.interpolate(places, size=size, mode=mode)[0, 0].long()
    return x[chosen.to(x.device)]


def _like(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.clone(), requires_grad=old.requires_grad)

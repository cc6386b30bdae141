"""More frames and larger pictures for a trained model.

Source: SViTT (CVPR 2023), equations 4-11, for the frames; `parts/resolution.py` for the pictures.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svitt_ops as so
from svitt_ops.models.parts.resolution import resize_offsets, resize_places
from svitt_ops.nn import RelativePositionBias3D

if TYPE_CHECKING:
    from svitt_ops.models.parts.configuration import VideoConfig
    from svitt_ops.models.parts.two_towers import TwoTowers
    from svitt_ops.models.parts.video import VideoTower

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
    if mode is None:
        mode = "nearest" if model.config.official else "nearest-exact"
    if mode not in ("nearest-exact", "nearest"):
        raise ValueError(f"expand_frames: mode must be 'nearest-exact' or 'nearest', got {mode!r}")
    return _fit(model, num_frames, model.config.image_size, mode)


def change_image_size(model: Model, image_size: int) -> Model:
    """Make a model one of frames of another height and width, in place.

    Rows and columns of every relative position bias table, and of absolute positions, are
    interpolated to the new grid of patches as BEiT's authors do, smaller or larger; all other
    weights stay.

    Args:
        model: any model of this package.
        image_size: height and width from now on, in pixels; a multiple of the patch size.

    Returns:
        The same model. Its parameters are new: make optimizers afterwards.
    """
    patch = model.config.patch_size
    if image_size < 1 or image_size % patch:
        raise ValueError(
            f"change_image_size: image_size must be a multiple of the patch size, {patch} pixels, "
            f"got {image_size}"
        )
    return _fit(model, model.config.num_frames, image_size, "nearest-exact")


def _fit(model: Model, num_frames: int, image_size: int, mode: Mode) -> Model:
    """Resize whatever depends on the frames or on the grid of patches."""
    config = model.config
    wanted = copy.copy(config)
    wanted.num_frames, wanted.image_size = num_frames, image_size
    wanted.check()
    old_grid = config.grid_size
    config.num_frames, config.image_size = num_frames, image_size
    teacher = getattr(model, "teacher", None)
    for tower in [model.video, *([] if teacher is None else [teacher.video])]:
        _fit_tower(tower, config, old_grid, mode)
    model.fit_frames(num_frames)
    return model


def _fit_tower(tower: VideoTower, config: VideoConfig, old_grid: int, mode: Mode) -> None:
    """Resize a tower's tables and positions to a configuration."""
    grid = (config.tower_frames, config.grid_size, config.grid_size)
    for layer in tower.layers:
        bias = getattr(layer.attention, "bias", None)
        if isinstance(bias, RelativePositionBias3D):
            old = bias.table
            wanted = resize_bias_table(
                old.detach(), config.grid_size, config.tower_frames, mode, source_grid=old_grid
            )
            bias.table = _like(old, wanted)
            bias.grid = grid
            bias.codes = so.position_codes(grid, device=old.device)
    if tower.patch_positions is not None:
        old = tower.patch_positions
        places = resize_places(_resize(old.detach(), config.tower_frames, mode), config.grid_size)
        tower.patch_positions = _like(old, places)
    tower.reset_positions(next(tower.parameters()).device)


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


def bias_table_grids(rows: int) -> list[tuple[int, int]]:
    """Frames and patches along a side that a bias table of so many rows may be for.

    Fewest frames first; pictures of a single patch are left out.
    """
    found = []
    for grid_size in range(2, round(max(rows - GLOBAL_ROWS, 0) ** 0.5) // 2 + 2):
        offsets, left = divmod(rows - GLOBAL_ROWS, (2 * grid_size - 1) ** 2)
        if not left and offsets % 2:
            found.append(((offsets + 1) // 2, grid_size))
    return found[::-1]


def resize_bias_table(
    table: Tensor,
    grid_size: int,
    num_frames: int,
    mode: Mode = "nearest-exact",
    *,
    source_grid: int | None = None,
) -> Tensor:
    """Resize a relative position bias table ``(rows, heads)`` to other frames and another grid.

    Args:
        table: its frames are inferred from its rows.
        grid_size: patches along a side of the result.
        num_frames: frames of the result.
        mode: as of `expand_frames`.
        source_grid: patches along a side of ``table``; ``grid_size`` by default.
    """
    source_grid = grid_size if source_grid is None else source_grid
    offsets = 2 * frames_of_bias_table(table.shape[0], source_grid) - 1
    own, of_globals = table[:-GLOBAL_ROWS], table[-GLOBAL_ROWS:]
    planes = resize_offsets(own.unflatten(0, (offsets, -1)), grid_size)
    resized = _resize(planes, 2 * num_frames - 1, mode)
    return torch.cat([resized.flatten(0, 1), of_globals])


def _resize(x: Tensor, size: int, mode: Mode) -> Tensor:
    """Repeat or drop entries along the first dimension."""
    places = torch.arange(x.shape[0], dtype=torch.float64)[None, None]
    chosen = F.interpolate(places, size=size, mode=mode)[0, 0].long()
    return x[chosen.to(x.device)]


def _like(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.clone(), requires_grad=old.requires_grad)

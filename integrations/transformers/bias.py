"""What is added to logits: BEiT's relative position bias, and padding beside it or in blocks.

BEiT adds its bias as a matrix of all pairs. The op takes the table that the matrix was looked up
in, which is found again: its row of an offset is the entry of one pair of tokens at that offset.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so

HIDDEN = -30_000.0
"""A logit whose weight is 0 beside any other, and that fp16 holds."""
PADDING = -(2.0**20)
"""What a fp64 mask adds to BEiT's bias, which can be told from it again: 32 bits are left."""


def has_table(config: Any) -> bool:
    """Whether a model adds BEiT's bias to its masks."""
    names = ("use_relative_position_bias", "use_shared_relative_position_bias")
    return any(getattr(config, name, False) for name in names)


def grid_of(config: Any) -> tuple[int, int, int]:
    """Frames, rows and columns of patches of a vision model's inputs."""
    tubelet = getattr(config, "tubelet_size", 1)
    if isinstance(tubelet, int):
        patch: Any = config.patch_size
    else:
        tubelet, *patch = tubelet
    height, width = _pair(config.image_size)
    rows, columns = _pair(patch)
    return getattr(config, "num_frames", 1) // tubelet, height // rows, width // columns


def split(mask: Tensor) -> tuple[Tensor | None, Tensor]:
    """Of BEiT's bias with padding: bool ``(batch, keys)``, True where a key is ignored; the bias.

    Args:
        mask: the bias ``(1, heads, queries, keys)``; in fp64 ``(batch, heads, queries, keys)``, its
            sum with `PADDING`.
    """
    if mask.dtype != torch.float64:
        return None, mask
    ignored = mask[:, 0, 0] < PADDING / 2
    return ignored, torch.where(ignored[0], mask[:1] - PADDING, mask[:1]).float()


def bias_table(bias: Tensor, config: Any) -> dict[str, Tensor]:
    """The table and the codes of BEiT's bias, as `svitt_ops.block_sparse_attention` takes them.

    Args:
        bias: ``(1, heads, 1 + patches, 1 + patches)``, [CLS] first.
        config: of the model; other images than its own must be square.

    Returns:
        ``bias_table`` and ``position_codes``.

    Raises:
        ValueError: where it is no bias of offsets in the grid.
    """
    patches = bias.shape[-1] - 1
    grid = grid_of(config)
    if math.prod(grid) != patches:
        grid = (1, math.isqrt(patches), math.isqrt(patches))
    wanted = f"svitt_ops: a position bias must be that of a table over the patches {grid}"
    if bias.dim() != 4 or bias.shape[0] != 1 or bias.shape[2] != bias.shape[3]:
        raise ValueError(f"{wanted}, got shape {tuple(bias.shape)}")
    if math.prod(grid) != patches:
        raise ValueError(f"{wanted}, got {patches} patches of an image that is not square")
    _, height, width = grid
    dh, dw = torch.meshgrid(
        torch.arange(1 - height, height, device=bias.device),
        torch.arange(1 - width, width, device=bias.device),
        indexing="ij",
    )
    query = 1 + (dh.clamp(min=0) * width + dw.clamp(min=0)).flatten()
    key = 1 + ((-dh).clamp(min=0) * width + (-dw).clamp(min=0)).flatten()
    of_cls = bias[0, :, (0, 1, 0), (1, 0, 0)]
    table = torch.cat([bias[0, :, query, key], of_cls], 1).T
    codes = so.position_codes(grid, device=bias.device)
    # Patches of another grid, as many, would be told by the row of one in the middle.
    middle = min(patches // 2 + width // 2, patches - 1)
    again = table[codes[middle] - codes + (table.shape[0] - 4) // 2].T
    same = torch.isclose(again, bias[0, :, 1 + middle, 1:], rtol=1e-3, atol=1e-5).all()
    words = f"{wanted}, got another one"
    if torch.compiler.is_compiling() or same.is_cuda:
        torch._assert_async(same, words)  # does not wait for the device
    elif not same:
        raise ValueError(words)
    return {"bias_table": table, "position_codes": codes}


def attend_without(
    ignored: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: so.BlockLayout,
    scaling: float | None,
    with_row: bool,
    **tables: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """`svitt_ops.block_sparse_attention` and its saliency, without some keys of each sample.

    The op knows no mask, so an ignored key has a feature of its own that makes its logit `HIDDEN`.

    Args:
        ignored: bool ``(batch, keys)``, True where a key is not attended, or None.
        query: as for the op, like all that follows.
        key: keys.
        value: values.
        layout: the pattern.
        scaling: of the logits.
        with_row: whether to return the saliency.
        **tables: of the position bias.
    """
    dim = query.shape[-1]
    scaling = dim**-0.5 if scaling is None else scaling
    if ignored is not None:
        feature = ignored.to(key.dtype)[:, None, :, None].expand(*key.shape[:3], 1)
        query = torch.cat([query, query.new_full((), HIDDEN).expand(*query.shape[:3], 1)], -1)
        key, value = torch.cat([key, feature / scaling], -1), F.pad(value, (0, 1))
    found = so.block_sparse_attention(
        query, key, value, layout, scale=scaling, return_saliency=with_row, **tables
    )
    out, row = found if isinstance(found, tuple) else (found, None)
    return out[..., :dim], row


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])

"""Dense attention of a model's layer by torch's SDPA, with the weights of the sparse one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svitt_ops as so
from svitt_ops.nn import BlockSparseSelfAttention, CrossAttention, merge_heads, split_heads


class DenseSelfAttention(nn.Module):
    """`BlockSparseSelfAttention` that attends everything: what its layout says is not read.

    As BEiT does it, the bias of every pair is looked up in the table and handed to SDPA as a mask.
    On a CPU a mask with a gradient takes SDPA to its plain path, O(tokens^2) memory.

    Args:
        sparse: gives the projections and the table.
        with_bias: whether the table is used.
    """

    def __init__(self, sparse: BlockSparseSelfAttention, *, with_bias: bool) -> None:
        super().__init__()
        self.sparse, self.with_bias = sparse, with_bias

    def forward(self, tokens: Tensor, layout: so.BlockLayout, *, codes: Tensor, **_: Any) -> Tensor:
        """Attend; arguments as `BlockSparseSelfAttention` takes them, without saliency."""
        sparse = self.sparse
        query, key, value = (
            project(tokens).unflatten(-1, (sparse.num_heads, -1)).transpose(1, 2)
            for project in (sparse.query, sparse.key, sparse.value)
        )
        mask = None
        if self.with_bias and sparse.bias is not None:
            table = sparse.bias.table
            index = pair_index(codes, len(table))
            mask = F.embedding(index, table).permute(2, 0, 1)[None].to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        merged: Tensor = sparse.out(out.transpose(1, 2).flatten(2))
        return merged


def pair_index(codes: Tensor, rows: int, g: int = 1) -> Tensor:
    """The row of the bias table for each pair of tokens, ``(g + n, g + n)``, as BEiT keeps it.

    Args:
        codes: of the ``n`` tokens after the ``g`` global ones.
        rows: of the table.
        g: number of global tokens, [CLS] alone by default.
    """
    offsets = rows - 2 * g - g * g
    index = torch.empty((g + len(codes),) * 2, dtype=torch.int64, device=codes.device)
    each = torch.arange(g, device=codes.device)
    index[g:, g:] = codes[:, None] - codes + (offsets - 1) // 2
    index[:g, g:] = (offsets + each)[:, None]
    index[g:, :g] = offsets + g + each
    index[:g, :g] = offsets + 2 * g + each[:, None] * g + each
    return index


def _self_attention(module: BlockSparseSelfAttention, *args: Any, **given: Any) -> Tensor:
    found: Tensor = DenseSelfAttention(module, with_bias=False)(*args, **given)
    return found


def _cross_attention(
    module: CrossAttention,
    tokens: Tensor,
    context: Tensor,
    *,
    context_rows: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Arguments as `CrossAttention` takes them, without saliency."""
    query, key, value = (
        split_heads(project(x), module.num_heads)
        for project, x in ((module.query, tokens), (module.key, context), (module.value, context))
    )
    if context_rows is not None:
        key, value = (x.index_select(0, context_rows) for x in (key, value))
    mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    merged: Tensor = module.out(merge_heads(out))
    return merged


@contextmanager
def attending_by_sdpa() -> Iterator[None]:
    """The attention of all dense models without position bias by SDPA."""
    with (
        patch.object(BlockSparseSelfAttention, "forward", _self_attention),
        patch.object(CrossAttention, "forward", _cross_attention),
    ):
        yield

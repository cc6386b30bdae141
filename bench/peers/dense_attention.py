"""Dense attention of a model's layer by torch's SDPA, with the weights of the sparse one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svitt_ops as so
from svitt_ops.nn import BlockSparseSelfAttention


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


def pair_index(codes: Tensor, rows: int) -> Tensor:
    """The table's row of each pair of tokens, [CLS] first, ``(1 + n, 1 + n)``."""
    offsets = codes[:, None] - codes[None] + (rows - 4) // 2
    index = torch.empty((len(codes) + 1,) * 2, dtype=torch.int64, device=codes.device)
    index[1:, 1:], index[0, 1:] = offsets, rows - 3
    index[1:, 0], index[0, 0] = rows - 2, rows - 1
    return index

"""Block-sparse attention by masking dense attention: O(tokens^2) memory, obviously right."""

from __future__ import annotations

import torch
from torch import Tensor

from svitt_ops.layout import BlockLayout


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    bias_table: Tensor | None = None,
    position_codes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_saliency: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`svitt_ops.block_sparse_attention` in plain, differentiable PyTorch.

    Computes in fp32, or in fp64 if the inputs are fp64. Arguments and results as there.
    """
    compute = torch.promote_types(query.dtype, torch.float32)
    out, _, saliency = attend(
        query, key, value, layout, bias_table, position_codes, key_lengths, scale, compute
    )
    return (out, saliency.detach()) if return_saliency else out


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    bias_table: Tensor | None,
    position_codes: Tensor | None,
    key_lengths: Tensor | None,
    scale: float | None,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and saliency, every step rounded to the dtype ``compute``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query.to(compute) @ key.to(compute).mT) * scale
    if bias_table is not None and position_codes is not None:
        bias = dense_bias(bias_table, position_codes, layout.num_global)
        logits = logits + bias.to(compute)
    allowed = layout.to_dense()
    allowed = allowed.reshape((1,) * (4 - allowed.dim()) + allowed.shape)
    if key_lengths is not None:
        exists = torch.arange(layout.seq_len, device=query.device) < key_lengths[:, None]
        allowed = allowed & exists[:, None, :, None] & exists[:, None, None, :]
    some = allowed.any(-1, keepdim=True)
    # Rows without a key keep finite logits, so that neither they nor their gradients become NaN.
    logits = logits.masked_fill(~allowed, float("-inf")).masked_fill(~some, 0.0)
    probs = logits.softmax(-1) * some
    out = (probs @ value.to(compute)).to(query.dtype)
    lse = logits.logsumexp(-1).masked_fill(~some.squeeze(-1), float("-inf"))
    first, rest = layout.num_global > 0, layout.num_global
    saliency = probs[:, :, 0, rest:].mean(1) if first else probs.new_empty(0)
    return out, lse, saliency.to(torch.promote_types(compute, torch.float32))


def dense_bias(bias_table: Tensor, position_codes: Tensor, num_global: int) -> Tensor:
    """The bias as a matrix ``(1 or batch, heads, tokens, tokens)``, globals first.

    Args:
        bias_table: ``(R, heads)``, R = R0 + 2 g + g g rows as in BEiT.
        position_codes: int32 ``(num_tokens,)`` or ``(batch, num_tokens)``.
        num_global: g.
    """
    g = num_global
    codes = position_codes.reshape(-1, position_codes.shape[-1]).long()
    rows = bias_table.shape[0] - 2 * g - g * g
    index = codes[:, :, None] - codes[:, None, :] + (rows - 1) // 2
    number = torch.arange(g, device=codes.device)
    batch, tokens = codes.shape
    to_token = (rows + number)[:, None].expand(batch, g, tokens)
    to_global = (rows + g + number).expand(batch, tokens, g)
    among = (rows + 2 * g + number[:, None] * g + number).expand(batch, g, g)
    top = torch.cat([among, to_token], 2)
    index = torch.cat([top, torch.cat([to_global, index], 2)], 1)
    return bias_table[index].permute(0, 3, 1, 2)

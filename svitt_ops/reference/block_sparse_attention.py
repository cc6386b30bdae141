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
    query, key, value = (_present(x, key_lengths) for x in (query, key, value))
    probs, lse = _weights(
        query, key, layout, bias_table, position_codes, key_lengths, scale, compute
    )
    out = (probs @ value.to(compute)).to(query.dtype)
    g = layout.num_global
    saliency = probs[:, :, 0, g:].mean(1) if g > 0 else probs.new_empty(0)
    return out, lse, saliency.to(torch.promote_types(compute, torch.float32))


def attend_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    bias_table: Tensor | None,
    position_codes: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and table in fp32, in closed form.

    For where autograd cannot go: a kernel runs below it. Without a table the last result is empty.
    """
    q, k, v, grad = (_present(x, key_lengths).float() for x in (query, key, value, grad_out))
    probs, _ = _weights(q, k, layout, bias_table, position_codes, key_lengths, scale, torch.float32)
    grad_probs = grad @ v.mT
    grad_logits = probs * (grad_probs - (probs * grad_probs).sum(-1, keepdim=True))
    grad_table = q.new_empty(0)
    if bias_table is not None and position_codes is not None:
        index = _bias_index(bias_table, position_codes, layout.num_global)
        per_pair = grad_logits if len(index) > 1 else grad_logits.sum(0, keepdim=True)
        rows = per_pair.permute(0, 2, 3, 1).reshape(-1, q.shape[1])
        grad_table = torch.zeros_like(bias_table, dtype=torch.float32)
        grad_table.index_add_(0, index.flatten(), rows)
    return scale * (grad_logits @ k), scale * (grad_logits.mT @ q), probs.mT @ grad, grad_table


def _present(x: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Zero what does not exist, so that not even NaN leaks out of it."""
    if key_lengths is None:
        return x
    absent = torch.arange(x.shape[2], device=x.device) >= key_lengths[:, None]
    return x.masked_fill(absent[:, None, :, None], 0.0)


def _weights(
    query: Tensor,
    key: Tensor,
    layout: BlockLayout,
    bias_table: Tensor | None,
    position_codes: Tensor | None,
    key_lengths: Tensor | None,
    scale: float | None,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attention weights (batch, heads, tokens, tokens) and log-sum-exp."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query.to(compute) @ key.to(compute).mT) * scale
    if bias_table is not None and position_codes is not None:
        index = _bias_index(bias_table, position_codes, layout.num_global)
        logits = logits + bias_table[index].permute(0, 3, 1, 2).to(compute)
    allowed = layout.to_dense()
    allowed = allowed.reshape((1,) * (4 - allowed.dim()) + allowed.shape)
    if key_lengths is not None:
        exists = torch.arange(layout.seq_len, device=query.device) < key_lengths[:, None]
        allowed = allowed & exists[:, None, :, None] & exists[:, None, None, :]
    some = allowed.any(-1, keepdim=True)
    # Rows without a key keep finite logits, so that neither they nor their gradients become NaN.
    logits = logits.masked_fill(~allowed, float("-inf")).masked_fill(~some, 0.0)
    lse = logits.logsumexp(-1).masked_fill(~some.squeeze(-1), float("-inf"))
    return logits.softmax(-1) * some, lse


def _bias_index(bias_table: Tensor, position_codes: Tensor, num_global: int) -> Tensor:
    """The table's row for each pair of tokens, ``(1 or batch, tokens, tokens)``, globals first."""
    g = num_global
    codes = (position_codes if position_codes.dim() == 2 else position_codes[None]).long()
    rows = bias_table.shape[0] - 2 * g - g * g
    between = codes[:, :, None] - codes[:, None, :] + (rows - 1) // 2
    number = torch.arange(g, device=codes.device)
    batch, tokens = codes.shape
    to_token = (rows + number)[:, None].expand(batch, g, tokens)
    to_global = (rows + g + number).expand(batch, tokens, g)
    among = (rows + 2 * g + number[:, None] * g + number).expand(batch, g, g)
    top = torch.cat([among, to_token], 2)
    return torch.cat([top, torch.cat([to_global, between], 2)], 1)

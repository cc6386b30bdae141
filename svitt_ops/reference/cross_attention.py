"""Cross-attention with explicit weights: O(queries * keys) memory, obviously right."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Saliency = Literal["cls", "mean"]


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    return_saliency: Saliency | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`svitt_ops.cross_attention` in plain, differentiable PyTorch.

    Computes in fp32, or in fp64 if the inputs are fp64. Arguments and results as there.
    """
    compute = torch.promote_types(query.dtype, torch.float32)
    out, _, saliency = attend(
        query, key, value, key_padding_mask, scale, return_saliency or "cls", compute
    )
    return (out, saliency.detach()) if return_saliency else out


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    scale: float | None,
    return_saliency: Saliency,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and saliency, every step rounded to the dtype ``compute``."""
    key, value = (_present(x, key_padding_mask) for x in (key, value))
    probs, lse = _weights(query, key, key_padding_mask, scale, compute)
    out = (probs @ value.to(compute)).to(query.dtype)
    rows = probs[:, :, :1] if return_saliency == "cls" else probs
    # Without a query, or a head, nothing is salient: 0 rather than the mean of nothing.
    count = max(rows.shape[1] * rows.shape[2], 1)
    saliency = rows.to(torch.promote_types(compute, torch.float32)).sum((1, 2)) / count
    return out, lse, saliency


def attend_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in fp32, in closed form.

    For where autograd cannot go: a kernel runs below it.
    """
    k, v = (_present(x, key_padding_mask).float() for x in (key, value))
    q, grad = query.float(), grad_out.float()
    probs, _ = _weights(q, k, key_padding_mask, scale, torch.float32)
    grad_probs = grad @ v.mT
    grad_logits = probs * (grad_probs - (probs * grad_probs).sum(-1, keepdim=True))
    return scale * (grad_logits @ k), scale * (grad_logits.mT @ q), probs.mT @ grad


def _present(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Zero what is ignored, so that not even NaN leaks out of it."""
    if key_padding_mask is None:
        return x
    return x.masked_fill(key_padding_mask[:, None, :, None], 0.0)


def _weights(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    scale: float | None,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attention weights (batch, heads, queries, keys) and log-sum-exp."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query.to(compute) @ key.to(compute).mT) * scale
    if key.shape[2] == 0:
        return logits, logits.new_full(logits.shape[:-1], float("-inf"))
    if key_padding_mask is None:
        return logits.softmax(-1), logits.logsumexp(-1)
    ignored = key_padding_mask[:, None, None, :]
    none = ignored.all(-1, keepdim=True)
    # Rows without a key keep finite logits, so that neither they nor their gradients become NaN.
    logits = logits.masked_fill(ignored, float("-inf")).masked_fill(none, 0.0)
    lse = logits.logsumexp(-1).masked_fill(none.squeeze(-1), float("-inf"))
    return logits.softmax(-1) * ~none, lse

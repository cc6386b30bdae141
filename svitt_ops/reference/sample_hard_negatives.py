"""Hard negatives in plain PyTorch, with the whole similarity matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from svitt_ops.reference.info_nce import finite_logits, positives


def sample_hard_negatives(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor,
    uniform: Tensor,
    *,
    ids: Tensor | None = None,
) -> Tensor:
    """One negative a query; see `svitt_ops.sample_hard_negatives`, which draws ``uniform``."""
    logits = finite_logits(query @ key.T, temperature)
    same = positives(ids, ids, 0, logits.shape, logits.device)
    return choose(logits, same, uniform)


def choose(logits: Tensor, same: Tensor, uniform: Tensor) -> Tensor:
    """The first key at which the cumulative weight of the negatives passes a share of their sum."""
    if logits.numel() == 0:
        return logits.new_zeros(logits.shape[0], dtype=torch.int64)
    negatives = logits.masked_fill(same | logits.isnan(), float("-inf"))
    most = negatives.amax(1, keepdim=True)
    weights = (negatives - most.nan_to_num(neginf=0.0)).exp()
    reached = weights.cumsum(1)
    passed = (reached > uniform[:, None] * reached[:, -1:]) & (weights > 0)
    # Rounding may leave none passed: then the last that weighs anything.
    last = weights.shape[1] - 1 - (weights > 0).flip(1).int().argmax(1)
    found = torch.where(passed.any(1), passed.int().argmax(1), last)
    return torch.where((weights > 0).any(1), found, -1)

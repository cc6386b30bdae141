"""The pairwise sigmoid loss in plain PyTorch, with the whole logit matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svitt_ops.reference.info_nce import LOGIT_LIMIT, finite_logits, positives


def sigmoid_nce(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor,
    bias: float | Tensor,
    *,
    ids: Tensor | None = None,
) -> Tensor:
    """The sigmoid loss; see `svitt_ops.sigmoid_nce`. Differentiable; keeps B x B logits."""
    logits = biased_logits(query @ key.T, temperature, bias)
    same = positives(ids, ids, 0, logits.shape, query.device)
    # softplus(-x) in its exact form: F.softplus drops its tail from 20 on.
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum(1).mean()


def biased_logits(dots: Tensor, temperature: float | Tensor, bias: float | Tensor) -> Tensor:
    """`finite_logits` plus the bias; NaN where that is `LOGIT_LIMIT` or more, infinite or NaN."""
    usable = torch.as_tensor(bias, device=dots.device).abs() < LOGIT_LIMIT
    return torch.where(usable, finite_logits(dots, temperature) + bias, float("nan"))


def sums(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    bias: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    first_row: int,
) -> tuple[Tensor, ...]:
    """The loss of some rows of a batch, as their part of its mean, and the gradients of that part
    to query, key, temperature and bias.
    """
    dots, scale, mean = query @ key.T, 1 / temperature, 1 / key.shape[0]
    logits = biased_logits(dots, temperature, bias)
    same = positives(query_ids, key_ids, first_row, dots.shape, query.device)
    loss = -F.logsigmoid(torch.where(same, logits, -logits)).sum() * mean
    weights = torch.where(same, -torch.sigmoid(-logits), torch.sigmoid(logits)) * mean
    grad_temperature = -(weights * dots).sum() * scale * scale
    by_dots = weights * scale
    return loss, by_dots @ key, by_dots.T @ query, grad_temperature, weights.sum()

"""InfoNCE in plain PyTorch, with the whole logit matrix: the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

LOGIT_LIMIT = 1e9
"""A logit of this size has no digits left behind the point in fp32: it is no number to learn from,
nor are infinities and NaN."""


def info_nce(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor,
    *,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    symmetric: bool = True,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The contrastive loss; see `svitt_ops.info_nce`. Differentiable; keeps B x B logits."""
    logits = finite_logits(query @ key.T, temperature)
    same = positives(ids, ids, 0, logits.shape, query.device)
    loss = _cross_entropy(logits, same, weights, label_smoothing)
    if symmetric:
        loss = (loss + _cross_entropy(logits.T, same.T, weights, label_smoothing)) / 2
    return loss


def finite_logits(dots: Tensor, temperature: float | Tensor) -> Tensor:
    """``dots / temperature``; NaN where that is `LOGIT_LIMIT` or more, infinite or NaN, and
    everywhere unless the temperature is positive and finite: no softmax makes a number of it.
    """
    usable = (dots.abs() < LOGIT_LIMIT * temperature) & (temperature < float("inf"))
    return torch.where(usable, dots / temperature, float("nan"))


def positives(
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    first_row: int,
    shape: tuple[int, ...] | torch.Size,
    device: torch.device,
) -> Tensor:
    """Which keys are positives of which queries, bool ``(queries, keys)``."""
    if query_ids is not None and key_ids is not None:
        return query_ids[:, None] == key_ids[None, :]
    rows = torch.arange(first_row, first_row + shape[0], device=device)
    return rows[:, None] == torch.arange(shape[1], device=device)[None, :]


def _cross_entropy(
    logits: Tensor, same: Tensor, weights: Tensor | None, label_smoothing: float
) -> Tensor:
    if weights is not None:
        same = same * weights.to(torch.promote_types(logits.dtype, torch.float32))
    targets = same / same.sum(1, keepdim=True)
    targets = (1 - label_smoothing) * targets + label_smoothing / logits.shape[1]
    return -(targets.to(logits.dtype) * logits.log_softmax(1)).sum(1).mean()


def statistics(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    query_weights: Tensor | None,
    key_weights: Tensor | None,
    first_row: int,
) -> tuple[Tensor, Tensor]:
    """What the loss is made of, ``(6, queries)`` and ``(6, keys)``; see `svitt_ops.info_nce`."""
    dots = query @ key.T
    same = positives(query_ids, key_ids, first_row, dots.shape, query.device)
    logits = finite_logits(dots, temperature)
    infinity = float("inf")
    # All of them NaN if a logit is, or a row without targets: so are the loss and every gradient.
    targets = _weighted(same, 1, key_weights, dots.dtype).sum(1)
    poison = (logits * 0).sum() + (0 / targets).sum()

    def along(dim: int, weights: Tensor | None) -> Tensor:
        weighted = _weighted(same, dim, weights, dots.dtype)
        return poison + torch.stack(
            [
                logits.masked_fill(same, -infinity).logsumexp(dim),
                logits.masked_fill(~same, -infinity).logsumexp(dim),
                same.sum(dim).to(dots.dtype),
                torch.where(same, weighted * dots, 0).sum(dim),
                dots.sum(dim),
                weighted.sum(dim),
            ]
        )

    return along(1, key_weights), along(0, query_weights)


def _weighted(same: Tensor, dim: int, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weights of the positives along a dimension, by default 1; of all else 0."""
    if weights is None:
        return same.to(dtype)
    return same * weights.to(dtype).unsqueeze(1 - dim)


def gradients(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    query_weights: Tensor | None,
    key_weights: Tensor | None,
    first_row: int,
    rows: Tensor,
    columns: Tensor | None,
    label_smoothing: float,
    factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and temperature of ``factor`` times the summed row losses.

    ``columns`` None leaves out the other direction.
    """
    dots, scale = query @ key.T, 1 / temperature
    same = positives(query_ids, key_ids, first_row, dots.shape, query.device)

    def residual(stats: Tensor, dim: int, weights: Tensor | None, choices: int) -> Tensor:
        """Softmax less target; positives from the negatives' share, so that nothing cancels."""
        negative, positive = (x.unsqueeze(dim) for x in stats[:2])
        weighted, weight = _weighted(same, dim, weights, dots.dtype), stats[5].unsqueeze(dim)
        total = torch.logaddexp(negative, positive)
        share, lost = (positive - total).exp(), (negative - total).exp()
        among = (dots * scale - positive).exp()
        kept = share * (among - weighted / weight) - lost * weighted / weight
        smooth = label_smoothing * (weighted / weight - 1 / choices)
        return torch.where(same, kept, (dots * scale - total).exp()) + smooth

    grad = residual(rows, 1, key_weights, key.shape[0])
    if columns is not None:
        # The other direction chooses among all queries, of which these may be a part.
        grad = grad + residual(columns, 0, query_weights, key.shape[0])
    grad = grad * factor
    grad_scale = (grad * dots).sum()
    return grad @ key * scale, grad.T @ query * scale, -grad_scale * scale * scale

"""InfoNCE against a batch and a queue in plain PyTorch, with the whole logit matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from svitt_ops.reference.info_nce import finite_logits, positives


def queue_info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float | Tensor,
    *,
    teacher_query: Tensor | None = None,
    alpha: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> Tensor:
    """The contrastive loss; see `svitt_ops.queue_info_nce`. Keeps B x (B + Q) logits."""
    candidates = torch.cat([key, queue]).detach()
    same = among_candidates(query, key, queue, query_ids, key_ids, queue_ids)
    targets = (1 - alpha) * (same / same.sum(1, keepdim=True).clamp(min=1)).to(query.dtype)
    if teacher_query is not None and alpha > 0:
        with torch.no_grad():
            targets = targets + alpha * finite_logits(
                teacher_query @ candidates.T, temperature
            ).softmax(1)
    logits = finite_logits(query @ candidates.T, temperature)
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def among_candidates(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    queue_ids: Tensor | None,
) -> Tensor:
    """Which candidates are positives of which queries, bool ``(B, B + Q)``."""
    key_ids = query_ids if key_ids is None else key_ids
    shape = (query.shape[0], key.shape[0])
    same = positives(query_ids, key_ids, 0, shape, query.device)
    old = torch.zeros(shape[0], queue.shape[0], dtype=torch.bool, device=query.device)
    if queue_ids is not None:
        old = positives(query_ids, queue_ids, 0, old.shape, query.device)
    return torch.cat([same, old], 1)


def gradients(
    query: Tensor,
    candidates: Tensor,
    temperature: Tensor,
    teacher_query: Tensor | None,
    alpha: float,
    same: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the loss to query and temperature; ``same`` tells the positives."""
    dots = query @ candidates.T
    count = same.sum(1, keepdim=True)
    hard = (count > 0).to(dots.dtype) * (1 - alpha)
    weights = -hard * same / count.clamp(min=1)
    single = torch.zeros_like(weights)  # weight of an only positive, from the negatives' shares

    def add(logits: Tensor, factor: Tensor | float) -> None:
        share = logits.softmax(1)
        weights.add_(factor * share)
        single.sub_(factor * share.masked_fill(same, 0).sum(1, keepdim=True))

    add(finite_logits(dots, temperature), hard + alpha)
    if teacher_query is not None and alpha > 0:
        add(finite_logits(teacher_query @ candidates.T, temperature), -alpha)
    weights = torch.where(same & (count == 1), single, weights) / query.shape[0]
    return weights @ candidates / temperature, -(weights * dots).sum() / temperature**2

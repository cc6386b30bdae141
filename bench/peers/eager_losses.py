"""Losses as ALBEF's code has them, which form the matrices of similarities and of targets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

import svitt_ops as so


def contrast_with_queue(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: Tensor,
    *,
    teacher_query: Tensor | None = None,
    alpha: float = 0.0,
    query_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> Tensor:
    """`svitt_ops.queue_info_nce`; arguments as of it."""
    candidates = torch.cat([key, queue]).T
    with torch.no_grad():
        if query_ids is None or queue_ids is None:
            same = torch.eye(len(query), candidates.shape[1], device=query.device)
        else:
            same = (query_ids[:, None] == torch.cat([query_ids, queue_ids])).float()
        targets = same / same.sum(1, keepdim=True)
        if teacher_query is not None:
            soft = (teacher_query @ candidates / temperature).softmax(1)
            targets = alpha * soft + (1 - alpha) * targets
    logits = query @ candidates / temperature
    return -(logits.log_softmax(1) * targets).sum(1).mean()


@torch.no_grad()
def draw_negatives(
    query: Tensor, key: Tensor, temperature: Tensor, *, ids: Tensor | None = None
) -> Tensor:
    """`svitt_ops.sample_hard_negatives` of rows that all have a negative; arguments as of it."""
    weights = (query @ key.T / temperature).softmax(1)
    if ids is None:
        ids = torch.arange(len(query), device=query.device)
    weights = weights.masked_fill(ids[:, None] == ids, 0)
    return torch.multinomial(weights.float(), 1)[:, 0]


@contextmanager
def losing_eagerly() -> Iterator[None]:
    """All models' contrastive losses and negatives by these functions."""
    with (
        patch.object(so, "queue_info_nce", contrast_with_queue),
        patch.object(so, "sample_hard_negatives", draw_negatives),
    ):
        yield

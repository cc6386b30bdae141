"""Mean average precision of binary codes, ranked by their Hamming distance."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 256
"""Queries that are ranked at a time."""


def average_precisions(
    query_codes: Tensor,
    query_labels: Tensor,
    database_codes: Tensor,
    database_labels: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Average precision of each query within its first candidates.

    Codes are 1 where a number is at least 0, else -1. Candidates come by descending product of
    codes, equal ones in the order of the database. Relevant is what shares a label:
    ``AP = sum_r precision@r relevant_r / sum_r relevant_r`` over the first ``top_k``, 0 where
    nothing there is relevant.

    Args:
        query_codes: floating ``(queries, bits)``.
        query_labels: ``(queries, classes)``, 1 at the classes of each.
        database_codes: ``(database, bits)``.
        database_labels: ``(database, classes)``.
        top_k: 1 to the size of the database.

    Returns:
        fp64 ``(counted,)``, and int64 ``(counted,)``, the numbers of the queries that have labels;
        the others are no part of the mean.

    Raises:
        ValueError: ``top_k`` is out of range.

    Source:
        CSQ (CVPR 2020), whose released code sorts in no stable order.
    """
    if not 1 <= top_k <= len(database_codes):
        raise ValueError(
            f"average precision: top_k must be 1 to {len(database_codes)}, the size of the"
            f" database, got {top_k}"
        )
    counted = (query_labels != 0).any(1).nonzero()[:, 0]
    database = signs(database_codes)
    places = torch.arange(1, top_k + 1, dtype=torch.float64, device=database.device)
    found = [places.new_empty(0)]
    for some in counted.split(CHUNK):
        order = (signs(query_codes[some]) @ database.T).argsort(dim=1, descending=True, stable=True)
        shared = query_labels[some].float() @ database_labels.float().T > 0
        relevant = shared.gather(1, order[:, :top_k]).double()
        precision = relevant.cumsum(1) / places
        found.append((precision * relevant).sum(1) / relevant.sum(1).clamp(min=1))
    return torch.cat(found), counted


def signs(codes: Tensor) -> Tensor:
    """fp32 1 where a number is at least 0, else -1."""
    return torch.where(codes >= 0, 1.0, -1.0)

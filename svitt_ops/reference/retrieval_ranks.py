"""Retrieval ranks in plain PyTorch, with the whole similarity matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from svitt_ops.reference.info_nce import positives


def retrieval_ranks(
    query: Tensor,
    key: Tensor,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> Tensor:
    """The rank of each query's best positive; see `svitt_ops.retrieval_ranks`."""
    if key.shape[0] == 0:
        return query.new_zeros(query.shape[0], dtype=torch.int64)
    # Rounded to fp32 once: equal keys then tie, whatever order a product adds up in.
    dots = (query.double() @ key.double().T).float()
    finite = dots.isfinite() & (query @ key.T).isfinite()  # in their own dtype on the way, too
    same = positives(query_ids, key_ids, 0, dots.shape, dots.device) & finite
    best = dots.masked_fill(~same, float("-inf")).amax(1, keepdim=True)
    ranks = ((dots > best) | ~finite).sum(1)
    return torch.where(same.any(1), ranks, key.shape[0])

"""`retrieval_ranks`: schema, validation and the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from svitt_ops import _flops, _library, _validation
from svitt_ops._ops import ops
from svitt_ops.reference.retrieval_ranks import retrieval_ranks as _reference

_OP = "retrieval_ranks"


def retrieval_ranks(
    query: Tensor,
    key: Tensor,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> Tensor:
    """Rank of each query's best positive among all keys, without the similarity matrix.

    ``rank_i = #{j : query_i . key_j > max over positives p of query_i . key_p}``, so 0 is a hit at
    the first place and recall at K is ``(rank < K).mean()``. Dot products accumulate in fp32.
    On a processor with AMX fp32 products are sums of bf16 ones, as exact for values of magnitudes
    1e-30 to 3.3e38.

    Keys that tie with the best positive do not count against it: embeddings that have all collapsed
    into one give rank 0 everywhere, which looks like 100 %. The metrics of
    `svitt_ops.training.tasks.retrieval` count ties against the query and give the last place there.

    A product that is NaN or infinite counts against the query, whether the key is a positive or
    not: the best positive is the best of those with a finite product.

    Args:
        query: embeddings ``(B, D)``, fp32, fp16 or bf16. Under autocast both take its dtype.
        key: ``(N, D)``. Without ids query i belongs to key i, and N is at least B.
        query_ids: int64 or int32 ``(B,)``; given exactly when ``key_ids`` is.
        key_ids: ``(N,)``. Every key with a query's id is a positive of it.

    Returns:
        int64 ``(B,)``; N for a query without a positive, or without a finite product with one.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Complexity:
        ``2 B N D`` FLOP; memory ``O((B + N) D)``.

    Source:
        The protocol of ALBEF and SViTT: the best of several positives counts.
    """
    query, key = _validation.autocast(query, key)
    _validation.check_embeddings(_OP, "query", query)
    _validation.check_embeddings(_OP, "key", key, query)
    _validation.check_both(_OP, "query_ids", query_ids, "key_ids", key_ids)
    if query_ids is not None and key_ids is not None:
        query_ids = _validation.check_ids(_OP, "query_ids", query_ids, query.shape[0], query.device)
        key_ids = _validation.check_ids(_OP, "key_ids", key_ids, key.shape[0], query.device)
    elif key.shape[0] < query.shape[0]:
        raise ValueError(
            f"{_OP}: key must have at least {query.shape[0]} rows, one for each query, "
            f"got {key.shape[0]}"
        )
    query, key = (_validation.unit_stride(x.detach()) for x in (query, key))
    ranks: Tensor = ops.retrieval_ranks(query, key, query_ids, key_ids)
    return ranks


def _fake(query: Tensor, key: Tensor, query_ids: Tensor | None, key_ids: Tensor | None) -> Tensor:
    return query.new_empty(query.shape[0], dtype=torch.int64)


def _cpu(query: Tensor, key: Tensor, query_ids: Tensor | None, key_ids: Tensor | None) -> Tensor:
    return _reference(query.float(), key.float(), query_ids=query_ids, key_ids=key_ids)


_library.define(
    f"{_OP}(Tensor query, Tensor key, Tensor? query_ids, Tensor? key_ids) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    cuda_module=_OP,
)
_flops.register(_OP, lambda *args: 2 * args[0].shape[0] * args[1].shape[0] * args[0].shape[1])

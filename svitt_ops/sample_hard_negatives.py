"""`sample_hard_negatives`: schema, validation and the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from svitt_ops import _flops, _library, _validation
from svitt_ops._ops import ops
from svitt_ops.randomness import rand
from svitt_ops.reference.info_nce import finite_logits, positives
from svitt_ops.reference.sample_hard_negatives import choose

_OP = "sample_hard_negatives"


def sample_hard_negatives(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor,
    *,
    ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One negative for each query, drawn from the softmax over its negatives.

    ``P(j | i) = exp(query_i . key_j / temperature) / sum`` over the keys that are no positives of
    query i. One uniform number a query picks the first key at which the cumulative weight passes
    that share of the sum: an exact sample, without the matrix of similarities, and nothing is read
    on the host. The same numbers give the same indices on every run.

    Args:
        query: L2-normalised embeddings ``(B, D)``, fp32, fp16 or bf16. Under autocast query and key
            take the autocast dtype.
        key: like ``query``; row i belongs to row i of ``query``.
        temperature: a positive float, or a tensor of one element.
        ids: int64 or int32 ``(B,)``; rows with equal ids are positives of each other. By default
            each row has its own.
        generator: of the random numbers, on the device of ``query``; torch's default one if None.

    Returns:
        int64 ``(B,)``, indices of keys. Without gradient. A key is never drawn where its logit is
        NaN, infinite or beyond 1e9, which leaves fp32 no digits; -1 for a query without any other
        negative, and for all where the temperature is not positive and finite.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Complexity:
        ``2 B B D`` FLOP; memory ``O(B D)``.

    Source:
        ALBEF (NeurIPS 2021), section 3.2: in-batch hard negatives of image-text matching.
    """
    query, key = _validation.autocast(query, key)
    _validation.check_embeddings(_OP, "query", query)
    _validation.check_embeddings(_OP, "key", key, query, paired=True)
    temperature = _validation.check_temperature(_OP, temperature, query).detach()
    if ids is not None:
        ids = _validation.check_ids(_OP, "ids", ids, query.shape[0], query.device)
    _validation.check_generator(_OP, generator)
    if generator is not None and generator.device.type != query.device.type:
        raise ValueError(f"{_OP}: generator must be on {query.device}, got {generator.device}")
    uniform = rand(query.shape[:1], generator, query.device, torch.float64)
    query, key = (_validation.unit_stride(x.detach()) for x in (query, key))
    found: Tensor = ops.sample_hard_negatives(query, key, temperature, ids, ids, uniform)
    return found


def _fake(query: Tensor, *args: object) -> Tensor:
    return query.new_empty(query.shape[0], dtype=torch.int64)


def _cpu(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    uniform: Tensor,
) -> Tensor:
    logits = finite_logits(query.double() @ key.double().T, temperature.double())
    same = positives(query_ids, key_ids, 0, logits.shape, query.device)
    return choose(logits, same, uniform)


_library.define(
    f"{_OP}(Tensor query, Tensor key, Tensor temperature, Tensor? query_ids, Tensor? key_ids, "
    "Tensor uniform) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    cuda_module=_OP,
)
_flops.register(_OP, lambda *args: 2 * args[0].shape[0] * args[1].shape[0] * args[0].shape[1])

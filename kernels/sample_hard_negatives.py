"""Hard negatives: one key a query from the softmax over its negatives, by one uniform number.

Tiling. A program owns `ROWS` queries and walks the keys twice in tiles of `COLUMNS`: for maximum
and sum of the weights, then for the first key at which their running sum passes the uniform share
of it.

Work and traffic: 4 B B D FLOP; keys are read twice per program, from L2 where they fit it.

Numerics. Dot products accumulate in fp32 (fp32 inputs without TF32), weights are relative to the
row's maximum. Positives weigh nothing and can not be chosen, however sums are rounded.

Source: ALBEF (Li et al., 2021), section 3.2; sampling by inversion of the distribution.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .contrast_walk import _products, _rows
from .info_nce import _limit, _same
from .tiles import cdiv, contrast_tile, device_arch, on_device


@triton.jit
def _join(most, total, logits):
    """An online log-sum-exp takes in the logits of a tile."""
    now = tl.maximum(most, tl.max(logits, axis=1))
    offset = tl.where(now == -float("inf"), 0.0, now)
    total = total * tl.exp(most - offset)
    return now, total + tl.sum(tl.exp(logits - offset[:, None]), axis=1)


@triton.jit
def _negatives(
    left, query_ptr, key_ptr, ids_ptr, a, start, count, query_step, key_step, dim, scale, limit,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Keys of a tile; logits, -inf where one is a positive, does not exist or has no logit."""
    b = start + tl.arange(0, COLUMNS)
    right = b
    if WHOLE:
        right = _rows(key_ptr, b, count, key_step, tl.arange(0, CHUNK), dim, EVEN)
    x = _products(
        left, right, query_ptr, key_ptr, a, b, count, count, query_step, key_step, dim,
        CHUNK, WHOLE, EVEN,
    )  # fmt: skip
    same = _same(ids_ptr, ids_ptr, a, b, count, count, 0)
    choice = (b < count)[None, :] & (same == 0) & (tl.abs(x) < limit)
    return b, tl.where(choice, x * scale, -float("inf"))


@triton.jit(do_not_specialize=["count"])
def _sample_kernel(
    query_ptr, key_ptr, temperature_ptr, ids_ptr, uniform_ptr, out_ptr,
    count, query_step, key_step, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Samples for some queries."""
    a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    left = a
    if WHOLE:
        left = _rows(query_ptr, a, count, query_step, tl.arange(0, CHUNK), dim, EVEN)
    temperature = tl.load(temperature_ptr)
    scale, limit = 1.0 / temperature, _limit(temperature)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, count, COLUMNS):
        _, logits = _negatives(
            left, query_ptr, key_ptr, ids_ptr, a, start, count, query_step, key_step, dim, scale,
            limit, COLUMNS, CHUNK, WHOLE, EVEN,
        )  # fmt: skip
        most, total = _join(most, total, logits)
    offset = tl.where(most == -float("inf"), 0.0, most)
    share = tl.load(uniform_ptr + a, mask=a < count, other=0.0)
    target = (share * total.to(tl.float64)).to(tl.float32)
    none = 2147483647
    before = tl.zeros([ROWS], tl.float32)
    found = tl.full([ROWS], none, tl.int32)
    last = tl.full([ROWS], -1, tl.int32)
    for start in range(0, count, COLUMNS):
        b, logits = _negatives(
            left, query_ptr, key_ptr, ids_ptr, a, start, count, query_step, key_step, dim, scale,
            limit, COLUMNS, CHUNK, WHOLE, EVEN,
        )  # fmt: skip
        weights = tl.exp(logits - offset[:, None])
        reached = before[:, None] + tl.cumsum(weights, axis=1)
        passed = (reached > target[:, None]) & (weights > 0)
        found = tl.minimum(found, tl.min(tl.where(passed, b[None, :], none), axis=1))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, b[None, :], -1), axis=1))
        before += tl.sum(weights, axis=1)
    # Rounding may leave none passed: then the last that weighs anything.
    found = tl.where(found == none, last, found)
    tl.store(out_ptr + a, found.to(tl.int64), mask=a < count)


def sample_hard_negatives(
    query: torch.Tensor,
    key: torch.Tensor,
    temperature: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Launch the sampling; see the schema in `svitt_ops.sample_hard_negatives`."""
    count, dim = query.shape
    found = query.new_empty(count, dtype=torch.int64)
    if count == 0:
        return found
    tile = contrast_tile("sample", dim, count, query.dtype, device_arch(query.device))
    with on_device(query):
        _sample_kernel[(cdiv(count, tile.rows),)](
            query, key, temperature, query_ids, uniform, found,
            count, query.stride(0), key.stride(0), dim,
            ROWS=tile.rows, COLUMNS=tile.columns, **tile.dims(dim), **tile.options,
        )  # fmt: skip
    return found

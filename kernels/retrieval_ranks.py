"""Retrieval ranks: how many keys beat the best positive, without the similarity matrix.

Tiling. A program owns `ROWS` queries and one of the splits of the keys, which it walks in tiles of
`COLUMNS`, the whole ones without masks. Without ids each program finds the best positive by itself,
in the one or two tiles that can hold it; with ids a launch before finds it, split by split. A sum
over the splits follows.
A tile's dot products come from the same instructions wherever they are computed, so that a key
equal to the positive ties with it exactly.

Work and traffic: 2 B N D FLOP, twice that with ids; keys are read once or twice per program, from
L2 where they fit it. Numerics: dot products accumulate in fp32, fp32 inputs without TF32. No
atomics.

Source: the retrieval protocol of ALBEF (Li et al., 2021).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .contrast_walk import _products, _rows, lanes, tile_rows
from .info_nce import _same
from .tiles import cdiv, contrast_tile, device_arch, on_device


@triton.jit
def _best_of(
    best, left, start, query_ptr, key_ptr, query_ids_ptr, key_ids_ptr, a, a_count, b_count,
    query_step, key_step, dim, MASKED: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The largest finite product with a positive of a tile, or what was found before.

    Without MASKED all keys of the tile exist, and positives are told by ids.
    """
    b = start + tl.arange(0, COLUMNS)
    right = b
    if WHOLE:
        right = tile_rows(
            key_ptr, start, b_count, key_step, tl.arange(0, CHUNK), dim, COLUMNS, MASKED, EVEN
        )
    x = _products(
        left, right, query_ptr, key_ptr, a, b, a_count, b_count, query_step, key_step, dim,
        CHUNK, WHOLE, EVEN,
    )  # fmt: skip
    if MASKED:
        same = _same(query_ids_ptr, key_ids_ptr, a, b, a_count, b_count, 0)
    else:
        a_ids = tl.load(query_ids_ptr + tl.minimum(a, a_count - 1))
        same = a_ids[:, None] == tl.load(key_ids_ptr + b)[None, :]
    same = same & (tl.abs(x) < float("inf"))
    return tl.maximum(best, tl.max(tl.where(same, x, -float("inf")), axis=1))


@triton.jit
def _beaten(
    beaten, best, begin, end, left, query_ptr, key_ptr, a, a_count, b_count, query_step, key_step,
    dim, MASKED: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Adds how many of some keys do not beat the best positive; without MASKED all tiles are full.

    (ROWS, 8): a thread adds up what it holds.
    """
    for start in range(begin, end, COLUMNS):
        b = start + tl.arange(0, COLUMNS)
        right = b
        if WHOLE:
            right = tile_rows(
                key_ptr, start, b_count, key_step, tl.arange(0, CHUNK), dim, COLUMNS, MASKED, EVEN
            )
        x = _products(
            left, right, query_ptr, key_ptr, a, b, a_count, b_count, query_step, key_step, dim,
            CHUNK, WHOLE, EVEN,
        )  # fmt: skip
        # What is no number counts against the query.
        lower = (x <= best[:, None]) & (x > -float("inf"))
        if MASKED:
            lower = lower & (b < b_count)[None, :]
        beaten += tl.sum(lanes(lower.to(tl.int32), 8), axis=1)
    return beaten


@triton.jit(do_not_specialize=["a_count", "b_count", "each", "splits"])
def _ranks_kernel(
    query_ptr, key_ptr, query_ids_ptr, key_ids_ptr, best_ptr, out_ptr,
    a_count, b_count, each, splits, query_step, key_step, dim,
    SEARCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Of some queries and one split of the keys, how many beat the best positive.

    SEARCH: the best positive among them instead, for ids.
    """
    first = tl.program_id(0) * ROWS
    a = first + tl.arange(0, ROWS)
    split = tl.program_id(1)
    begin = split * each * COLUMNS
    end = tl.minimum(begin + each * COLUMNS, b_count)
    whole = tl.maximum(begin, tl.minimum(end, b_count // COLUMNS * COLUMNS))
    to = split * a_count.to(tl.int64) + a
    left = a
    if WHOLE:
        left = _rows(query_ptr, a, a_count, query_step, tl.arange(0, CHUNK), dim, EVEN)
    best = tl.full([ROWS], -float("inf"), tl.float32)
    if query_ids_ptr is None:
        for start in range(first // COLUMNS * COLUMNS, tl.minimum(first + ROWS, b_count), COLUMNS):
            best = _best_of(
                best, left, start, query_ptr, key_ptr, query_ids_ptr, key_ids_ptr, a, a_count,
                b_count, query_step, key_step, dim, True, COLUMNS, CHUNK, WHOLE, EVEN,
            )  # fmt: skip
    elif SEARCH:
        for start in range(begin, whole, COLUMNS):
            best = _best_of(
                best, left, start, query_ptr, key_ptr, query_ids_ptr, key_ids_ptr, a, a_count,
                b_count, query_step, key_step, dim, False, COLUMNS, CHUNK, WHOLE, EVEN,
            )  # fmt: skip
        if whole < end:
            best = _best_of(
                best, left, whole, query_ptr, key_ptr, query_ids_ptr, key_ids_ptr, a, a_count,
                b_count, query_step, key_step, dim, True, COLUMNS, CHUNK, WHOLE, EVEN,
            )  # fmt: skip
        tl.store(best_ptr + to, best, mask=a < a_count)
    else:
        for other in range(splits):
            at = best_ptr + other * a_count.to(tl.int64) + a
            best = tl.maximum(best, tl.load(at, mask=a < a_count, other=0.0))
    if not SEARCH:
        beaten = tl.zeros([ROWS, 8], tl.int32)
        beaten = _beaten(
            beaten, best, begin, whole, left, query_ptr, key_ptr, a, a_count, b_count, query_step,
            key_step, dim, False, COLUMNS, CHUNK, WHOLE, EVEN,
        )  # fmt: skip
        beaten = _beaten(
            beaten, best, whole, end, left, query_ptr, key_ptr, a, a_count, b_count, query_step,
            key_step, dim, True, COLUMNS, CHUNK, WHOLE, EVEN,
        )  # fmt: skip
        above = tl.maximum(end - begin, 0) - tl.sum(beaten, axis=1)
        tl.store(out_ptr + to, above, mask=a < a_count)


def retrieval_ranks(
    query: torch.Tensor,
    key: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the ranks; see the schema in `svitt_ops.retrieval_ranks`."""
    (queries, dim), keys = query.shape, key.shape[0]
    if queries == 0 or keys == 0:
        return query.new_zeros(queries, dtype=torch.int64)
    tile = contrast_tile("ranks", dim, queries, query.dtype, device_arch(query.device))
    blocks = cdiv(queries, tile.rows)
    splits, each = tile.splits(blocks, keys)
    above = query.new_empty(splits, queries, dtype=torch.int32)
    best = None
    if query_ids is not None:
        best = query.new_empty(splits, queries, dtype=torch.float32)
    with on_device(query):
        for search in (False,) if best is None else (True, False):
            _ranks_kernel[(blocks, splits)](
                query, key, query_ids, key_ids, best, above, queries, keys, each, splits,
                query.stride(0), key.stride(0), dim, SEARCH=search, ROWS=tile.rows,
                COLUMNS=tile.columns, **tile.dims(dim), **tile.options,
            )  # fmt: skip
        return above.sum(0)

"""InfoNCE: log-sum-exp statistics and gradients of similarities that are never written.

Tiling. A program owns `ROWS` queries and walks keys in tiles of `COLUMNS`, or the other way round:
the second axis of the grid is the direction, so one launch computes both. Where that makes too few
programs, the third axis splits the other side, and what the splits found is put together in their
order. Up to `CHUNK` dims a program holds its rows whole and reads the other side's tiles once;
beyond, dot products are summed chunk by chunk. The backward recomputes them and multiplies the
weights with `SLICE` dims of the other side; where D is larger, each slice recomputes. What belongs
to pairs alone (masks, positives) is computed in the tiles on the diagonal and at the edge; with ids
in all. Forward: the walk, the losses, their mean. Backward: the statistics as fp32, the walk, a sum
of the splits and of the temperature's parts.

Work and traffic, U = 2 B B D: 2 U forward, 4 U backward for D of one slice (4 U in all would be the
least that a matrix which is not kept allows). A tile of COLUMNS rows is read once per program, from
L2 while both sides fit it: 2 B B D e / ROWS bytes a direction. Results are O(B D).

Numerics. Dot products accumulate in fp32 (fp32 inputs without TF32), 1 / temperature multiplies
differences of them in fp32. Maxima are followed online, positives are summed apart from the
negatives and get their weight from the negatives' share. Statistics are fp64, added up from fp32
parts: a rounded log-sum-exp would cost digits at low temperatures. No atomics: a rerun is bitwise
identical.

Source: CLIP (Radford et al., 2021), figure 3; FlashAttention (Dao et al., 2022) for the sweep.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .contrast_walk import LOWEST, _by_thread, _diagonal, _join, _of_row, _products_of, _take
from .tiles import (
    ContrastPass,
    cdiv,
    contrast_tile,
    device_arch,
    launch_options,
    next_pow2,
    on_device,
)

STATISTICS = 6
PARTS = tl.constexpr(8)
"""What a split knows of a row: the largest similarity of a negative and the sum of exponentials
relative to it, the same of the positives, number and weighted sum of the positives, sum of all,
sum of the positives' weights."""
LOG2_E = tl.constexpr(1.4426950408889634)
_SIZES = ["a_count", "b_count"]
LOGIT_LIMIT = tl.constexpr(1e9)  # as in the reference


@triton.jit
def _limit(temperature):
    """Similarities of this size or more are no logits; at a temperature that is none, none are."""
    usable = (temperature > 0) & (temperature < float("inf"))
    return tl.where(usable, LOGIT_LIMIT * temperature, -1.0)


@triton.jit
def _same(a_ids_ptr, b_ids_ptr, a, b, a_count, b_count, shift):
    """Which b that exist are positives of which a: equal ids or, without ids, b = a + shift."""
    if a_ids_ptr is None:
        same = (a + shift)[:, None] == b[None, :]
    else:
        a_ids = tl.load(a_ids_ptr + tl.minimum(a, a_count - 1))
        b_ids = tl.load(b_ids_ptr + tl.minimum(b, b_count - 1))
        same = a_ids[:, None] == b_ids[None, :]
    return same & (b < b_count)[None, :]


@triton.jit
def _take_in(top, total, every, size, x, rivals, rate):
    """The sums over all similarities take in a tile's by thread."""
    top, total = _join(top, total, rivals, rate)
    return top, total, every + tl.sum(x, axis=2), tl.maximum(size, tl.max(tl.abs(x), axis=2))


@triton.jit
def _positives_by_ids(
    top, total, count, pairs, weights, x, a_ids, b_ids_ptr, b_weights_ptr, b, exists, rate,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """The sums over positives take in a tile's; also its negatives. `exists` is None if all do."""
    infinity = float("inf")
    same = a_ids[:, None] == tl.load(b_ids_ptr + b)[None, :]
    others = same == 0
    if exists is not None:
        same = same & exists[None, :]
        others = others & exists[None, :]
    if tl.max(same.to(tl.int32)) != 0:
        own = _by_thread(tl.where(same, x, -infinity), SINGLE)
        top, total = _join(top, total, own, rate)
        count += tl.sum(_by_thread(same.to(tl.float32), SINGLE), axis=2)
        own = x
        if b_weights_ptr is not None:
            weight = tl.load(b_weights_ptr + b)[None, :]
            weights += tl.sum(_by_thread(tl.where(same, weight, 0.0), SINGLE), axis=2)
            own = x * weight
        pairs += tl.sum(_by_thread(tl.where(same, own, 0.0), SINGLE), axis=2)
    rivals = _by_thread(tl.where(others, x, -infinity), SINGLE)
    return top, total, count, pairs, weights, rivals


@triton.jit
def _sweep(
    a_ptr, b_ptr, a_ids_ptr, b_ids_ptr, b_weights_ptr, parts_ptr, scale, limit, shift,
    a_count, b_count, each, a_step, b_step, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Sums of some rows of a over one split of the rows of b."""
    first = tl.program_id(0) * ROWS
    row, column, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, CHUNK)
    a = first + row
    infinity = float("inf")
    rate = scale * LOG2_E
    SINGLE: tl.constexpr = a_ptr.dtype.element_ty == tl.float32
    IDS: tl.constexpr = a_ids_ptr is not None
    zeros = tl.sum(_by_thread(tl.zeros([ROWS, COLUMNS], tl.float32), SINGLE), axis=2)
    top = zeros + LOWEST
    total = zeros
    every = zeros
    size = zeros
    positive_top = top
    positive_total = zeros
    count = zeros
    pairs = zeros
    weights = zeros
    # Offsets inside a tile fit 32 bits: an address is one sum.
    a_ptr += first.to(tl.int64) * a_step
    a_at = tl.minimum(row, a_count - 1 - first)[:, None] * a_step + d[None, :]
    b_at = column[:, None] * b_step + d[None, :]
    left = a
    if WHOLE:
        left = _take(a_ptr, a_at, None, d, dim, EVEN)
    begin = tl.program_id(2) * each
    end = tl.minimum(begin + each, tl.cdiv(b_count, COLUMNS))
    full = tl.minimum(end, b_count // COLUMNS)
    low, diagonal = _diagonal(first, shift, begin, full, ROWS, COLUMNS)
    if IDS:
        a_ids = tl.load(a_ids_ptr + tl.minimum(a, a_count - 1))
        if full < end:
            b = full * COLUMNS + column
            exists = b < b_count
            x = _products_of(
                left, a_ptr, a_at, b_ptr, b_at, full, exists, b_step, dim,
                COLUMNS, CHUNK, WHOLE, EVEN,
            )  # fmt: skip
            positive_top, positive_total, count, pairs, weights, rivals = _positives_by_ids(
                positive_top, positive_total, count, pairs, weights, x, a_ids, b_ids_ptr,
                b_weights_ptr, tl.minimum(b, b_count - 1), exists, rate, SINGLE,
            )  # fmt: skip
            x = _by_thread(x, SINGLE)
            top, total, every, size = _take_in(top, total, every, size, x, rivals, rate)
        for step in range(full - begin):
            tile = begin + step
            x = _products_of(
                left, a_ptr, a_at, b_ptr, b_at, tile, None, b_step, dim,
                COLUMNS, CHUNK, WHOLE, EVEN,
            )  # fmt: skip
            positive_top, positive_total, count, pairs, weights, rivals = _positives_by_ids(
                positive_top, positive_total, count, pairs, weights, x, a_ids, b_ids_ptr,
                b_weights_ptr, tile * COLUMNS + column, None, rate, SINGLE,
            )  # fmt: skip
            x = _by_thread(x, SINGLE)
            top, total, every, size = _take_in(top, total, every, size, x, rivals, rate)
    else:
        if full < end:
            b = full * COLUMNS + column
            exists = b < b_count
            # Similarities with columns that do not exist are 0.
            x = _products_of(
                left, a_ptr, a_at, b_ptr, b_at, full, exists, b_step, dim,
                COLUMNS, CHUNK, WHOLE, EVEN,
            )  # fmt: skip
            same = _same(a_ids_ptr, b_ids_ptr, a, b, a_count, b_count, shift)
            pairs += tl.sum(_by_thread(tl.where(same, x, 0.0), SINGLE), axis=2)
            rivals = _by_thread(tl.where(exists[None, :] & (same == 0), x, -infinity), SINGLE)
            x = _by_thread(x, SINGLE)
            top, total, every, size = _take_in(top, total, every, size, x, rivals, rate)
        for step in range(full - diagonal - begin):
            at = begin + step
            at = tl.where(at >= low, at + diagonal, at)
            x = _products_of(
                left, a_ptr, a_at, b_ptr, b_at, at, None, b_step, dim,
                COLUMNS, CHUNK, WHOLE, EVEN,
            )  # fmt: skip
            x = _by_thread(x, SINGLE)
            top, total, every, size = _take_in(top, total, every, size, x, x, rate)
        for step in range(diagonal):
            # Of tiles in a simple row, compilers would carry the addresses of each thread's loads.
            tile = tl.minimum(low + step, full - 1)
            x = _products_of(
                left, a_ptr, a_at, b_ptr, b_at, tile, None, b_step, dim,
                COLUMNS, CHUNK, WHOLE, EVEN,
            )  # fmt: skip
            same = (a + (shift - tile * COLUMNS))[:, None] == column[None, :]
            pairs += tl.sum(_by_thread(tl.where(same, x, 0.0), SINGLE), axis=2)
            rivals = _by_thread(tl.where(same, -infinity, x), SINGLE)
            x = _by_thread(x, SINGLE)
            top, total, every, size = _take_in(top, total, every, size, x, rivals, rate)
    row_pairs = tl.sum(pairs, axis=1)
    row_most, row_total = _of_row(top, total, rate)
    row_every = tl.where(tl.max(size, axis=1) < limit, tl.sum(every, axis=1), float("nan"))
    if IDS:
        row_count = tl.sum(count, axis=1)
        row_positive_most, row_positive_total = _of_row(positive_top, positive_total, rate)
    else:  # at most one positive
        b = a + shift
        found = (b >= begin * COLUMNS) & (b < tl.minimum(end * COLUMNS, b_count))
        row_count = found.to(tl.float32)
        row_positive_most = tl.where(found, row_pairs, -infinity)
        row_positive_total = row_count
    exists = a < a_count
    part = parts_ptr + PARTS * tl.program_id(2) * a_count.to(tl.int64) + a
    tl.store(part, row_most, mask=exists)
    tl.store(part + a_count, row_total, mask=exists)
    tl.store(part + 2 * a_count, row_positive_most, mask=exists)
    tl.store(part + 3 * a_count, row_positive_total, mask=exists)
    tl.store(part + 4 * a_count, row_count, mask=exists)
    tl.store(part + 5 * a_count, row_pairs, mask=exists)
    tl.store(part + 6 * a_count, row_every, mask=exists)
    if b_weights_ptr is not None:
        tl.store(part + 7 * a_count, tl.sum(weights, axis=1), mask=exists)


@triton.jit(do_not_specialize=["first_row", "row_each", "column_each", *_SIZES])
def _statistics_kernel(
    query_ptr, key_ptr, temperature_ptr, query_ids_ptr, key_ids_ptr, query_weights_ptr,
    key_weights_ptr, row_parts_ptr, column_parts_ptr, first_row, a_count, b_count, row_each,
    column_each, query_step, key_step, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Queries over keys, or on the second axis of the grid keys over queries."""
    temperature = tl.load(temperature_ptr)
    scale, limit = 1.0 / temperature, _limit(temperature)
    if tl.program_id(1) == 0:
        here = tl.program_id(2) * row_each * COLUMNS < b_count
        if (tl.program_id(0) * ROWS < a_count) & here:
            _sweep(
                query_ptr, key_ptr, query_ids_ptr, key_ids_ptr, key_weights_ptr, row_parts_ptr,
                scale, limit, first_row, a_count, b_count, row_each, query_step, key_step, dim,
                ROWS, COLUMNS, CHUNK, WHOLE, EVEN,
            )  # fmt: skip
    else:
        here = tl.program_id(2) * column_each * COLUMNS < a_count
        if (tl.program_id(0) * ROWS < b_count) & here:
            _sweep(
                key_ptr, query_ptr, key_ids_ptr, query_ids_ptr, query_weights_ptr,
                column_parts_ptr, scale, limit, -first_row, b_count, a_count, column_each,
                key_step, query_step, dim, ROWS, COLUMNS, CHUNK, WHOLE, EVEN,
            )  # fmt: skip


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1] to fp32's last digits, by the series of 2 artanh(e / (2 + e))."""
    z = e / (2.0 + e)
    s = z * z
    p = 1.0 / 15 * s + 1.0 / 13
    p = p * s + 1.0 / 11
    p = p * s + 1.0 / 9
    p = p * s + 1.0 / 7
    p = p * s + 1.0 / 5
    p = p * s + 1.0 / 3
    return 2.0 * z * (p * s + 1.0)


@triton.jit
def _merge(most, total, new_most, new_total, scale):
    """Two sums of exponentials, relative to their largest terms, as one."""
    now = tl.maximum(most, new_most)
    offset = tl.where(now == -float("inf"), 0.0, now)
    total = total * tl.exp((most - offset) * scale)
    return now, total + new_total * tl.exp((new_most - offset) * scale)


@triton.jit
def _log_sum(most, total, scale):
    """Log-sum-exp in fp64; -inf where nothing was summed."""
    kind = tl.float64
    product = tl.where(total == 0, -float("inf"), most.to(kind) * scale.to(kind))
    return product + tl.log(tl.where(total == 0, 1.0, total)).to(kind)


@triton.jit
def _row_losses(
    parts_ptr, stats_ptr, i, size, splits, choices, scale, label_smoothing, WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Statistics of some rows, put together from the splits; their summed losses, NaN if bad.

    The formula is `svitt_ops.info_nce.losses`.
    """
    here = i < size
    infinity = float("inf")
    most = tl.full([TILE], -infinity, tl.float32)
    positive_most = tl.full([TILE], -infinity, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    positive_total = tl.zeros([TILE], tl.float32)
    count = tl.zeros([TILE], tl.float32)
    weight = tl.zeros([TILE], tl.float32)
    pairs = tl.zeros([TILE], tl.float64)
    every = tl.zeros([TILE], tl.float64)
    for split in range(splits):
        part = parts_ptr + PARTS * split * size.to(tl.int64) + i
        new_most = tl.load(part, mask=here, other=0.0)
        new_total = tl.load(part + size, mask=here, other=0.0)
        most, total = _merge(most, total, new_most, new_total, scale)
        new_most = tl.load(part + 2 * size, mask=here, other=0.0)
        new_total = tl.load(part + 3 * size, mask=here, other=1.0)
        positive_most, positive_total = _merge(
            positive_most, positive_total, new_most, new_total, scale
        )
        count += tl.load(part + 4 * size, mask=here, other=1.0)
        pairs += tl.load(part + 5 * size, mask=here, other=0.0).to(tl.float64)
        every += tl.load(part + 6 * size, mask=here, other=0.0).to(tl.float64)
        if WEIGHTED:
            weight += tl.load(part + 7 * size, mask=here, other=1.0)
    negative = _log_sum(most, total, scale)
    positive = _log_sum(positive_most, positive_total, scale)
    stack = size.to(tl.int64)
    tl.store(stats_ptr + i, negative, mask=here)
    tl.store(stats_ptr + stack + i, positive, mask=here)
    tl.store(stats_ptr + 2 * stack + i, count.to(tl.float64), mask=here)
    tl.store(stats_ptr + 3 * stack + i, pairs, mask=here)
    tl.store(stats_ptr + 4 * stack + i, every, mask=here)
    if WEIGHTED:
        divisor = tl.where(weight > 0, weight, float("nan"))
    else:
        weight = count
        divisor = tl.maximum(count, 1.0)
    tl.store(stats_ptr + 5 * stack + i, weight.to(tl.float64), mask=here)
    gap = (negative - positive).to(tl.float32)
    found = tl.maximum(gap, 0.0) + _log1p(tl.exp(-tl.abs(gap)))
    same = pairs.to(tl.float32) / divisor
    spread = (positive - (same * scale).to(tl.float64)).to(tl.float32)
    found += tl.where(count != 1.0, spread, 0.0)
    found += label_smoothing * scale * (same - every.to(tl.float32) / choices)
    bad = tl.sum(tl.where(here, (every + divisor.to(tl.float64)) * 0.0, 0.0), axis=0)
    return tl.sum(tl.where(here, found, 0.0), axis=0), bad


@triton.jit(do_not_specialize=["num_rows", "num_columns", "row_splits", "column_splits"])
def _loss_kernel(
    row_parts_ptr, column_parts_ptr, rows_ptr, columns_ptr, temperature_ptr, sums_ptr,
    num_rows, num_columns, row_splits, column_splits, label_smoothing,
    WEIGHTED: tl.constexpr, BOTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Statistics and summed losses of some rows and of some columns."""
    scale = 1.0 / tl.load(temperature_ptr)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    of_rows, bad = _row_losses(
        row_parts_ptr, rows_ptr, i, num_rows, row_splits, num_columns, scale, label_smoothing,
        WEIGHTED, TILE,
    )  # fmt: skip
    to = sums_ptr + 3 * tl.program_id(0)
    tl.store(to, of_rows)
    tl.store(to + 2, bad.to(tl.float32))
    if BOTH:
        of_columns, _ = _row_losses(
            column_parts_ptr, columns_ptr, i, num_columns, column_splits, num_columns, scale,
            label_smoothing, WEIGHTED, TILE,
        )  # fmt: skip
        tl.store(to + 1, of_columns)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "count"])
def _mean_kernel(
    rows_ptr, columns_ptr, sums_ptr, loss_ptr, num_rows, num_columns, count,
    BOTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The mean loss of both directions, by one program."""
    of_rows = tl.zeros([TILE], tl.float32)
    of_columns = tl.zeros([TILE], tl.float32)
    bad = tl.zeros([TILE], tl.float32)
    for start in range(0, count, TILE):
        i = start + tl.arange(0, TILE)
        of_rows += tl.load(sums_ptr + 3 * i, mask=i < count, other=0.0)
        if BOTH:
            of_columns += tl.load(sums_ptr + 3 * i + 1, mask=i < count, other=0.0)
        bad += tl.load(sums_ptr + 3 * i + 2, mask=i < count, other=0.0)
    bad = tl.sum(bad, axis=0).to(tl.float64)
    loss = tl.sum(of_rows, axis=0) / num_rows
    # A similarity that is no logit made a row's sum of all NaN, and nothing of the batch is left: a
    # NaN among the weights tells the backward, on all ranks.
    weights_ptr = rows_ptr + 5 * num_rows.to(tl.int64)
    tl.store(weights_ptr, tl.load(weights_ptr) + bad)
    if BOTH:
        loss = 0.5 * (loss + tl.sum(of_columns, axis=0) / num_columns)
        weights_ptr = columns_ptr + 5 * num_columns.to(tl.int64)
        tl.store(weights_ptr, tl.load(weights_ptr) + bad)
    tl.store(loss_ptr, loss)


def info_nce(
    query: torch.Tensor,
    key: torch.Tensor,
    temperature: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
    query_weights: torch.Tensor | None,
    key_weights: torch.Tensor | None,
    first_row: int,
    symmetric: bool,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the statistics and the loss; see the schema in `svitt_ops.info_nce`."""
    (queries, dim), keys = query.shape, key.shape[0]
    rows = query.new_empty(STATISTICS, queries, dtype=torch.float64)
    columns = query.new_empty(STATISTICS, keys if symmetric else 0, dtype=torch.float64)
    loss = query.new_empty((), dtype=torch.float32)
    which: ContrastPass = "forward" if query_ids is None else "forward_ids"
    tile = contrast_tile(which, dim, max(queries, keys), query.dtype, device_arch(query.device))
    sides = 2 if symmetric else 1
    blocks = cdiv(max(queries, keys) if symmetric else queries, tile.rows)
    row_splits, row_each = tile.splits(blocks * sides, keys)
    column_splits, column_each = tile.splits(blocks * sides, queries)
    row_parts = query.new_empty(row_splits, PARTS.value, queries, dtype=torch.float32)
    column_parts = query.new_empty(
        column_splits, PARTS.value, columns.shape[1], dtype=torch.float32
    )
    splits = max(row_splits, column_splits) if symmetric else row_splits
    together = min(128, next_pow2(max(queries, keys)))
    programs = cdiv(max(queries, columns.shape[1]), together)
    sums = query.new_empty(programs, 3, dtype=torch.float32)
    with on_device(query):
        _statistics_kernel[(blocks, sides, splits)](
            query, key, temperature, query_ids, key_ids, query_weights, key_weights, row_parts,
            column_parts, first_row, queries, keys, row_each, column_each, query.stride(0),
            key.stride(0), dim, ROWS=tile.rows, COLUMNS=tile.columns, **tile.dims(dim),
            **tile.options,
        )  # fmt: skip
        _loss_kernel[(programs,)](
            row_parts, column_parts, rows, columns, temperature, sums, queries, keys,
            row_splits, column_splits, label_smoothing, WEIGHTED=key_weights is not None,
            BOTH=symmetric, TILE=together, maxnreg=255, **launch_options(),
        )  # fmt: skip
        _mean_kernel[(1,)](
            rows, columns, sums, loss, queries, keys, programs,
            BOTH=symmetric, TILE=min(256, next_pow2(programs)), **launch_options(),
        )  # fmt: skip
    return loss, rows, columns

"""InfoNCE backward; tiling, traffic and numerics are described in `info_nce`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .contrast_walk import _by_thread, _diagonal, _dots, _take
from .info_nce import _SIZES, LOG2_E, _log1p, _same
from .tiles import (
    ContrastPass,
    cdiv,
    contrast_tile,
    device_arch,
    launch_options,
    next_pow2,
    on_device,
)

SIDES = tl.constexpr(8)
"""Of each row: log-sum-exp as a similarity and the rest of it as a power of 2, the same of the
positives, share of the positives, log share of the negatives, number of positives, sum of their
weights."""
CENTRE_ROWS = 128
"""Rows whose positives tell how large a similarity of a pair is."""


@triton.jit
def _as_similarity(total, scale):
    """A log-sum-exp as the similarity that has it for a logit, and what rounding left, in log2."""
    # Differences from it are taken of similarities: close to it, where weights are large, exactly.
    wide = scale.to(tl.float64)
    high = (total / wide).to(tl.float32)
    rest = tl.where(total == -float("inf"), 0.0, total - high.to(tl.float64) * wide)
    return high, rest.to(tl.float32) * LOG2_E


@triton.jit
def _prepare(stats_ptr, side_ptr, i, count, scale):
    """What the gradient needs of rows i; returns their positives' mean similarity."""
    here = i < count
    stack = count.to(tl.int64)
    negative = tl.load(stats_ptr + i, mask=here, other=0.0)
    positive = tl.load(stats_ptr + stack + i, mask=here, other=0.0)
    pairs = tl.load(stats_ptr + 2 * stack + i, mask=here, other=1.0).to(tl.float32)
    gap = (negative - positive).to(tl.float32)
    rest = _log1p(tl.exp(-tl.abs(gap)))
    total, total_rest = _as_similarity(tl.maximum(negative, positive) + rest.to(tl.float64), scale)
    high, high_rest = _as_similarity(positive, scale)
    tl.store(side_ptr + i, total, mask=here)
    tl.store(side_ptr + count + i, total_rest, mask=here)
    tl.store(side_ptr + 2 * count + i, high, mask=here)
    tl.store(side_ptr + 3 * count + i, high_rest, mask=here)
    tl.store(side_ptr + 4 * count + i, tl.exp(-tl.maximum(gap, 0.0) - rest), mask=here)
    tl.store(side_ptr + 5 * count + i, tl.exp(tl.minimum(gap, 0.0) - rest), mask=here)
    tl.store(side_ptr + 6 * count + i, pairs, mask=here)
    weight = tl.load(stats_ptr + 5 * stack + i, mask=here, other=0.0)
    tl.store(side_ptr + 7 * count + i, weight.to(tl.float32), mask=here)
    same = tl.load(stats_ptr + 3 * stack + i, mask=here, other=0.0)
    return tl.sum(same, axis=0) / tl.sum(weight, axis=0)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def _prepare_kernel(
    rows_ptr, columns_ptr, temperature_ptr, row_side_ptr, column_side_ptr, centre_ptr,
    num_rows, num_columns, BOTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What the gradient needs of the statistics, in fp32; by the first program, a centre.

    Weights add up to 0 over everything, so similarities may be taken from any centre; near that of
    positives, rounded weights do no harm where all similarities are alike.
    """
    scale = 1.0 / tl.load(temperature_ptr)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    centre = _prepare(rows_ptr, row_side_ptr, i, num_rows, scale)
    if BOTH:
        centre = _prepare(columns_ptr, column_side_ptr, i, num_columns, scale)
    if tl.program_id(0) == 0:
        tl.store(centre_ptr, centre.to(tl.float32))


@triton.jit
def _softmax(x, high, rest, rate):
    """Share of similarities in the sum that was made a similarity."""
    return tl.exp2((x - high) * rate - rest)


@triton.jit
def _kept(
    x, side_ptr, weights_ptr, i, j, count, rate, label_smoothing,
    COLUMN: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Weights of positives: softmax less target, from the negatives' share; ONE: of a row's one."""
    if ONE:
        kept = tl.expand_dims(label_smoothing - tl.load(side_ptr + 5 * count + i), COLUMN)
    else:
        high = tl.expand_dims(tl.load(side_ptr + 2 * count + i), COLUMN)
        rest = tl.expand_dims(tl.load(side_ptr + 3 * count + i), COLUMN)
        share = tl.expand_dims(tl.load(side_ptr + 4 * count + i), COLUMN)
        lost = tl.expand_dims(tl.load(side_ptr + 5 * count + i), COLUMN)
        pairs = tl.expand_dims(tl.load(side_ptr + 6 * count + i), COLUMN)
        among = tl.where(pairs == 1.0, 1.0, _softmax(x, high, rest, rate))
        # One product and one sum a pair: the rest is of the row.
        all_targets = share + lost - label_smoothing
        if weights_ptr is None:
            kept = share * among - all_targets / pairs
        else:
            total = tl.expand_dims(tl.load(side_ptr + 7 * count + i), COLUMN)
            weight = tl.expand_dims(tl.load(weights_ptr + j), 1 - COLUMN)
            kept = share * among - all_targets * (weight / total)
    return kept


@triton.jit
def _sums_of(side_ptr, i, count, WANTED: tl.constexpr):
    """Of rows i log-sum-exp as a similarity, and the rest of it as a power of 2."""
    if WANTED:
        return tl.load(side_ptr + i), tl.load(side_ptr + count + i)
    else:
        return i, i


@triton.jit
def _weights(
    x, a_high, a_rest, b_high, b_rest, rate, smoothing, A: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """Gradients by logits of a tile's negatives: softmaxes over either side less smoothing."""
    if A and B:
        weight = _softmax(x, a_high[:, None], a_rest[:, None], rate)
        weight += _softmax(x, b_high[None, :], b_rest[None, :], rate)
    elif A:
        weight = _softmax(x, a_high[:, None], a_rest[:, None], rate)
    else:
        weight = _softmax(x, b_high[None, :], b_rest[None, :], rate)
    return weight - smoothing


@triton.jit
def _positive_weights(
    x, of_a_ptr, of_b_ptr, a_weights_ptr, b_weights_ptr, a, b, a_count, b_count, rate,
    label_smoothing, A: tl.constexpr, B: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """The same as if all pairs of a tile were positives, but for what smoothing takes."""
    kept = tl.zeros([x.shape[0], x.shape[1]], tl.float32)
    if A:
        kept += _kept(x, of_a_ptr, b_weights_ptr, a, b, a_count, rate, label_smoothing, 1, ONE)
    if B:
        kept += _kept(x, of_b_ptr, a_weights_ptr, b, a, b_count, rate, label_smoothing, 0, ONE)
    return kept


@triton.jit
def _any_tile(
    grad, by_scale, left, a_ptr, b_ptr, a_ids_ptr, b_ids_ptr, a_weights_ptr, b_weights_ptr,
    of_a_ptr, of_b_ptr, a_high, a_rest, rate, shift, label_smoothing, smoothing, centre, tile, a,
    start, a_count, b_count, a_at, b_step, dim, A: tl.constexpr, B: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """The sums take in a tile of which columns may not exist, and any may be positives by ids."""
    SINGLE: tl.constexpr = a_ptr.dtype.element_ty == tl.float32
    column, chunk, d = tl.arange(0, COLUMNS), tl.arange(0, CHUNK), tl.arange(0, SLICE)
    b_at = column[:, None] * b_step + chunk[None, :]
    b = tile * COLUMNS + column
    exists = b < b_count
    b_safe = tl.minimum(b, b_count - 1)
    b_high, b_rest = _sums_of(of_b_ptr, b_safe, b_count, B)
    tile_ptr = b_ptr + tile.to(tl.int64) * COLUMNS * b_step
    right = column
    if WHOLE:
        right = _take(tile_ptr, b_at, exists, chunk, dim, EVEN)
    x = _dots(left, right, a_ptr, a_at, tile_ptr, b_at, exists, dim, CHUNK, WHOLE, EVEN)
    weight = _weights(x, a_high, a_rest, b_high, b_rest, rate, smoothing, A, B)
    kept = _positive_weights(
        x, of_a_ptr, of_b_ptr, a_weights_ptr, b_weights_ptr, tl.minimum(a, a_count - 1), b_safe,
        a_count, b_count, rate, label_smoothing, A, B, a_ids_ptr is None,
    )  # fmt: skip
    same = _same(a_ids_ptr, b_ids_ptr, a, b, a_count, b_count, shift)
    weight = tl.where(same, kept - smoothing, weight)
    weight = tl.where(exists[None, :], weight, 0.0)
    by_scale += tl.sum(_by_thread(weight * (x - centre), SINGLE), axis=2)
    if WHOLE and CHUNK == SLICE:
        values = right
    else:
        d_at = column[:, None] * b_step + d[None, :]
        values = _take(tile_ptr + start, d_at, exists, start + d, dim, EVEN)
    return tl.dot(weight.to(values.dtype), values, grad, input_precision="ieee"), by_scale


@triton.jit
def _sweep(
    a_ptr, b_ptr, a_ids_ptr, b_ids_ptr, a_weights_ptr, b_weights_ptr, of_a_ptr, of_b_ptr, grad_ptr,
    scale, shift, factor, label_smoothing, smoothing, centre, a_count, b_count, each, a_step,
    b_step, dim, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One slice of dims of the gradient of some rows of a, from one split of the rows of b.

    Returns the sum of weight times similarity.
    """
    SINGLE: tl.constexpr = a_ptr.dtype.element_ty == tl.float32
    IDS: tl.constexpr = a_ids_ptr is not None
    first = tl.program_id(0) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    a = first + row
    a_safe = tl.minimum(a, a_count - 1)
    slices = tl.cdiv(dim, SLICE)
    split = tl.program_id(2) // slices
    start = tl.program_id(2) % slices * SLICE
    d = start + tl.arange(0, SLICE)
    chunk = tl.arange(0, CHUNK)
    rate = scale * LOG2_E
    grad = tl.zeros([ROWS, SLICE], tl.float32)
    by_scale = tl.sum(_by_thread(tl.zeros([ROWS, COLUMNS], tl.float32), SINGLE), axis=2)
    a_high, a_rest = _sums_of(of_a_ptr, a_safe, a_count, A)
    # Offsets inside a tile fit 32 bits: an address is one sum.
    a_ptr += first.to(tl.int64) * a_step
    a_at = tl.minimum(row, a_count - 1 - first)[:, None] * a_step + chunk[None, :]
    b_at = column[:, None] * b_step + chunk[None, :]
    d_at = column[:, None] * b_step + tl.arange(0, SLICE)[None, :]
    left = a
    if WHOLE:
        left = _take(a_ptr, a_at, None, chunk, dim, EVEN)
    begin = split * each
    end = tl.minimum(begin + each, tl.cdiv(b_count, COLUMNS))
    full = tl.minimum(end, b_count // COLUMNS)
    low, diagonal = _diagonal(first, shift, begin, full, ROWS, COLUMNS)
    if IDS:
        for step in range(end - begin):
            grad, by_scale = _any_tile(
                grad, by_scale, left, a_ptr, b_ptr, a_ids_ptr, b_ids_ptr, a_weights_ptr,
                b_weights_ptr, of_a_ptr, of_b_ptr, a_high, a_rest, rate, shift, label_smoothing,
                smoothing, centre, begin + step, a, start, a_count, b_count, a_at, b_step, dim,
                A, B, COLUMNS, CHUNK, WHOLE, EVEN, SLICE,
            )  # fmt: skip
    else:
        if full < end:
            grad, by_scale = _any_tile(
                grad, by_scale, left, a_ptr, b_ptr, a_ids_ptr, b_ids_ptr, a_weights_ptr,
                b_weights_ptr, of_a_ptr, of_b_ptr, a_high, a_rest, rate, shift, label_smoothing,
                smoothing, centre, full, a, start, a_count, b_count, a_at, b_step, dim,
                A, B, COLUMNS, CHUNK, WHOLE, EVEN, SLICE,
            )  # fmt: skip
        for step in range(full - diagonal - begin):
            at = begin + step
            at = tl.where(at >= low, at + diagonal, at)
            b_high, b_rest = _sums_of(of_b_ptr, at * COLUMNS + column, b_count, B)
            tile_ptr = b_ptr + at.to(tl.int64) * COLUMNS * b_step
            right = column
            if WHOLE:
                right = _take(tile_ptr, b_at, None, chunk, dim, EVEN)
            x = _dots(left, right, a_ptr, a_at, tile_ptr, b_at, None, dim, CHUNK, WHOLE, EVEN)
            weight = _weights(x, a_high, a_rest, b_high, b_rest, rate, smoothing, A, B)
            by_scale += tl.sum(_by_thread(weight * (x - centre), SINGLE), axis=2)
            if WHOLE and CHUNK == SLICE:
                values = right
            else:
                values = _take(tile_ptr + start, d_at, None, d, dim, EVEN)
            grad = tl.dot(weight.to(values.dtype), values, grad, input_precision="ieee")
        for step in range(diagonal):
            # Of tiles in a simple row, compilers would carry the addresses of each thread's loads.
            tile = tl.minimum(low + step, full - 1)
            b = tile * COLUMNS + column
            b_high, b_rest = _sums_of(of_b_ptr, b, b_count, B)
            tile_ptr = b_ptr + tile.to(tl.int64) * COLUMNS * b_step
            right = column
            if WHOLE:
                right = _take(tile_ptr, b_at, None, chunk, dim, EVEN)
            x = _dots(left, right, a_ptr, a_at, tile_ptr, b_at, None, dim, CHUNK, WHOLE, EVEN)
            weight = _weights(x, a_high, a_rest, b_high, b_rest, rate, smoothing, A, B)
            kept = _positive_weights(
                x, of_a_ptr, of_b_ptr, a_weights_ptr, b_weights_ptr, a_safe, b, a_count, b_count,
                rate, label_smoothing, A, B, True,
            )  # fmt: skip
            same = (a + (shift - tile * COLUMNS))[:, None] == column[None, :]
            weight = tl.where(same, kept - smoothing, weight)
            by_scale += tl.sum(_by_thread(weight * (x - centre), SINGLE), axis=2)
            if WHOLE and CHUNK == SLICE:
                values = right
            else:
                values = _take(tile_ptr + start, d_at, None, d, dim, EVEN)
            grad = tl.dot(weight.to(values.dtype), values, grad, input_precision="ieee")
    if start < dim:  # always: a branch keeps ptxas from spilling what it would mix with the loop
        to = grad_ptr + (split * a_count.to(tl.int64) + a)[:, None] * dim + d[None, :]
        here = (a < a_count)[:, None] & (d < dim)[None, :]
        tl.store(to, (grad * (factor * scale)).to(grad_ptr.dtype.element_ty), mask=here)
    return tl.sum(tl.where(a < a_count, tl.sum(by_scale, axis=1), 0.0), axis=0)


@triton.jit(do_not_specialize=["first_row", "row_each", "column_each", *_SIZES])
def _gradient_kernel(
    grad_loss_ptr, query_ptr, key_ptr, temperature_ptr, query_ids_ptr, key_ids_ptr,
    query_weights_ptr, key_weights_ptr, row_side_ptr, column_side_ptr, centre_ptr,
    grad_query_ptr, grad_key_ptr, parts_ptr, label_smoothing, first_row, a_count, b_count,
    row_each, column_each, query_step, key_step, dim, BOTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Gradient of queries or, on the second axis of the grid, of keys."""
    scale = 1.0 / tl.load(temperature_ptr)
    factor = tl.load(grad_loss_ptr) / b_count
    smoothing = label_smoothing / b_count
    if BOTH:
        factor *= 0.5
        smoothing *= 2.0
    centre = tl.load(centre_ptr)
    factor += centre * 0.0  # NaN where the forward found a similarity that is no logit
    slices = tl.cdiv(dim, SLICE)
    split = tl.program_id(2) // slices
    if tl.program_id(1) == 0:
        if (tl.program_id(0) * ROWS < a_count) & (split * row_each * COLUMNS < b_count):
            part = _sweep(
                query_ptr, key_ptr, query_ids_ptr, key_ids_ptr, query_weights_ptr, key_weights_ptr,
                row_side_ptr, column_side_ptr, grad_query_ptr, scale, first_row, factor,
                label_smoothing, smoothing, centre, a_count, b_count, row_each, query_step,
                key_step, dim, True, BOTH, ROWS, COLUMNS, CHUNK, WHOLE, EVEN, SLICE,
            )  # fmt: skip
            if tl.program_id(2) % slices == 0:
                to = split * tl.cdiv(a_count, ROWS) + tl.program_id(0)
                tl.store(parts_ptr + to, part * factor * scale * scale)
    else:
        if (tl.program_id(0) * ROWS < b_count) & (split * column_each * COLUMNS < a_count):
            _sweep(
                key_ptr, query_ptr, key_ids_ptr, query_ids_ptr, key_weights_ptr, query_weights_ptr,
                column_side_ptr, row_side_ptr, grad_key_ptr, scale, -first_row, factor,
                label_smoothing, smoothing, centre, b_count, a_count, column_each, key_step,
                query_step, dim, BOTH, True, ROWS, COLUMNS, CHUNK, WHOLE, EVEN, SLICE,
            )  # fmt: skip


@triton.jit
def _add(parts_ptr, out_ptr, i, size, splits, TILE: tl.constexpr):
    """Sum of the splits, in their order."""
    found = tl.zeros([TILE], tl.float32)
    for split in range(splits):
        found += tl.load(parts_ptr + split * size + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, found.to(out_ptr.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["count", "row_splits", "column_splits"])
def _sum_kernel(
    parts_ptr, out_ptr, count, row_parts_ptr, column_parts_ptr, grad_query_ptr, grad_key_ptr,
    row_size, column_size, row_splits, column_splits, SPLIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients from those of the splits; by the first program, the temperature's."""
    if SPLIT:
        at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        _add(row_parts_ptr, grad_query_ptr, at, row_size, row_splits, TILE)
        _add(column_parts_ptr, grad_key_ptr, at, column_size, column_splits, TILE)
    if tl.program_id(0) == 0:
        found = tl.zeros([TILE], tl.float32)
        for start in range(0, count, TILE):
            i = start + tl.arange(0, TILE)
            found += tl.load(parts_ptr + i, mask=i < count, other=0.0)
        tl.store(out_ptr, -tl.sum(found, axis=0))


def info_nce_backward(
    grad_loss: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    temperature: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
    query_weights: torch.Tensor | None,
    key_weights: torch.Tensor | None,
    first_row: int,
    rows: torch.Tensor,
    columns: torch.Tensor,
    label_smoothing: float,
    wide: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the gradients; see the schema in `svitt_ops.info_nce`."""
    (queries, dim), keys = query.shape, key.shape[0]
    dtype = torch.float32 if wide else query.dtype
    grad_query = query.new_empty(queries, dim, dtype=dtype)
    grad_key = query.new_empty(keys, dim, dtype=dtype)
    grad_temperature = query.new_empty((), dtype=torch.float32)
    which: ContrastPass = "backward" if query_ids is None else "backward_ids"
    tile = contrast_tile(which, dim, max(queries, keys), query.dtype, device_arch(query.device))
    both, slices = columns.numel() > 0, cdiv(dim, tile.slice)
    blocks = cdiv(max(queries, keys), tile.rows)
    row_splits, row_each = tile.splits(2 * blocks * slices, keys)
    column_splits, column_each = tile.splits(2 * blocks * slices, queries)
    splits = max(row_splits, column_splits)
    split_query, split_key = grad_query, grad_key
    if splits > 1:
        split_query = query.new_empty(row_splits, queries, dim, dtype=torch.float32)
        split_key = query.new_empty(column_splits, keys, dim, dtype=torch.float32)
    row_side = query.new_empty(SIDES.value, queries, dtype=torch.float32)
    column_side = query.new_empty(SIDES.value, keys if both else 0, dtype=torch.float32)
    centre = query.new_empty((), dtype=torch.float32)
    parts = query.new_empty(row_splits * cdiv(queries, tile.rows), dtype=torch.float32)
    together = min(CENTRE_ROWS, next_pow2(max(queries, keys)))
    adding = cdiv(max(queries, keys) * dim, 1024) if splits > 1 else 1
    with on_device(query):
        _prepare_kernel[(cdiv(max(queries, keys), together),)](
            rows, columns, temperature, row_side, column_side, centre, queries, keys,
            BOTH=both, TILE=together, **launch_options(),
        )  # fmt: skip
        _gradient_kernel[(blocks, 2, splits * slices)](
            grad_loss, query, key, temperature, query_ids, key_ids, query_weights, key_weights,
            row_side, column_side, centre, split_query, split_key, parts, label_smoothing,
            first_row, queries, keys, row_each, column_each, query.stride(0),
            key.stride(0), dim, BOTH=both, ROWS=tile.rows, COLUMNS=tile.columns, SLICE=tile.slice,
            **tile.dims(dim), **tile.options,
        )  # fmt: skip
        _sum_kernel[(adding,)](
            parts, grad_temperature, parts.shape[0], split_query, split_key, grad_query, grad_key,
            queries * dim, keys * dim, row_splits, column_splits,
            SPLIT=splits > 1, TILE=1024, **launch_options(),
        )  # fmt: skip
    return grad_query, grad_key, grad_temperature

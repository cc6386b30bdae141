"""The sigmoid loss: losses, weights and gradients of pairs whose similarities are never written.

Tiling. That of InfoNCE: a program owns `ROWS` queries and walks keys in tiles of `COLUMNS`, or on
the second axis of the grid the other way round; the third axis splits the walked side, and slices
the gradient's dims where one program cannot hold them all. As a pair's weight depends on the pair
alone, there is nothing to wait for: the walk that sums the losses sums the gradients too, and one
more launch adds up the parts. Without gradients the queries' walk is all.

Work and traffic, U = 2 B B D: U, and 4 U with gradients for D of one slice, since both directions
compute the similarities. A tile of COLUMNS rows is read once per program, from L2 while both sides
fit it: B B D e / ROWS bytes a direction. Results are O(B D).

Numerics. Dot products accumulate in fp32 (fp32 inputs without TF32). Of e = exp(-|logit|), the loss
is max(logit, 0) + log1p(e) and the weight 1 / (1 + e) or e / (1 + e): nothing is subtracted. What
programs summed in fp32 is added up in fp64, in their order. No atomics: a rerun is bitwise
identical.

Source: SigLIP (Zhai et al., 2023), algorithm 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .contrast_walk import _products, _rows, lanes, tile_rows
from .info_nce import _SIZES, LOGIT_LIMIT, _limit, _log1p, _same
from .info_nce_backward import _add
from .tiles import (
    ContrastPass,
    cdiv,
    contrast_tile,
    device_arch,
    launch_options,
    next_pow2,
    on_device,
)


@triton.jit
def _positives(a_ids_ptr, b_ids_ptr, a, b, a_count, b_count, shift, MASKED: tl.constexpr):
    """`_same`; without MASKED all b exist, and their ids are read side by side."""
    if MASKED or a_ids_ptr is None:
        return _same(a_ids_ptr, b_ids_ptr, a, b, a_count, b_count, shift)
    else:
        a_ids = tl.load(a_ids_ptr + tl.minimum(a, a_count - 1))
        return a_ids[:, None] == tl.load(b_ids_ptr + b)[None, :]


@triton.jit
def _take_in(
    losses, moments, weights, size, grad, left, a_ptr, b_ptr, a_ids_ptr, b_ids_ptr, scale, bias,
    shift, first, a, start, d, a_count, b_count, a_step, b_step, dim,
    MASKED: tl.constexpr, LOSS: tl.constexpr, GRADIENTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """The sums take in a tile, of which without MASKED all columns exist."""
    held: tl.constexpr = losses.shape[1]
    b = start + tl.arange(0, COLUMNS)
    chunk = tl.arange(0, CHUNK)
    right = b
    if WHOLE:
        right = tile_rows(b_ptr, start, b_count, b_step, chunk, dim, COLUMNS, MASKED, EVEN)
    x = _products(
        left, right, a_ptr, b_ptr, a, b, a_count, b_count, a_step, b_step, dim,
        CHUNK, WHOLE, EVEN,
    )  # fmt: skip
    wrong = x * scale + bias  # how far a pair is on the wrong side
    special = (start < first + shift + ROWS) & (first + shift < start + COLUMNS)
    if GRADIENTS:
        special = special | (start + COLUMNS > b_count)
    if a_ids_ptr is not None or (MASKED and not GRADIENTS):
        special = True
    if special:
        same = _positives(a_ids_ptr, b_ids_ptr, a, b, a_count, b_count, shift, MASKED)
        others = wrong
        if MASKED:
            others = tl.where((b < b_count)[None, :], wrong, -float("inf"))
        wrong = tl.where(same, -wrong, others)
    e = tl.exp(-tl.abs(wrong))
    weight = tl.where(wrong >= 0, 1.0, e) / (1.0 + e)
    if special:
        same = _positives(a_ids_ptr, b_ids_ptr, a, b, a_count, b_count, shift, MASKED)
        weight = tl.where(same, -weight, weight)
    if LOSS:
        size = tl.maximum(size, tl.max(lanes(tl.abs(x), held), axis=1))
        losses += tl.sum(lanes(tl.maximum(wrong, 0.0) + _log1p(e), held), axis=1)
        moments += tl.sum(lanes(weight * x, held), axis=1)
        weights += tl.sum(lanes(weight, held), axis=1)
    if GRADIENTS:
        if WHOLE and CHUNK == SLICE:
            values = right
        else:
            values = tile_rows(b_ptr, start, b_count, b_step, d, dim, COLUMNS, MASKED, EVEN)
        grad = tl.dot(weight.to(values.dtype), values, grad, input_precision="ieee")
    return losses, moments, weights, size, grad


@triton.jit
def _sweep(
    a_ptr, b_ptr, a_ids_ptr, b_ids_ptr, grad_ptr, scale, bias, limit, shift, factor,
    a_count, b_count, each, a_step, b_step, dim,
    LOSS: tl.constexpr, GRADIENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One slice of dims of the gradient of some rows of a, from one split of the rows of b.

    Returns the sums of losses, of weight times similarity and of weights, with LOSS.
    """
    first = tl.program_id(0) * ROWS
    a = first + tl.arange(0, ROWS)
    slices = tl.cdiv(dim, SLICE) if GRADIENTS else 1
    split = tl.program_id(2) // slices
    d = tl.program_id(2) % slices * SLICE + tl.arange(0, SLICE)
    chunk = tl.arange(0, CHUNK)
    grad = tl.zeros([ROWS, SLICE], tl.float32)
    # Without a gradient each thread adds up what it holds; with one there are no registers for it.
    held: tl.constexpr = 1 if GRADIENTS else 8
    losses = tl.zeros([ROWS, held], tl.float32)
    moments = tl.zeros([ROWS, held], tl.float32)
    weights = tl.zeros([ROWS, held], tl.float32)
    size = tl.zeros([ROWS, held], tl.float32)
    left = a
    if WHOLE:
        left = _rows(a_ptr, a, a_count, a_step, chunk, dim, EVEN)
    begin = split * each * COLUMNS
    end = tl.minimum(begin + each * COLUMNS, b_count)
    # Where the edge is apart, other tiles need no masks. A gradient would gain nothing.
    whole = end
    if not GRADIENTS:
        whole = tl.maximum(begin, end // COLUMNS * COLUMNS)
        if whole < end:
            losses, moments, weights, size, grad = _take_in(
                losses, moments, weights, size, grad, left, a_ptr, b_ptr, a_ids_ptr, b_ids_ptr,
                scale, bias, shift, first, a, whole, d, a_count, b_count, a_step, b_step, dim,
                True, LOSS, GRADIENTS, ROWS, COLUMNS, CHUNK, WHOLE, EVEN, SLICE,
            )  # fmt: skip
    for start in range(begin, whole, COLUMNS):
        losses, moments, weights, size, grad = _take_in(
            losses, moments, weights, size, grad, left, a_ptr, b_ptr, a_ids_ptr, b_ids_ptr, scale,
            bias, shift, first, a, start, d, a_count, b_count, a_step, b_step, dim,
            GRADIENTS, LOSS, GRADIENTS, ROWS, COLUMNS, CHUNK, WHOLE, EVEN, SLICE,
        )  # fmt: skip
    exists = a < a_count
    if GRADIENTS:
        to = grad_ptr + (split * a_count.to(tl.int64) + a)[:, None] * dim + d[None, :]
        tl.store(to, grad * factor, mask=exists[:, None] & (d < dim)[None, :])
    losses = tl.where(size < limit, losses, float("nan"))
    weights = tl.where(size < limit, weights, float("nan"))
    moments = tl.where(size < limit, moments, float("nan"))
    return (
        tl.sum(tl.where(exists, tl.sum(losses, axis=1), 0.0), axis=0),
        tl.sum(tl.where(exists, tl.sum(moments, axis=1), 0.0), axis=0),
        tl.sum(tl.where(exists, tl.sum(weights, axis=1), 0.0), axis=0),
    )


@triton.jit(do_not_specialize=["first_row", "row_each", "column_each", "programs", *_SIZES])
def _pairs_kernel(
    query_ptr, key_ptr, temperature_ptr, bias_ptr, query_ids_ptr, key_ids_ptr, grad_query_ptr,
    grad_key_ptr, parts_ptr, first_row, programs, a_count, b_count, row_each, column_each,
    query_step, key_step, dim,
    GRADIENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Sums of pairs and the gradient of queries or, on the second axis of the grid, of keys."""
    temperature = tl.load(temperature_ptr)
    bias = tl.load(bias_ptr)
    scale = 1.0 / temperature
    limit = tl.where(tl.abs(bias) < LOGIT_LIMIT, _limit(temperature), -1.0)
    factor = scale / b_count
    slices = tl.cdiv(dim, SLICE) if GRADIENTS else 1
    split = tl.program_id(2) // slices
    if tl.program_id(1) == 0:
        if (tl.program_id(0) * ROWS < a_count) & (split * row_each * COLUMNS < b_count):
            loss, moment, weight = _sweep(
                query_ptr, key_ptr, query_ids_ptr, key_ids_ptr, grad_query_ptr, scale, bias, limit,
                first_row, factor, a_count, b_count, row_each, query_step, key_step, dim,
                True, GRADIENTS, ROWS, COLUMNS, CHUNK, WHOLE, EVEN, SLICE,
            )  # fmt: skip
            if tl.program_id(2) % slices == 0:
                to = parts_ptr + split * tl.cdiv(a_count, ROWS) + tl.program_id(0)
                tl.store(to, loss)
                tl.store(to + programs, moment)
                tl.store(to + 2 * programs, weight)
    elif GRADIENTS:
        here = split * column_each * COLUMNS < a_count
        if (tl.program_id(0) * ROWS < b_count) & here:
            _sweep(
                key_ptr, query_ptr, key_ids_ptr, query_ids_ptr, grad_key_ptr, scale, bias, limit,
                -first_row, factor, b_count, a_count, column_each, key_step, query_step, dim,
                False, True, ROWS, COLUMNS, CHUNK, WHOLE, EVEN, SLICE,
            )  # fmt: skip


@triton.jit
def _total(parts_ptr, count, TILE: tl.constexpr):
    found = tl.zeros([TILE], tl.float64)
    for start in range(0, count, TILE):
        i = start + tl.arange(0, TILE)
        found += tl.load(parts_ptr + i, mask=i < count, other=0.0).to(tl.float64)
    return tl.sum(found, axis=0).to(tl.float32)


@triton.jit(do_not_specialize=["count", "rows", "row_splits", "column_splits"])
def _finish_kernel(
    parts_ptr, temperature_ptr, loss_ptr, grad_temperature_ptr, grad_bias_ptr, count, rows,
    row_parts_ptr, column_parts_ptr, grad_query_ptr, grad_key_ptr, row_size, column_size,
    row_splits, column_splits, SPLIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients from those of the splits; by the first program, what is of all pairs."""
    if SPLIT:
        at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        _add(row_parts_ptr, grad_query_ptr, at, row_size, row_splits, TILE)
        _add(column_parts_ptr, grad_key_ptr, at, column_size, column_splits, TILE)
    if tl.program_id(0) == 0:
        scale = 1.0 / tl.load(temperature_ptr)
        moment = _total(parts_ptr + count, count, TILE)
        tl.store(loss_ptr, _total(parts_ptr, count, TILE) / rows)
        tl.store(grad_temperature_ptr, -scale * scale * (moment / rows))
        tl.store(grad_bias_ptr, _total(parts_ptr + 2 * count, count, TILE) / rows)


def sigmoid_nce(
    query: torch.Tensor,
    key: torch.Tensor,
    temperature: torch.Tensor,
    bias: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
    first_row: int,
    gradients: bool,
) -> tuple[torch.Tensor, ...]:
    """Launch the walk and what adds it up; see the schema in `svitt_ops.sigmoid_nce`."""
    (queries, dim), keys = query.shape, key.shape[0]
    new = dict(dtype=torch.float32)
    grad_query = query.new_empty(queries if gradients else 0, dim, **new)
    grad_key = query.new_empty(keys if gradients else 0, dim, **new)
    loss, grad_temperature, grad_bias = (query.new_empty((), **new) for _ in range(3))
    passes: tuple[ContrastPass, ContrastPass] = ("sigmoid_forward", "sigmoid_backward")
    if query_ids is not None:
        passes = ("sigmoid_forward_ids", "sigmoid_backward_ids")
    which = passes[gradients]
    tile = contrast_tile(which, dim, max(queries, keys), query.dtype, device_arch(query.device))
    sides, slices = (2, cdiv(dim, tile.slice)) if gradients else (1, 1)
    blocks = cdiv(max(queries, keys) if gradients else queries, tile.rows)
    row_splits, row_each = tile.splits(sides * blocks * slices, keys)
    column_splits, column_each = tile.splits(sides * blocks * slices, queries)
    splits = max(row_splits, column_splits) if gradients else row_splits
    split_query, split_key, adding = grad_query, grad_key, 1
    add = gradients and splits > 1
    if add:
        split_query = query.new_empty(row_splits, queries, dim, **new)
        split_key = query.new_empty(column_splits, keys, dim, **new)
        adding = cdiv(max(queries, keys) * dim, 1024)
    programs = row_splits * cdiv(queries, tile.rows)
    parts = query.new_empty(3, programs, **new)
    with on_device(query):
        _pairs_kernel[(blocks, sides, splits * slices)](
            query, key, temperature, bias, query_ids, key_ids, split_query, split_key, parts,
            first_row, programs, queries, keys, row_each, column_each, query.stride(0),
            key.stride(0), dim, GRADIENTS=gradients, ROWS=tile.rows, COLUMNS=tile.columns,
            SLICE=tile.slice, **tile.dims(dim), **tile.options,
        )  # fmt: skip
        _finish_kernel[(adding,)](
            parts, temperature, loss, grad_temperature, grad_bias, programs, keys, split_query,
            split_key, grad_query, grad_key, queries * dim, keys * dim, row_splits, column_splits,
            SPLIT=add, TILE=1024 if add else min(256, next_pow2(programs)), **launch_options(),
        )  # fmt: skip
    return loss, grad_query, grad_key, grad_temperature, grad_bias


def sigmoid_nce_backward(grad_loss: torch.Tensor, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients were computed with the loss: what comes from above multiplies them."""
    factor = grad_loss + 0 * args[-1]  # NaN where any logit is none
    return tuple((grad * factor).to(x.dtype) for x, grad in zip(args[:4], args[4:], strict=True))

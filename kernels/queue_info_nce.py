"""InfoNCE against a batch and a queue: one sweep that sums candidates as attention sums values.

Tiling. A program owns `ROWS` queries and one of the splits of the candidates, which it walks in
tiles of `COLUMNS`: the batch's, then the queue's. Without ids of the queue, those that are whole
need no masks and no clamps: a loop of their own loads them from a base and a stride. A program
follows the softmax sums of the negatives, of student and teacher, and with them the sums of the
candidates that they weigh, `SLICE` dims of them; where D is larger, the third axis of the grid is
the slice.
Without a teacher each thread adds up what it holds of a row, and the threads' sums meet after the
walk; the weights of the candidates need the row's maximum of each tile. A second kernel puts the
splits together, a program a row; `queue_info_nce_combine` does the rest.

Work and traffic, U = 2 B (B + Q) D: 2 U, twice that with a teacher, for D of one slice. Candidates
are read once per tile of queries, the queue of a small batch once; partial sums are written and
read once, `splits` times the size of the gradient.

Numerics. Dot products accumulate in fp32 (fp32 inputs without TF32). Logits are taken from that of
the query's own pair, which is then exactly 0, so that a converged row loses no digits; 1 /
temperature multiplies afterwards. Positives are summed apart from the negatives and get their
weight from the negatives' share. Log-sum-exps are fp64. No atomics: a rerun is bitwise identical.

Source: ALBEF (Li et al., 2021), section 3.2; FlashAttention (Dao et al., 2022) for the sweep.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .contrast_walk import _products, _rows, lanes, tile_rows
from .info_nce import LOG2_E, LOGIT_LIMIT, _same
from .queue_info_nce_combine import _own, combine
from .rows import LN_2
from .tiles import (
    ContrastPass,
    cdiv,
    contrast_tile,
    device_arch,
    launch_options,
    next_pow2,
    on_device,
)

_SIZES = ["rows", "queue_rows", "splits", "each"]
_LOWEST = tl.constexpr(-3e38)
"""The largest logit of nothing: what is subtracted from it stays a number."""


@triton.jit
def _join(most, total, moment, logits, similarity, rate, SHARED: tl.constexpr):
    """Logits of a tile join a softmax; also its weights, and what older sums shrink by.

    Logits are similarities that `rate` multiplies, in base 2. Each of the (ROWS, LANES) sums, of
    weights and of similarities that they weigh, is relative to a maximum: where SHARED the row's,
    else its own.
    """
    LANES: tl.constexpr = total.shape[1]
    if SHARED:
        now = tl.maximum(most, tl.max(logits, axis=1) * rate)
        weights = tl.exp2(logits * rate - now[:, None])
        shrink = tl.exp2(most - now)
        total = total * shrink[:, None] + tl.sum(lanes(weights, LANES), axis=1)
        moment = moment * shrink[:, None] + tl.sum(lanes(weights * similarity, LANES), axis=1)
    else:
        logits = lanes(logits, LANES)
        now = tl.maximum(most, tl.max(logits, axis=1) * rate)
        weights = tl.exp2(logits * rate - now[:, None, :])
        shrink = tl.exp2(most - now)
        total = total * shrink + tl.sum(weights, axis=1)
        moment = moment * shrink + tl.sum(weights * lanes(similarity, LANES), axis=1)
    return now, total, moment, weights, shrink


@triton.jit
def _walk(
    begin, end, state, left, taught, centre, taught_centre, rate,
    query_ptr, teacher_ptr, b_ptr, query_ids_ptr, b_ids_ptr,
    a, d, rows, count, query_step, teacher_step, b_step, dim,
    QUEUED: tl.constexpr, MASKED: tl.constexpr, GRADIENTS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Some rows of the batch's candidates, or the queue's, join the sums of some queries.

    Without MASKED they fill their tiles, and none is a positive.
    """
    size, most, total, moment, sums = state[0]
    taught_size, taught_most, taught_total, taught_moment, taught_sums = state[1]
    for start in range(begin, end, COLUMNS):
        b = start + tl.arange(0, COLUMNS)
        right = b
        if WHOLE:
            right = tile_rows(
                b_ptr, start, count, b_step, tl.arange(0, CHUNK), dim, COLUMNS, MASKED, EVEN
            )
        x = _products(
            left, right, query_ptr, b_ptr, a, b, rows, count, query_step, b_step, dim,
            CHUNK, WHOLE, EVEN,
        )  # fmt: skip
        size = tl.maximum(size, tl.max(lanes(tl.abs(x), size.shape[1]), axis=1))
        similarity = x - centre[:, None]
        logits = similarity
        if MASKED:
            negative = (b < count)[None, :]
            if (not QUEUED) or (b_ids_ptr is not None):
                positive = _same(query_ids_ptr, b_ids_ptr, a, b, rows, count, 0)
                negative = negative & (positive == 0)
            logits = tl.where(negative, similarity, -float("inf"))
        most, total, moment, weights, shrink = _join(
            most, total, moment, logits, similarity, rate, GRADIENTS
        )
        if GRADIENTS:
            if WHOLE and d.shape[0] == CHUNK:
                values = right
            else:
                values = tile_rows(b_ptr, start, count, b_step, d, dim, COLUMNS, MASKED, EVEN)
            sums = sums * shrink[:, None]
            sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="ieee")
        if teacher_ptr is not None:
            y = _products(
                taught, right, teacher_ptr, b_ptr, a, b, rows, count, teacher_step, b_step, dim,
                CHUNK, WHOLE, EVEN,
            )  # fmt: skip
            taught_size = tl.maximum(taught_size, tl.max(lanes(tl.abs(y), size.shape[1]), axis=1))
            logits = y - taught_centre[:, None]
            if MASKED:
                logits = tl.where(negative, logits, -float("inf"))
            taught_most, taught_total, taught_moment, weights, shrink = _join(
                taught_most, taught_total, taught_moment, logits, similarity, rate, GRADIENTS
            )
            if GRADIENTS:
                taught_sums = taught_sums * shrink[:, None]
                taught_sums = tl.dot(
                    weights.to(values.dtype), values, taught_sums, input_precision="ieee"
                )
    return (
        (size, most, total, moment, sums),
        (taught_size, taught_most, taught_total, taught_moment, taught_sums),
    )


@triton.jit
def _store_sums(to, rows, a, centre, state, scale, SHARED: tl.constexpr):
    """Writes each row's largest logit, sum of exponentials relative to it, and moment."""
    size, most, total, moment, _ = state
    if not SHARED:
        own = most
        most = tl.max(own, axis=1)
        weight = tl.exp2(own - most[:, None])
        total, moment = total * weight, moment * weight
    # Similarities that are no logits make all NaN.
    size = tl.maximum(tl.max(size, axis=1), tl.abs(centre))
    total = tl.sum(total, axis=1) + centre * 0.0
    total = tl.where(size * scale < LOGIT_LIMIT, total, float("nan"))
    most = tl.where(most == _LOWEST, -float("inf"), most * LN_2)
    tl.store(to + a, most, mask=a < rows)
    tl.store(to + rows + a, total, mask=a < rows)
    tl.store(to + 2 * rows + a, tl.sum(moment, axis=1), mask=a < rows)


@triton.jit(do_not_specialize=_SIZES)
def _sweep_kernel(
    query_ptr, key_ptr, queue_ptr, teacher_ptr, temperature_ptr, query_ids_ptr, key_ids_ptr,
    queue_ids_ptr, sums_ptr, stats_ptr, rows, queue_rows, splits, each,
    query_step, key_step, queue_step, teacher_step, dim,
    GRADIENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Softmax sums of some queries over the negatives of one split."""
    first = tl.program_id(0) * ROWS
    a = first + tl.arange(0, ROWS)
    split = tl.program_id(1)
    d = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    temperature = tl.load(temperature_ptr)
    usable = (temperature > 0) & (temperature < float("inf"))
    scale = tl.where(usable, 1.0 / temperature, float("nan"))
    rate = scale * LOG2_E
    near: tl.constexpr = min(CHUNK, 64)
    centre = _own(query_ptr, key_ptr, a, rows, query_step, key_step, dim, ROWS, near)
    left = a
    if WHOLE:
        left = _rows(query_ptr, a, rows, query_step, tl.arange(0, CHUNK), dim, EVEN)
    taught_centre = centre
    taught = left
    if teacher_ptr is not None:
        taught_centre = _own(teacher_ptr, key_ptr, a, rows, teacher_step, key_step, dim, ROWS, near)
        if WHOLE:
            taught = _rows(teacher_ptr, a, rows, teacher_step, tl.arange(0, CHUNK), dim, EVEN)
    # Two softmaxes leave no registers for sums of each thread.
    held: tl.constexpr = 8 if teacher_ptr is None else 1
    zeros = tl.zeros([ROWS, held], tl.float32)
    most = tl.full([ROWS] if GRADIENTS else [ROWS, held], _LOWEST, tl.float32)
    nothing = (zeros, most, zeros, zeros, tl.zeros([ROWS, SLICE], tl.float32))
    state = (nothing, nothing)

    # The batch's tiles, the whole ones of the queue, and its last.
    of_keys = tl.cdiv(rows, COLUMNS)
    begin, end = split * each, split * each + each
    state = _walk(
        begin * COLUMNS, tl.minimum(end * COLUMNS, rows), state,
        left, taught, centre, taught_centre, rate, query_ptr, teacher_ptr, key_ptr,
        query_ids_ptr, key_ids_ptr, a, d, rows, rows, query_step, teacher_step, key_step, dim,
        False, True, GRADIENTS, COLUMNS, CHUNK, WHOLE, EVEN,
    )  # fmt: skip
    begin = tl.maximum(begin - of_keys, 0) * COLUMNS
    end = tl.minimum((end - of_keys) * COLUMNS, queue_rows)
    if queue_ids_ptr is None:
        whole = tl.maximum(begin, tl.minimum(end, queue_rows // COLUMNS * COLUMNS))
        state = _walk(
            begin, whole, state,
            left, taught, centre, taught_centre, rate, query_ptr, teacher_ptr, queue_ptr,
            query_ids_ptr, None, a, d, rows, queue_rows, query_step, teacher_step, queue_step, dim,
            True, False, GRADIENTS, COLUMNS, CHUNK, WHOLE, EVEN,
        )  # fmt: skip
        begin = whole
    state = _walk(
        begin, end, state,
        left, taught, centre, taught_centre, rate, query_ptr, teacher_ptr, queue_ptr,
        query_ids_ptr, queue_ids_ptr, a, d, rows, queue_rows, query_step, teacher_step, queue_step,
        dim, True, True, GRADIENTS, COLUMNS, CHUNK, WHOLE, EVEN,
    )  # fmt: skip

    kinds: tl.constexpr = 1 if teacher_ptr is None else 2
    part = split * kinds * rows.to(tl.int64)
    if tl.program_id(2) == 0:
        to = stats_ptr + 3 * part
        _store_sums(to, rows, a, centre, state[0], scale, GRADIENTS)
        if teacher_ptr is not None:
            _store_sums(to + 3 * rows, rows, a, taught_centre, state[1], scale, GRADIENTS)
    if GRADIENTS:
        to = (part + a)[:, None] * dim + d[None, :]
        here = (a < rows)[:, None] & (d < dim)[None, :]
        tl.store(sums_ptr + to, state[0][4], mask=here)
        if teacher_ptr is not None:
            tl.store(sums_ptr + to + rows.to(tl.int64) * dim, state[1][4], mask=here)


@triton.jit(do_not_specialize=["rows", "splits"])
def _merge_kernel(
    sums_ptr, stats_ptr, all_sums_ptr, all_stats_ptr, rows, splits, dim, GRADIENTS: tl.constexpr,
    SPLITS: tl.constexpr, TILE: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One row's sums of all splits, and one slice of its dims: as if there had been one split."""
    a, kind, kinds = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    split = tl.arange(0, SPLITS)
    here = split < splits
    part = stats_ptr + 3 * (split * kinds + kind) * rows.to(tl.int64) + a
    own = tl.load(part, mask=here, other=-float("inf"))
    most = tl.max(own, axis=0)
    offset = tl.where(most == -float("inf"), 0.0, most)
    weight = tl.exp(own - offset)
    if tl.program_id(2) == 0:
        to = all_stats_ptr + 3 * kind * rows.to(tl.int64) + a
        total = tl.load(part + rows, mask=here, other=0.0)
        moment = tl.load(part + 2 * rows, mask=here, other=0.0)
        tl.store(to, most)
        tl.store(to + rows, tl.sum(weight * total, axis=0))
        tl.store(to + 2 * rows, tl.sum(weight * moment, axis=0))
    if GRADIENTS:
        d = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
        found = tl.zeros([SLICE], tl.float32)
        for start in range(0, splits, TILE):
            some = start + tl.arange(0, TILE)
            row = (some * kinds + kind) * rows.to(tl.int64)
            large = tl.load(stats_ptr + 3 * row + a, mask=some < splits, other=-float("inf"))
            values = tl.load(
                sums_ptr + (row + a)[:, None] * dim + d[None, :],
                mask=(some < splits)[:, None] & (d < dim)[None, :],
                other=0.0,
            )
            found += tl.sum(tl.exp(large - offset)[:, None] * values, axis=0)
        to = all_sums_ptr + (kind * rows.to(tl.int64) + a) * dim + d
        tl.store(to, found, mask=d < dim)


def queue_info_nce(
    query: torch.Tensor,
    key: torch.Tensor,
    queue: torch.Tensor,
    temperature: torch.Tensor,
    teacher_query: torch.Tensor | None,
    alpha: float,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
    queue_ids: torch.Tensor | None,
    gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels; see the schema in `svitt_ops.queue_info_nce`."""
    rows, dim = query.shape
    arch = device_arch(query.device)
    which: ContrastPass = "queue" if teacher_query is None else "taught_queue"
    tile = contrast_tile(which, dim, rows, query.dtype, arch)
    slices = cdiv(dim, tile.slice) if gradients else 1
    tiles = cdiv(rows, tile.columns) + cdiv(queue.shape[0], tile.columns)
    splits, each = tile.splits(cdiv(rows, tile.rows) * slices, tiles * tile.columns)
    kinds = 1 if teacher_query is None else 2
    new = dict(dtype=torch.float32)
    stats = query.new_empty(splits, kinds, 3, rows, **new)
    sums = query.new_empty(splits if gradients else 0, kinds, rows, dim, **new)
    all_stats, all_sums = stats, sums
    if splits > 1:
        all_stats, all_sums = torch.empty_like(stats[:1]), torch.empty_like(sums[:1])
    inputs = (query, key, queue, teacher_query, temperature, query_ids, key_ids, queue_ids)
    steps = (
        query.stride(0), key.stride(0), queue.stride(0),
        0 if teacher_query is None else teacher_query.stride(0), dim,
    )  # fmt: skip
    with on_device(query):
        _sweep_kernel[(cdiv(rows, tile.rows), splits, slices)](
            *inputs, sums, stats, rows, queue.shape[0], splits, each, *steps, GRADIENTS=gradients,
            ROWS=tile.rows, COLUMNS=tile.columns, SLICE=tile.slice, **tile.dims(dim),
            **tile.options,
        )  # fmt: skip
        if splits > 1:
            width = min(next_pow2(dim), 128)
            _merge_kernel[(rows, kinds, cdiv(dim, width) if gradients else 1)](
                sums, stats, all_sums, all_stats, rows, splits, dim, GRADIENTS=gradients,
                SPLITS=next_pow2(splits), TILE=min(next_pow2(splits), 32), SLICE=width,
                **launch_options(),
            )  # fmt: skip
    tile = contrast_tile("combine", dim, rows, query.dtype, arch)
    return combine(inputs, steps, all_sums, all_stats, alpha, gradients, tile)


def queue_info_nce_backward(
    grad_loss: torch.Tensor,
    query: torch.Tensor,
    temperature: torch.Tensor,
    grad_query: torch.Tensor,
    grad_temperature: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients were computed with the loss: what comes from above multiplies them."""
    return (grad_query * grad_loss).to(query.dtype), grad_temperature * grad_loss

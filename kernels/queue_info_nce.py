"""InfoNCE against a batch and a queue: one sweep that sums candidates as attention sums values.

Tiling. A program owns `ROWS` queries and one of the splits of the candidates, which it walks in
tiles of `COLUMNS`: the batch's, then the queue's. It follows the softmax sums of the negatives, of
student and teacher, and with them the sums of the candidates that they weigh, `SLICE` dims of
them; where D is larger, the third axis of the grid is the slice. A second kernel puts the splits
together, a program a row; a third adds the positives, of which there are few, and writes the
gradient; a fourth, one program, the loss and the temperature's gradient.

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

from .info_nce import LOGIT_LIMIT, _log1p, _products, _rows
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


@triton.jit
def _own(
    a_ptr, key_ptr, a, rows, a_step, key_step, dim, ROWS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Dot products of rows of a with the keys of the same number."""
    x = tl.zeros([ROWS], tl.float32)
    for start in range(0, dim, CHUNK):
        d = start + tl.arange(0, CHUNK)
        left = _rows(a_ptr, a, rows, a_step, d, dim, False)
        right = _rows(key_ptr, a, rows, key_step, d, dim, False)
        x += tl.sum(left.to(tl.float32) * right.to(tl.float32), axis=1)
    return x


@triton.jit
def _same(query_ids_ptr, key_ids_ptr, queue_ids_ptr, a, b, rows, count, queued):
    """Which candidates b of the batch or of the queue are positives of which a."""
    exists = (a < rows)[:, None] & (b < count)[None, :]
    if query_ids_ptr is None:
        same = (a[:, None] == b[None, :]) & (queued == 0)
    else:
        a_ids = tl.load(query_ids_ptr + a, mask=a < rows, other=0)
        if queue_ids_ptr is None:
            b_ids = tl.load(key_ids_ptr + b, mask=b < tl.where(queued, 0, count), other=0)
            same = (a_ids[:, None] == b_ids[None, :]) & (queued == 0)
        else:
            ids_ptr = tl.where(queued, queue_ids_ptr, key_ids_ptr)
            b_ids = tl.load(ids_ptr + b, mask=b < count, other=0)
            same = a_ids[:, None] == b_ids[None, :]
    return exists & same


@triton.jit
def _candidates(
    key_ptr, queue_ptr, key_step, queue_step, rows, queue_rows, tile,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a tile: whether it is the queue's, pointer and step of that matrix, its rows, its size."""
    of_keys = tl.cdiv(rows, COLUMNS)
    queued = tile >= of_keys
    b = tl.where(queued, tile - of_keys, tile) * COLUMNS + tl.arange(0, COLUMNS)
    b_ptr = tl.where(queued, queue_ptr, key_ptr)
    b_step = tl.where(queued, queue_step, key_step)
    return queued, b_ptr, b_step, b, tl.where(queued, queue_rows, rows)


@triton.jit
def _usable(x, scale):
    """Similarities, NaN where one is too large for a logit: it stays in every sum."""
    return tl.where(tl.abs(x) * scale < LOGIT_LIMIT, x, float("nan"))


@triton.jit
def _weigh(most, total, moment, logits, similarity):
    """Logits of a tile join a softmax's sums; also their weights, and what older sums shrink by."""
    now = tl.maximum(most, tl.max(logits, axis=1))
    offset = tl.where(now == -float("inf"), 0.0, now)
    shrink = tl.exp(most - offset)
    weights = tl.exp(logits - offset[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    moment = moment * shrink + tl.sum(weights * similarity, axis=1)
    return now, total, moment, weights, shrink


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
    infinity = float("inf")
    usable = (temperature > 0) & (temperature < infinity)
    scale = tl.where(usable, 1.0 / temperature, float("nan"))
    near: tl.constexpr = min(CHUNK, 64)
    centre = _own(query_ptr, key_ptr, a, rows, query_step, key_step, dim, ROWS, near)
    left = a
    if WHOLE:
        left = _rows(query_ptr, a, rows, query_step, tl.arange(0, CHUNK), dim, EVEN)
    size = tl.abs(centre)
    most = tl.full([ROWS], -infinity, tl.float32)
    total = centre * 0.0
    moment = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, SLICE], tl.float32)
    if teacher_ptr is not None:
        taught_centre = _own(teacher_ptr, key_ptr, a, rows, teacher_step, key_step, dim, ROWS, near)
        taught = a
        if WHOLE:
            taught = _rows(teacher_ptr, a, rows, teacher_step, tl.arange(0, CHUNK), dim, EVEN)
        taught_size = tl.abs(taught_centre)
        taught_most = tl.full([ROWS], -infinity, tl.float32)
        taught_total = taught_centre * 0.0
        taught_moment = tl.zeros([ROWS], tl.float32)
        taught_sums = tl.zeros([ROWS, SLICE], tl.float32)
    tiles = tl.cdiv(rows, COLUMNS) + tl.cdiv(queue_rows, COLUMNS)
    for tile in range(split * each, tl.minimum(split * each + each, tiles)):
        queued, b_ptr, b_step, b, count = _candidates(
            key_ptr, queue_ptr, key_step, queue_step, rows, queue_rows, tile, COLUMNS
        )
        right = b
        if WHOLE:
            right = _rows(b_ptr, b, count, b_step, tl.arange(0, CHUNK), dim, EVEN)
        x = _products(
            left, right, query_ptr, b_ptr, a, b, rows, count, query_step, b_step, dim,
            CHUNK, WHOLE, EVEN,
        )  # fmt: skip
        size = tl.maximum(size, tl.max(tl.abs(x), axis=1))
        same = _same(query_ids_ptr, key_ids_ptr, queue_ids_ptr, a, b, rows, count, queued)
        negative = (b < count)[None, :] & (same == 0)
        similarity = tl.where(negative, x - centre[:, None], 0.0)
        logits = tl.where(negative, similarity * scale, -infinity)
        most, total, moment, weights, shrink = _weigh(most, total, moment, logits, similarity)
        if GRADIENTS:
            if WHOLE and CHUNK == SLICE:
                values = right
            else:
                values = _rows(b_ptr, b, count, b_step, d, dim, EVEN)
            sums = sums * shrink[:, None]
            sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="ieee")
        if teacher_ptr is not None:
            y = _products(
                taught, right, teacher_ptr, b_ptr, a, b, rows, count, teacher_step, b_step, dim,
                CHUNK, WHOLE, EVEN,
            )  # fmt: skip
            taught_size = tl.maximum(taught_size, tl.max(tl.abs(y), axis=1))
            logits = tl.where(negative, (y - taught_centre[:, None]) * scale, -infinity)
            taught_most, taught_total, taught_moment, weights, shrink = _weigh(
                taught_most, taught_total, taught_moment, logits, similarity
            )
            if GRADIENTS:
                taught_sums = taught_sums * shrink[:, None]
                taught_sums = tl.dot(
                    weights.to(values.dtype), values, taught_sums, input_precision="ieee"
                )
    # Similarities that are no logits make all NaN.
    total = tl.where(size * scale < LOGIT_LIMIT, total, float("nan"))
    exists = a < rows
    kinds: tl.constexpr = 1 if teacher_ptr is None else 2
    part = split * kinds * rows.to(tl.int64)
    if tl.program_id(2) == 0:
        tl.store(stats_ptr + 3 * part + a, most, mask=exists)
        tl.store(stats_ptr + 3 * part + rows + a, total, mask=exists)
        tl.store(stats_ptr + 3 * part + 2 * rows + a, moment, mask=exists)
        if teacher_ptr is not None:
            taught_total = tl.where(taught_size * scale < LOGIT_LIMIT, taught_total, float("nan"))
            other = 3 * (part + rows)
            tl.store(stats_ptr + other + a, taught_most, mask=exists)
            tl.store(stats_ptr + other + rows + a, taught_total, mask=exists)
            tl.store(stats_ptr + other + 2 * rows + a, taught_moment, mask=exists)
    if GRADIENTS:
        to = (part + a)[:, None] * dim + d[None, :]
        here = exists[:, None] & (d < dim)[None, :]
        tl.store(sums_ptr + to, sums, mask=here)
        if teacher_ptr is not None:
            tl.store(sums_ptr + to + rows.to(tl.int64) * dim, taught_sums, mask=here)


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


@triton.jit
def _sums(stats_ptr, a, rows, KIND: tl.constexpr):
    """Maximum, sum and mean similarity of the negatives."""
    part = stats_ptr + 3 * KIND * rows.to(tl.int64) + a
    most = tl.load(part, mask=a < rows, other=-float("inf"))
    total = tl.load(part + rows, mask=a < rows, other=0.0)
    moment = tl.load(part + 2 * rows, mask=a < rows, other=0.0)
    return most, total, moment / tl.where(total == 0, 1.0, total)


@triton.jit
def _shares(most, total, positive_most, positive_total):
    """Of all: log-sum-exp in fp64, share of the negatives; log-sum-exp of the positives."""
    negative = most.to(tl.float64) + tl.log(tl.where(total == 0, 1.0, total)).to(tl.float64)
    positive = positive_most.to(tl.float64)
    positive += tl.log(tl.where(positive_total == 0, 1.0, positive_total)).to(tl.float64)
    # One of them may be -inf, and both in rows that do not exist.
    gap = tl.where(negative == positive, 0.0, negative - positive).to(tl.float32)
    rest = _log1p(tl.exp(-tl.abs(gap)))
    lse = tl.maximum(negative, positive) + rest.to(tl.float64)
    lost = tl.exp(tl.minimum(gap, 0.0) - rest)
    return lse, lost, positive


@triton.jit
def _among(logits, lse, one):
    """Shares of the positives among themselves: 1 of an only one, whatever digits its lse lost."""
    high = lse.to(tl.float32)
    low = (lse - high.to(tl.float64)).to(tl.float32)
    shares = tl.exp(tl.minimum(logits - high[:, None] - low[:, None], 0.0))
    return tl.where(one, 1.0, shares)


@triton.jit(do_not_specialize=["rows", "queue_rows"])
def _combine_kernel(
    query_ptr, key_ptr, queue_ptr, teacher_ptr, temperature_ptr, query_ids_ptr, key_ids_ptr,
    queue_ids_ptr, sums_ptr, stats_ptr, grad_ptr, losses_ptr, moments_ptr, alpha,
    rows, queue_rows, query_step, key_step, queue_step, teacher_step, dim,
    GRADIENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """Loss, temperature moment and one slice of the gradient of some queries."""
    a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    scale = 1.0 / tl.load(temperature_ptr)
    infinity = float("inf")
    exists = a < rows
    tiles = tl.cdiv(rows, COLUMNS) + tl.cdiv(queue_rows, COLUMNS)

    # The positives: without ids the own pair, of logit and similarity 0.
    pairs = tl.full([ROWS], 1.0, tl.float32)
    same_sum = tl.zeros([ROWS], tl.float32)
    positive_most = tl.zeros([ROWS], tl.float32)
    positive_total = tl.full([ROWS], 1.0, tl.float32)
    taught_pos_most = tl.zeros([ROWS], tl.float32)
    taught_pos_total = tl.full([ROWS], 1.0, tl.float32)
    taught_pos_moment = tl.zeros([ROWS], tl.float32)
    if query_ids_ptr is not None:
        centre = _own(query_ptr, key_ptr, a, rows, query_step, key_step, dim, ROWS, CHUNK)
        if teacher_ptr is not None:
            taught_centre = _own(
                teacher_ptr, key_ptr, a, rows, teacher_step, key_step, dim, ROWS, CHUNK
            )
        pairs = tl.zeros([ROWS], tl.float32)
        positive_most = tl.full([ROWS], -infinity, tl.float32)
        positive_total = tl.zeros([ROWS], tl.float32)
        positive_moment = tl.zeros([ROWS], tl.float32)
        taught_pos_most = tl.full([ROWS], -infinity, tl.float32)
        taught_pos_total = tl.zeros([ROWS], tl.float32)
        for tile in range(0, tiles):
            queued, b_ptr, b_step, b, count = _candidates(
                key_ptr, queue_ptr, key_step, queue_step, rows, queue_rows, tile, COLUMNS
            )
            same = _same(query_ids_ptr, key_ids_ptr, queue_ids_ptr, a, b, rows, count, queued)
            if tl.max(same.to(tl.int32)) != 0:
                x = _products(
                    a, b, query_ptr, b_ptr, a, b, rows, count, query_step, b_step, dim,
                    CHUNK, False, False,
                )  # fmt: skip
                x = _usable(x, scale)
                other = (a[:, None] != b[None, :]) | queued
                similarity = tl.where(same & other, x - centre[:, None], 0.0)
                pairs += tl.sum(same.to(tl.float32), axis=1)
                same_sum += tl.sum(similarity, axis=1)
                logits = tl.where(other, (x - centre[:, None]) * scale, 0.0)
                positive_most, positive_total, positive_moment, _, _ = _weigh(
                    positive_most, positive_total, positive_moment,
                    tl.where(same, logits, -infinity), similarity,
                )  # fmt: skip
                if teacher_ptr is not None:
                    y = _products(
                        a, b, teacher_ptr, b_ptr, a, b, rows, count, teacher_step, b_step, dim,
                        CHUNK, False, False,
                    )  # fmt: skip
                    y = _usable(y, scale)
                    logits = tl.where(other, (y - taught_centre[:, None]) * scale, 0.0)
                    taught_pos_most, taught_pos_total, taught_pos_moment, _, _ = _weigh(
                        taught_pos_most, taught_pos_total, taught_pos_moment,
                        tl.where(same, logits, -infinity), similarity,
                    )  # fmt: skip

    most, total, mean = _sums(stats_ptr, a, rows, 0)
    lse, lost, positive = _shares(most, total, positive_most, positive_total)
    hard = tl.where(pairs > 0, 1.0 - alpha, 0.0)
    every = hard + alpha
    mean_same = same_sum / tl.where(pairs == 0, 1.0, pairs)
    # fp64: what is subtracted may be large where its difference is not.
    loss = every.to(tl.float64) * lse - (hard * scale).to(tl.float64) * mean_same.to(tl.float64)
    moment = every * lost * mean
    if teacher_ptr is not None:
        taught_most, taught_total, taught_mean = _sums(stats_ptr, a, rows, 1)
        _, taught_lost, taught_pos = _shares(
            taught_most, taught_total, taught_pos_most, taught_pos_total
        )
        positive_mean = taught_pos_moment / tl.where(taught_pos_total == 0, 1.0, taught_pos_total)
        expected = taught_lost * taught_mean + (1.0 - taught_lost) * positive_mean
        loss -= (alpha * scale).to(tl.float64) * expected.to(tl.float64)
        moment -= alpha * taught_lost * taught_mean

    if GRADIENTS:
        here = exists[:, None] & (d < dim)[None, :]
        to = a.to(tl.int64)[:, None] * dim + d[None, :]
        share = every * lost / tl.where(total == 0, 1.0, total)
        grad = share[:, None] * tl.load(sums_ptr + to, mask=here, other=0.0)
        if teacher_ptr is not None:
            share = alpha * taught_lost / tl.where(taught_total == 0, 1.0, taught_total)
            to += rows.to(tl.int64) * dim
            grad -= share[:, None] * tl.load(sums_ptr + to, mask=here, other=0.0)
        if query_ids_ptr is None:
            weight = -lost
            if teacher_ptr is not None:
                weight += alpha * taught_lost
            own = _rows(key_ptr, a, rows, key_step, d, dim, False)
            grad += weight[:, None] * own.to(tl.float32)
        else:
            for tile in range(0, tiles):
                queued, b_ptr, b_step, b, count = _candidates(
                    key_ptr, queue_ptr, key_step, queue_step, rows, queue_rows, tile, COLUMNS
                )
                same = _same(query_ids_ptr, key_ids_ptr, queue_ids_ptr, a, b, rows, count, queued)
                if tl.max(same.to(tl.int32)) != 0:
                    x = _products(
                        a, b, query_ptr, b_ptr, a, b, rows, count, query_step, b_step, dim,
                        CHUNK, False, False,
                    )  # fmt: skip
                    other = (a[:, None] != b[None, :]) | queued
                    similarity = tl.where(other, x - centre[:, None], 0.0)
                    one = (pairs == 1.0)[:, None]
                    logits = tl.where(other, (x - centre[:, None]) * scale, 0.0)
                    among = _among(logits, positive, one)
                    kept = among - (hard / tl.where(pairs == 0, 1.0, pairs))[:, None]
                    weight = -lost[:, None] * among
                    if teacher_ptr is not None:
                        y = _products(
                            a, b, teacher_ptr, b_ptr, a, b, rows, count, teacher_step, b_step, dim,
                            CHUNK, False, False,
                        )  # fmt: skip
                        logits = tl.where(other, (y - taught_centre[:, None]) * scale, 0.0)
                        among = _among(logits, taught_pos, one)
                        kept -= alpha * among
                        weight += alpha * taught_lost[:, None] * among
                    weight = tl.where(same, weight + tl.where(one, 0.0, kept), 0.0)
                    moment += tl.sum(weight * similarity, axis=1)
                    values = _rows(b_ptr, b, count, b_step, d, dim, False)
                    grad += tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        to = a.to(tl.int64)[:, None] * dim + d[None, :]
        tl.store(grad_ptr + to, grad * (scale / rows), mask=here)
    if tl.program_id(1) == 0:
        tl.store(losses_ptr + a, loss.to(tl.float32), mask=exists)
        tl.store(moments_ptr + a, moment, mask=exists)


@triton.jit(do_not_specialize=["rows"])
def _mean_kernel(
    losses_ptr, moments_ptr, temperature_ptr, loss_ptr, grad_ptr, rows, TILE: tl.constexpr
):  # fmt: skip
    """Mean loss and the temperature's gradient, by one program."""
    loss = tl.zeros([TILE], tl.float32)
    moment = tl.zeros([TILE], tl.float32)
    for start in range(0, rows, TILE):
        i = start + tl.arange(0, TILE)
        loss += tl.load(losses_ptr + i, mask=i < rows, other=0.0)
        moment += tl.load(moments_ptr + i, mask=i < rows, other=0.0)
    scale = 1.0 / tl.load(temperature_ptr)
    tl.store(loss_ptr, tl.sum(loss, axis=0) / rows)
    tl.store(grad_ptr, -scale * scale * tl.sum(moment, axis=0) / rows)


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
    """Launch the three kernels; see the schema in `svitt_ops.queue_info_nce`."""
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
    losses, moments = query.new_empty(2, rows, **new)
    loss, grad_temperature = query.new_empty((), **new), query.new_empty((), **new)
    grad = query.new_empty(rows if gradients else 0, dim, **new)
    all_stats, all_sums = stats, sums
    if splits > 1:
        all_stats, all_sums = torch.empty_like(stats[:1]), torch.empty_like(sums[:1])
    inputs = (query, key, queue, teacher_query, temperature, query_ids, key_ids, queue_ids)
    steps = (
        query.stride(0), key.stride(0), queue.stride(0),
        0 if teacher_query is None else teacher_query.stride(0), dim,
    )  # fmt: skip
    combine = contrast_tile("combine", dim, rows, query.dtype, arch)
    parts = cdiv(dim, combine.slice) if gradients else 1
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
        _combine_kernel[(cdiv(rows, combine.rows), parts)](
            *inputs, all_sums, all_stats, grad, losses, moments, alpha, rows, queue.shape[0],
            *steps, GRADIENTS=gradients, ROWS=combine.rows, COLUMNS=combine.columns,
            CHUNK=combine.chunk, SLICE=combine.slice, **combine.options,
        )  # fmt: skip
        _mean_kernel[(1,)](
            losses, moments, temperature, loss, grad_temperature, rows,
            TILE=min(256, next_pow2(rows)), **launch_options(),
        )  # fmt: skip
    return loss, grad, grad_temperature


def queue_info_nce_backward(
    grad_loss: torch.Tensor,
    query: torch.Tensor,
    temperature: torch.Tensor,
    grad_query: torch.Tensor,
    grad_temperature: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients were computed with the loss: what comes from above multiplies them."""
    return (grad_query * grad_loss).to(query.dtype), grad_temperature * grad_loss

"""Of InfoNCE against a batch and a queue, what follows the sweep: positives, gradient, loss.

Tiling. A program owns `ROWS` queries and one slice of `SLICE` dims of their gradient. Without ids
the only positive of a query is its own pair; with ids it walks the ids of all candidates in tiles
of `COLUMNS`, twice, and multiplies where a tile holds a positive, of which there are few. One more
program adds up the loss and the temperature's gradient.

Work and traffic: the sums of the sweep and the gradient once each; with ids those of all candidates
twice a program, and the positives' products. Numerics: as in the sweep; the positives' weight is
the negatives' share.

Source: ALBEF (Li et al., 2021), section 3.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .contrast_walk import _products, _rows
from .info_nce import LOGIT_LIMIT, _log1p
from .tiles import ContrastTile, cdiv, launch_options, next_pow2, on_device


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


def combine(
    inputs: tuple[torch.Tensor | None, ...],
    steps: tuple[int, ...],
    sums: torch.Tensor,
    stats: torch.Tensor,
    alpha: float,
    gradients: bool,
    tile: ContrastTile,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch what follows the sweep, whose inputs and steps are given; what the op returns.

    Args:
        inputs: query, key, queue, teacher, temperature, ids of query, key and queue.
        steps: from row to row of the first four, and their dims.
        sums: fp32 (1, kinds, rows, dim), weighted candidates of the negatives.
        stats: fp32 (1, kinds, 3, rows), their maxima, sums of exponentials, and of similarities.
        alpha: the teacher's share.
        gradients: whether to write them.
        tile: of the table's pass "combine".
    """
    query, _, queue, _, temperature, *_ = inputs
    assert query is not None and queue is not None
    rows, dim = query.shape
    new = dict(dtype=torch.float32)
    losses, moments = query.new_empty(2, rows, **new)
    loss, grad_temperature = query.new_empty((), **new), query.new_empty((), **new)
    grad = query.new_empty(rows if gradients else 0, dim, **new)
    slices = cdiv(dim, tile.slice) if gradients else 1
    with on_device(query):
        _combine_kernel[(cdiv(rows, tile.rows), slices)](
            *inputs, sums, stats, grad, losses, moments, alpha, rows, queue.shape[0], *steps,
            GRADIENTS=gradients, ROWS=tile.rows, COLUMNS=tile.columns, CHUNK=tile.chunk,
            SLICE=tile.slice, **tile.options,
        )  # fmt: skip
        _mean_kernel[(1,)](
            losses, moments, temperature, loss, grad_temperature, rows,
            TILE=min(256, next_pow2(rows)), **launch_options(),
        )  # fmt: skip
    return loss, grad, grad_temperature

"""InfoNCE against a batch and a queue: one sweep that sums candidates as attention sums values.

Tiling. A program owns `ROWS` queries and one of the splits of the candidates, which it walks in
tiles of `COLUMNS`: the batch's, then the queue's. It follows the softmax sums of the negatives, of
student and teacher, and with them the sums of the candidates that they weigh, `SLICE` dims of
them; where D is larger, the third axis of the grid is the slice. A second kernel puts the splits
together, a program a row; `queue_info_nce_combine` does the rest.

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

from .info_nce import LOGIT_LIMIT, _products, _rows
from .queue_info_nce_combine import _candidates, _own, _same, _weigh, combine
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

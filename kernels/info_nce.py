"""InfoNCE: log-sum-exp statistics and gradients of similarities that are never written.

Tiling. A program owns `ROWS` queries and walks all keys in tiles of `COLUMNS`, or the other way
round: the second axis of the grid is the direction, so one launch computes both, and what belongs
to a row is summed by one program in a fixed order. The dot products of a tile are summed over the
dims in chunks of `CHUNK`. The backward recomputes them and multiplies the weights with `SLICE` dims
of the other side; where D is larger, the third axis of the grid is the slice, and each recomputes.
Forward and backward are two launches each: the walk, and one program that reduces (the loss, the
temperature's gradient).

Work and traffic, U = 2 B B D: 2 U forward, 4 U backward for D of one slice (4 U in all would be the
least that a matrix which is not kept allows). A tile of COLUMNS rows is read once per program, from
L2 while both sides fit it: 2 B B D e / ROWS bytes a direction. Results are O(B D).

Numerics. Dot products accumulate in fp32 (fp32 inputs without TF32), 1 / temperature multiplies
them in fp32 afterwards. Maxima are followed online, positives are summed apart from the negatives
and get their weight from the negatives' share. Statistics are fp64, added up from fp32 parts:
a rounded log-sum-exp would cost digits at low temperatures. No atomics: a rerun is bitwise
identical.

Source: CLIP (Radford et al., 2021), figure 3; FlashAttention (Dao et al., 2022) for the sweep.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tiles import cdiv, contrast_tile, device_arch, launch_options, next_pow2, on_device

STATISTICS = 5
CENTRE_ROWS = 128
"""Rows whose positives tell how large a similarity of a pair is."""
_SIZES = ["a_count", "b_count"]
LOGIT_LIMIT = tl.constexpr(1e9)  # as in the reference


@triton.jit
def _load(ptr, i, count, step, d, dim):
    """Dims d of rows i; 0 where there are none."""
    here = (i < count)[:, None] & (d < dim)[None, :]
    return tl.load(ptr + i.to(tl.int64)[:, None] * step + d[None, :], mask=here, other=0.0)


@triton.jit
def _dots(
    a_ptr, b_ptr, a, b, a_count, b_count, a_step, b_step, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Dot products of rows a with rows b."""
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, dim, CHUNK):
        d = start + tl.arange(0, CHUNK)
        left = _load(a_ptr, a, a_count, a_step, d, dim)
        right = tl.load(
            b_ptr + b.to(tl.int64)[None, :] * b_step + d[:, None],
            mask=(b < b_count)[None, :] & (d < dim)[:, None],
            other=0.0,
        )
        x += tl.dot(left, right, input_precision="ieee")
    return x


@triton.jit
def _limit(temperature):
    """Similarities of this size or more are no logits; at a temperature that is none, none are."""
    usable = (temperature > 0) & (temperature < float("inf"))
    return tl.where(usable, LOGIT_LIMIT * temperature, -1.0)


@triton.jit
def _positives(a_ids_ptr, b_ids_ptr, a, b, a_count, b_count, shift):
    """Which b are positives of which a: equal ids or, without ids, b = a + shift."""
    exists = (a < a_count)[:, None] & (b < b_count)[None, :]
    if a_ids_ptr is None:
        same = (a + shift)[:, None] == b[None, :]
    else:
        a_ids = tl.load(a_ids_ptr + a, mask=a < a_count, other=0)
        b_ids = tl.load(b_ids_ptr + b, mask=b < b_count, other=0)
        same = a_ids[:, None] == b_ids[None, :]
    return exists & same


@triton.jit
def _join(most, total, logits):
    """An online log-sum-exp takes in the logits of a tile."""
    now = tl.maximum(most, tl.max(logits, axis=1))
    offset = tl.where(now == -float("inf"), 0.0, now)
    total = total * tl.exp(most - offset)
    return now, total + tl.sum(tl.exp(logits - offset[:, None]), axis=1)


@triton.jit
def _sweep(
    a_ptr, b_ptr, a_ids_ptr, b_ids_ptr, out_ptr, scale, limit, shift,
    a_count, b_count, a_step, b_step, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Statistics of some rows of a over all rows of b."""
    a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    infinity = float("inf")
    most = tl.full([ROWS], -infinity, tl.float32)
    positive_most = tl.full([ROWS], -infinity, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    positive_total = tl.zeros([ROWS], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    pairs = tl.zeros([ROWS], tl.float32)
    every = tl.zeros([ROWS], tl.float32)
    for start in range(0, b_count, COLUMNS):
        b = start + tl.arange(0, COLUMNS)
        x = _dots(a_ptr, b_ptr, a, b, a_count, b_count, a_step, b_step, dim, ROWS, COLUMNS, CHUNK)
        same = _positives(a_ids_ptr, b_ids_ptr, a, b, a_count, b_count, shift)
        negative = (b < b_count)[None, :] & (same == 0)
        most, total = _join(most, total, tl.where(negative, x * scale, -infinity))
        positive_most, positive_total = _join(
            positive_most, positive_total, tl.where(same, x * scale, -infinity)
        )
        count += tl.sum(same.to(tl.float32), axis=1)
        pairs += tl.sum(tl.where(same, x, 0.0), axis=1)
        every += tl.sum(tl.where(tl.abs(x) < limit, x, float("nan")), axis=1)
    exists = a < a_count
    kind = out_ptr.dtype.element_ty
    # A maximum of -inf stands for a row without such pairs.
    lse = most.to(kind) + tl.log(tl.where(total == 0, 1.0, total)).to(kind)
    total = tl.where(positive_total == 0, 1.0, positive_total)
    positive_lse = positive_most.to(kind) + tl.log(total).to(kind)
    stack = a_count.to(tl.int64)
    tl.store(out_ptr + a, lse, mask=exists)
    tl.store(out_ptr + stack + a, positive_lse, mask=exists)
    tl.store(out_ptr + 2 * stack + a, count, mask=exists)
    tl.store(out_ptr + 3 * stack + a, pairs, mask=exists)
    tl.store(out_ptr + 4 * stack + a, every, mask=exists)


@triton.jit(do_not_specialize=["first_row", *_SIZES])
def _statistics_kernel(
    query_ptr, key_ptr, temperature_ptr, query_ids_ptr, key_ids_ptr, rows_ptr, columns_ptr,
    first_row, a_count, b_count, query_step, key_step, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Queries over keys, or on the second axis of the grid keys over queries."""
    temperature = tl.load(temperature_ptr)
    scale, limit = 1.0 / temperature, _limit(temperature)
    if tl.program_id(1) == 0:
        _sweep(
            query_ptr, key_ptr, query_ids_ptr, key_ids_ptr, rows_ptr, scale, limit, first_row,
            a_count, b_count, query_step, key_step, dim, ROWS, COLUMNS, CHUNK,
        )  # fmt: skip
    else:
        _sweep(
            key_ptr, query_ptr, key_ids_ptr, query_ids_ptr, columns_ptr, scale, limit, -first_row,
            b_count, a_count, key_step, query_step, dim, ROWS, COLUMNS, CHUNK,
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
def _sum_losses(stats_ptr, count, choices, scale, label_smoothing, TILE: tl.constexpr):
    """Sum of the rows' losses; the formula is `svitt_ops.info_nce.losses`."""
    found = tl.zeros([TILE], tl.float32)
    stack = count.to(tl.int64)
    for start in range(0, count, TILE):
        i = start + tl.arange(0, TILE)
        here = i < count
        negative = tl.load(stats_ptr + i, mask=here, other=-float("inf"))
        positive = tl.load(stats_ptr + stack + i, mask=here, other=0.0)
        pairs = tl.load(stats_ptr + 2 * stack + i, mask=here, other=1.0).to(tl.float32)
        same = tl.load(stats_ptr + 3 * stack + i, mask=here, other=0.0).to(tl.float32) / pairs
        every = tl.load(stats_ptr + 4 * stack + i, mask=here, other=0.0).to(tl.float32)
        gap = (negative - positive).to(tl.float32)
        found += tl.maximum(gap, 0.0) + _log1p(tl.exp(-tl.abs(gap)))
        spread = (positive - (same * scale).to(positive.dtype)).to(tl.float32)
        found += tl.where(here & (pairs != 1.0), spread, 0.0)
        smooth = label_smoothing * scale * (same - every / choices)
        found += tl.where(here, smooth, 0.0)
    return tl.sum(found, axis=0)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "choices"])
def _loss_kernel(
    rows_ptr, columns_ptr, temperature_ptr, loss_ptr, num_rows, num_columns, choices,
    label_smoothing, BOTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The mean loss of both directions, by one program."""
    scale = 1.0 / tl.load(temperature_ptr)
    loss = _sum_losses(rows_ptr, num_rows, choices, scale, label_smoothing, TILE) / num_rows
    if BOTH:
        other = _sum_losses(columns_ptr, num_columns, choices, scale, label_smoothing, TILE)
        loss = 0.5 * (loss + other / num_columns)
    tl.store(loss_ptr, loss)
    # A similarity that is no logit made a row's sum of all NaN, and nothing of the batch is left: a
    # NaN among the counts tells the backward, on all ranks.
    bad = tl.zeros([TILE], tl.float64)
    for start in range(0, num_rows, TILE):
        i = start + tl.arange(0, TILE)
        every = tl.load(rows_ptr + 4 * num_rows.to(tl.int64) + i, mask=i < num_rows, other=0.0)
        bad += every * 0.0
    bad = tl.sum(bad, axis=0)
    counts_ptr = rows_ptr + 2 * num_rows.to(tl.int64)
    tl.store(counts_ptr, tl.load(counts_ptr) + bad)
    if BOTH:
        counts_ptr = columns_ptr + 2 * num_columns.to(tl.int64)
        tl.store(counts_ptr, tl.load(counts_ptr) + bad)


def info_nce(
    query: torch.Tensor,
    key: torch.Tensor,
    temperature: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
    first_row: int,
    symmetric: bool,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the statistics and the loss; see the schema in `svitt_ops.info_nce`."""
    (queries, dim), keys = query.shape, key.shape[0]
    rows = query.new_empty(STATISTICS, queries, dtype=torch.float64)
    columns = query.new_empty(STATISTICS, keys if symmetric else 0, dtype=torch.float64)
    loss = query.new_empty((), dtype=torch.float32)
    tile = contrast_tile("forward", dim, max(queries, keys), query.dtype, device_arch(query.device))
    grid = (cdiv(max(queries, keys) if symmetric else queries, tile.rows), 2 if symmetric else 1)
    with on_device(query):
        _statistics_kernel[grid](
            query, key, temperature, query_ids, key_ids, rows, columns, first_row,
            queries, keys, query.stride(0), key.stride(0), dim,
            ROWS=tile.rows, COLUMNS=tile.columns, CHUNK=tile.chunk, **tile.options,
        )  # fmt: skip
        _loss_kernel[(1,)](
            rows, columns, temperature, loss, queries, keys, keys, label_smoothing,
            BOTH=symmetric, TILE=min(256, next_pow2(max(queries, keys))), maxnreg=255,
            **launch_options(),
        )  # fmt: skip
    return loss, rows, columns

"""InfoNCE backward; tiling, traffic and numerics are described in `info_nce`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .info_nce import _SIZES, CENTRE_ROWS, _dots, _load, _log1p, _positives
from .tiles import cdiv, contrast_tile, device_arch, launch_options, on_device


@triton.jit
def _load_side(stats_ptr, i, count):
    """Of some rows: log-sum-exp as two floats, positives' log-sum-exp less it, log share of the
    negatives, number of positives.
    """
    here = i < count
    stack = count.to(tl.int64)
    negative = tl.load(stats_ptr + i, mask=here, other=0.0)
    positive = tl.load(stats_ptr + stack + i, mask=here, other=0.0)
    pairs = tl.load(stats_ptr + 2 * stack + i, mask=here, other=1.0).to(tl.float32)
    gap = (negative - positive).to(tl.float32)
    rest = _log1p(tl.exp(-tl.abs(gap)))
    total = tl.maximum(negative, positive) + rest.to(negative.dtype)
    high = total.to(tl.float32)
    low = (total - high.to(total.dtype)).to(tl.float32)
    share = tl.exp(-tl.maximum(gap, 0.0) - rest)  # of the positives
    lost = tl.exp(tl.minimum(gap, 0.0) - rest)  # of the negatives
    high_positive = positive.to(tl.float32)
    low_positive = (positive - high_positive.to(positive.dtype)).to(tl.float32)
    return high, low, share, lost, high_positive, low_positive, pairs


@triton.jit
def _kept(logits, share, lost, high, low, pairs, label_smoothing):
    """Weight of a positive: softmax less target, from the negatives' share."""
    among = tl.exp(tl.minimum(logits - high - low, 0.0))
    among = tl.where(pairs == 1.0, 1.0, among)
    return share * (among - 1.0 / pairs) - (lost - label_smoothing) / pairs


@triton.jit
def _sweep(
    a_ptr, b_ptr, a_ids_ptr, b_ids_ptr, of_a_ptr, of_b_ptr, grad_ptr, scale, shift, factor,
    label_smoothing, smoothing, centre, a_count, b_count, a_step, b_step, dim,
    A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One slice of dims of the gradient of some rows of a; sum of weight times similarity."""
    a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    grad = tl.zeros([ROWS, SLICE], tl.float32)
    by_scale = tl.zeros([ROWS], tl.float32)
    if A:
        high, low, share, lost, high_pos, low_pos, pairs = _load_side(of_a_ptr, a, a_count)
    for start in range(0, b_count, COLUMNS):
        b = start + tl.arange(0, COLUMNS)
        x = _dots(a_ptr, b_ptr, a, b, a_count, b_count, a_step, b_step, dim, ROWS, COLUMNS, CHUNK)
        same = _positives(a_ids_ptr, b_ids_ptr, a, b, a_count, b_count, shift)
        logits = x * scale
        weight = tl.zeros([ROWS, COLUMNS], tl.float32)
        kept = tl.zeros([ROWS, COLUMNS], tl.float32)
        if A:
            weight += tl.exp(tl.minimum(logits - high[:, None] - low[:, None], 0.0))
            kept += _kept(
                logits, share[:, None], lost[:, None], high_pos[:, None], low_pos[:, None],
                pairs[:, None], label_smoothing,
            )  # fmt: skip
        if B:
            b_high, b_low, b_share, b_lost, b_high_pos, b_low_pos, b_pairs = _load_side(
                of_b_ptr, b, b_count
            )
            weight += tl.exp(tl.minimum(logits - b_high[None, :] - b_low[None, :], 0.0))
            kept += _kept(
                logits, b_share[None, :], b_lost[None, :], b_high_pos[None, :],
                b_low_pos[None, :], b_pairs[None, :], label_smoothing,
            )  # fmt: skip
        exists = (a < a_count)[:, None] & (b < b_count)[None, :]
        weight = tl.where(exists, tl.where(same, kept, weight) - smoothing, 0.0)
        by_scale += tl.sum(weight * (x - centre), axis=1)
        right = _load(b_ptr, b, b_count, b_step, d, dim)
        grad += tl.dot(weight.to(right.dtype), right, input_precision="ieee")
    tl.store(
        grad_ptr + a.to(tl.int64)[:, None] * dim + d[None, :],
        (grad * factor * scale).to(grad_ptr.dtype.element_ty),
        mask=(a < a_count)[:, None] & (d < dim)[None, :],
    )
    return tl.sum(by_scale, axis=0)


@triton.jit(do_not_specialize=["first_row", *_SIZES])
def _gradient_kernel(
    grad_loss_ptr, query_ptr, key_ptr, temperature_ptr, query_ids_ptr, key_ids_ptr, rows_ptr,
    columns_ptr, grad_query_ptr, grad_key_ptr, parts_ptr, label_smoothing, first_row,
    a_count, b_count, query_step, key_step, dim,
    BOTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    SLICE: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """Gradient of queries or, on the second axis of the grid, of keys."""
    scale = 1.0 / tl.load(temperature_ptr)
    factor = tl.load(grad_loss_ptr) / b_count
    smoothing = label_smoothing / b_count
    # Weights add up to 0 over everything, so similarities may be taken from any centre; near
    # theirs, rounded weights do no harm where all similarities are alike.
    i = tl.arange(0, CENTRE)
    if BOTH:
        factor *= 0.5
        smoothing *= 2.0
        count, stats_ptr = b_count, columns_ptr
    else:
        count, stats_ptr = a_count, rows_ptr
    pairs = tl.load(stats_ptr + 2 * count.to(tl.int64) + i, mask=i < count, other=0.0)
    same = tl.load(stats_ptr + 3 * count.to(tl.int64) + i, mask=i < count, other=0.0)
    centre = (tl.sum(same, axis=0) / tl.sum(pairs, axis=0)).to(tl.float32)
    factor += centre * 0.0  # NaN where the forward found a similarity that is no logit
    if tl.program_id(1) == 0:
        if tl.program_id(0) * ROWS < a_count:
            part = _sweep(
                query_ptr, key_ptr, query_ids_ptr, key_ids_ptr, rows_ptr, columns_ptr,
                grad_query_ptr, scale, first_row, factor, label_smoothing, smoothing, centre,
                a_count, b_count, query_step, key_step, dim,
                True, BOTH, ROWS, COLUMNS, CHUNK, SLICE,
            )  # fmt: skip
            if tl.program_id(2) == 0:
                tl.store(parts_ptr + tl.program_id(0), part * factor * scale * scale)
    else:
        _sweep(
            key_ptr, query_ptr, key_ids_ptr, query_ids_ptr, columns_ptr, rows_ptr,
            grad_key_ptr, scale, -first_row, factor, label_smoothing, smoothing, centre,
            b_count, a_count, key_step, query_step, dim,
            BOTH, True, ROWS, COLUMNS, CHUNK, SLICE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(parts_ptr, out_ptr, count, TILE: tl.constexpr):
    """Minus the sum of the parts, by one program."""
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
    tile = contrast_tile(
        "backward", dim, max(queries, keys), query.dtype, device_arch(query.device)
    )
    parts = query.new_empty(cdiv(queries, tile.rows), dtype=torch.float32)
    grid = (cdiv(max(queries, keys), tile.rows), 2, cdiv(dim, tile.slice))
    with on_device(query):
        _gradient_kernel[grid](
            grad_loss, query, key, temperature, query_ids, key_ids, rows, columns,
            grad_query, grad_key, parts, label_smoothing, first_row,
            queries, keys, query.stride(0), key.stride(0), dim,
            BOTH=columns.numel() > 0, ROWS=tile.rows, COLUMNS=tile.columns, CHUNK=tile.chunk,
            SLICE=tile.slice, CENTRE=CENTRE_ROWS, **tile.options,
        )  # fmt: skip
        _sum_kernel[(1,)](
            parts, grad_temperature, parts.shape[0], TILE=256, **launch_options()
        )  # fmt: skip
    return grad_query, grad_key, grad_temperature

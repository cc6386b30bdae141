"""How the contrastive kernels walk tiles: which are special, where their rows are, sums by thread.

A tile is special if it holds positives, where there are no ids, or columns that do not exist. Loops
over the others know of neither. Nothing that runs over a row or a column leaves a thread while a
loop turns: what a thread found is put together once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e38)
"""A top where nothing was summed yet: finite, so that no exponent is inf - inf."""


@triton.jit
def _diagonal(first, shift, begin, end, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of the tiles from begin to end the first with positives, and how many there are."""
    low = tl.maximum(tl.maximum(first + shift, 0) // COLUMNS, begin)
    high = tl.minimum(tl.cdiv(tl.maximum(first + shift + ROWS, 0), COLUMNS), end)
    return low, tl.maximum(high - low, 0)


@triton.jit
def _take(ptr, at, exists, d, dim, EVEN: tl.constexpr):
    """Rows at offsets `at` of ptr: 0 for dims and, unless `exists` is None, rows there are not."""
    if exists is None:
        here = None if EVEN else (d < dim)[None, :]
    else:
        here = exists[:, None] if EVEN else exists[:, None] & (d < dim)[None, :]
    return tl.load(ptr + at) if here is None else tl.load(ptr + at, mask=here, other=0.0)


@triton.jit
def _dots(
    left, right, a_ptr, a_at, b_ptr, b_at, exists, dim,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Dot products of rows at `a_at` with rows at `b_at`, which are `left` and `right` if WHOLE."""
    if WHOLE:
        x = tl.dot(left, tl.trans(right), input_precision="ieee")
    else:
        x = tl.zeros([a_at.shape[0], b_at.shape[0]], tl.float32)
        for start in range(0, dim, CHUNK):
            d = start + tl.arange(0, CHUNK)
            part = _take(a_ptr + start, a_at, None, d, dim, EVEN)
            other = _take(b_ptr + start, b_at, exists, d, dim, EVEN)
            x = tl.dot(part, tl.trans(other), x, input_precision="ieee")
    return x


@triton.jit
def _by_thread(x, SINGLE: tl.constexpr):
    """(rows, columns) as (rows, threads, each): what a thread holds of a row is along the last.

    To reduce that takes no shuffle; another layout of a product than meant here costs some, and no
    more. SINGLE: of fp32 inputs, without tensor cores.
    """
    pair: tl.constexpr = 4 if SINGLE else 2
    lanes: tl.constexpr = min(16 if SINGLE else 4, x.shape[1] // pair)
    each: tl.constexpr = x.shape[1] // (lanes * pair)
    apart = tl.permute(tl.reshape(x, [x.shape[0], each, lanes, pair]), [0, 2, 1, 3])
    return tl.reshape(apart, [x.shape[0], lanes, each * pair])


@triton.jit
def _join(top, total, x, rate):
    """Online sums of 2^(rate x - top) take in a tile by thread; each thread has a top of its own.

    A top starts at LOWEST, and is rounded where the exponent is not: `_of_row` makes up for both.
    """
    now = tl.maximum(top, tl.max(x, axis=2) * rate)
    power = tl.exp2(tl.fma(x, rate, -now[:, :, None]))
    return now, total * tl.exp2(top - now) + tl.sum(power, axis=2)


@triton.jit
def _of_row(top, total, rate):
    """Of a row from its threads: a similarity at the top, the sum of 2^(rate x) relative to it."""
    high = tl.max(top, axis=1)
    some = high > LOWEST
    high = tl.where(some, high, 0.0)
    total = tl.sum(total * tl.exp2(top - high[:, None]), axis=1)
    most = high / rate
    total *= tl.exp2(-tl.fma(most, rate, -high))
    return tl.where(some, most, -float("inf")), total


@triton.jit
def _products_of(
    left, a_ptr, a_at, b_ptr, b_at, tile, exists, b_step, dim,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Dot products of the rows of a with a tile of b."""
    tile_ptr = b_ptr + tile.to(tl.int64) * (COLUMNS * b_step)
    right = b_at
    if WHOLE:
        right = _take(tile_ptr, b_at, exists, tl.arange(0, CHUNK), dim, EVEN)
    return _dots(left, right, a_ptr, a_at, tile_ptr, b_at, exists, dim, CHUNK, WHOLE, EVEN)


@triton.jit
def _rows(ptr, i, count, step, d, dim, EVEN: tl.constexpr):
    """Dims d of rows i; the last row again where there are none, 0 for dims that do not exist."""
    at = ptr + tl.minimum(i, count - 1).to(tl.int64)[:, None] * step + d[None, :]
    return tl.load(at) if EVEN else tl.load(at, mask=(d < dim)[None, :], other=0.0)


@triton.jit
def tile_rows(
    ptr, start, count, step, d, dim, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Dims d of a tile's rows; without MASKED all of them exist."""
    i = tl.arange(0, COLUMNS)
    if MASKED:
        return _rows(ptr, start + i, count, step, d, dim, EVEN)
    at = (ptr + tl.cast(start, tl.int64) * step) + (i.to(tl.int64)[:, None] * step + d[None, :])
    return tl.load(at) if EVEN else tl.load(at, mask=(d < dim)[None, :], other=0.0)


@triton.jit
def _products(
    left, right, a_ptr, b_ptr, a, b, a_count, b_count, a_step, b_step, dim,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Dot products of rows a with rows b; `left` and `right` are those rows where WHOLE."""
    if WHOLE:
        x = tl.dot(left, tl.trans(right), input_precision="ieee")
    else:
        x = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
        for start in range(0, dim, CHUNK):
            d = start + tl.arange(0, CHUNK)
            part = _rows(a_ptr, a, a_count, a_step, d, dim, EVEN)
            other = _rows(b_ptr, b, b_count, b_step, d, dim, EVEN)
            x = tl.dot(part, tl.trans(other), x, input_precision="ieee")
    return x


@triton.jit
def lanes(x, LANES: tl.constexpr):
    """(ROWS, COLUMNS) as (ROWS, COLUMNS / LANES, LANES): of 8 a thread holds all in the middle."""
    return tl.reshape(x, [x.shape[0], x.shape[1] // LANES, LANES])

"""Rows of a head of (batch, heads, tokens, head_dim) tensors, for all attention kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(ptr, tokens, stride, exists, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Rows (tokens, DIM) of one head; rows that do not exist and padding of head_dim are 0."""
    dim = tl.arange(0, DIM)
    mask = exists[:, None]
    if HEAD_DIM != DIM:
        mask = mask & (dim < HEAD_DIM)[None, :]
    return tl.load(ptr + tokens[:, None] * stride + dim[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, tokens, stride, value, exists, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """The counterpart of `load_rows`; casts to the dtype behind ptr."""
    dim = tl.arange(0, DIM)
    mask = exists[:, None]
    if HEAD_DIM != DIM:
        mask = mask & (dim < HEAD_DIM)[None, :]
    ptrs = ptr + tokens[:, None] * stride + dim[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def products(a, b):
    """The matrix a b^T of a (M, DIM) and b (N, DIM), accumulated in fp32.

    An fp32 dot keeps both operands in registers over their whole inner dimension. A batch of dots
    over 16 columns each, summed, needs DIM / 16 times fewer of them (and rounds a little less).
    """
    if a.dtype == tl.float32:
        parts: tl.constexpr = a.shape[1] // 16
        a = tl.permute(tl.reshape(a, [a.shape[0], parts, 16]), [1, 0, 2])
        b = tl.permute(tl.reshape(b, [b.shape[0], parts, 16]), [1, 2, 0])
        return tl.sum(tl.dot(a, b, input_precision="ieee"), axis=0)
    else:
        return tl.dot(a, tl.trans(b))


@triton.jit
def weigh_values(top, total, acc, logit, weight, active, value):
    """Logits of a tile, in base 2 once they are multiplied by `weight` > 0, join an online softmax:
    its maxima, sums and weighted values, in the rows that are active.
    """
    new_top = tl.maximum(top, tl.max(logit, axis=1) * weight)
    new_top = tl.where(active, new_top, top)
    # A row without any key so far keeps a finite offset: exp2(-inf - 0) = 0 and never NaN.
    offset = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - offset)
    prob = tl.exp2(logit * weight - tl.where(active, offset, float("inf"))[:, None])
    total = total * shrink + tl.sum(prob, axis=1)
    acc = acc * shrink[:, None]
    acc = tl.dot(prob.to(value.dtype), value, acc, input_precision="ieee")
    return new_top, total, acc


@triton.jit
def load_offsets(lse_ptr, stats_ptr, stats_stack, tokens, exists):
    """What to subtract from a row's logits, in base 2: one number after the other.

    The first is +inf where a row has no key or does not exist, so that its probabilities are 0.
    """
    if stats_ptr is not None:
        first = tl.load(stats_ptr + tokens, mask=exists, other=float("-inf"))
        second = tl.load(stats_ptr + stats_stack + tokens, mask=exists, other=0.0)
    else:
        first = tl.load(lse_ptr + tokens, mask=exists, other=float("-inf")) * LOG2_E
        second = 0.0
    return tl.where(first == float("-inf"), float("inf"), first), second


def needs_wide_offsets(*tensors: torch.Tensor) -> bool:
    """Whether offsets within one head of (batch, heads, tokens, head_dim) tensors exceed int32.

    64-bit offsets cost registers in every gather, so kernels take them only where they must: with
    `WIDE` the number of the block is int64, and with it all that is computed from it.
    """
    # Masked-out rows of a ragged block may lie a block beyond the end; they are never accessed.
    return any(x.shape[2] * x.stride(2) + x.shape[3] >= 2**31 for x in tensors)

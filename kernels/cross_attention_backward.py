"""Cross-attention backward: query, key and value, without float atomics.

Tiling. As in the forward one program owns a tile of queries of one (batch, head) and walks one part
of the keys. It adds up the gradient of its queries and, where they are all the queries there are
(up to 64), writes the gradients of each tile of keys at once: text over video is one sweep of five
matrix products. With more queries the gradients of the keys are a second kernel's, which owns a
tile of keys and walks the queries (seven products in all). Where the keys are split, partial
gradients of the queries are added by one more kernel, in ascending order.

Memory traffic for D = head_dim and e bytes an element: with up to 64 queries k and v are read once
and their gradients written once, 4 D e bytes a key and head (512 for D = 64 in bf16).

Numerics. Logits as in the forward: fp32 dot product, then scale. delta = rowsum(grad_out * out) in
fp32. P and dS are cast to the dtype of the inputs for the products, sums stay in fp32, `scale`
multiplies the sums. An lse rounded to fp32 shifts all of a row's probabilities; half-precision
results cannot tell, but for fp32 inputs the forward runs again to find its two parts unrounded.

Source: FlashAttention-2 (Dao, 2023), algorithm 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cross_attention import attended, cross_attention, own_tile, split_keys
from .rows import LOG2_E, load_offsets, load_rows, needs_wide_offsets, products, store_rows
from .tiles import cdiv, combine_chunk, cross_tile, device_arch, launch_options, on_device

_SIZES = [
    "num_heads", "num_queries", "num_keys", "query_tiles", "key_tiles", "parts", "span",
    "stats_stack",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _grad_kernel(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, mask_ptr, out_ptr, lse_ptr, stats_ptr, delta_ptr,
    grad_query_ptr, partial_ptr, grad_key_ptr, grad_value_ptr, scale,
    num_heads, num_queries, num_keys, query_tiles, parts, span, stats_stack,
    grad_out_batch, grad_out_head, grad_out_row, query_batch, query_head, query_row,
    key_batch, key_head, key_row, value_batch, value_head, value_row,
    out_batch, out_head, out_row, grad_query_batch, grad_query_head, grad_query_row,
    grad_key_batch, grad_key_head, grad_key_row,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries over one part of the keys; of the keys too if asked for."""
    pair, batch, head, part, tile = own_tile(num_heads, query_tiles, parts, WIDE)
    key_ptr += batch * key_batch + head * key_head
    value_ptr += batch * value_batch + head * value_head
    if mask_ptr is not None:
        mask_ptr += batch * num_keys
    if grad_key_ptr is not None:
        grad_key_ptr += batch * grad_key_batch + head * grad_key_head
        grad_value_ptr += batch * grad_key_batch + head * grad_key_head

    row = tile * ROWS + tl.arange(0, ROWS)
    row_exists = row < num_queries
    query_ptr += batch * query_batch + head * query_head
    query = load_rows(query_ptr, row, query_row, row_exists, HEAD_DIM, DIM)
    grad_out_ptr += batch * grad_out_batch + head * grad_out_head
    grad_out = load_rows(grad_out_ptr, row, grad_out_row, row_exists, HEAD_DIM, DIM)
    out_ptr += batch * out_batch + head * out_head
    out = load_rows(out_ptr, row, out_row, row_exists, HEAD_DIM, DIM)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), axis=1)
    first = pair * num_queries
    if stats_ptr is not None:
        stats_ptr += first
    lse, lse_low = load_offsets(lse_ptr + first, stats_ptr, stats_stack, row, row_exists)
    if delta_ptr is not None:
        # Every part writes the same bits.
        tl.store(delta_ptr + first + row, delta, mask=row_exists)

    scale_log2 = scale * LOG2_E
    acc = tl.zeros([ROWS, DIM], tl.float32)
    end = tl.minimum((part + 1) * span, num_keys)
    for start in range(part * span, end, COLUMNS):
        token = start + tl.arange(0, COLUMNS)
        seen = attended(mask_ptr, token, end)
        key = load_rows(key_ptr, token, key_row, seen, HEAD_DIM, DIM)
        logit = products(key, query) * scale_log2 - lse[None, :]
        if stats_ptr is not None:
            logit -= lse_low[None, :]
        prob = tl.where(seen[:, None], tl.exp2(logit), 0.0)
        value = load_rows(value_ptr, token, value_row, seen, HEAD_DIM, DIM)
        grad_prob = products(value, grad_out)
        grad_logit = (prob * (grad_prob - delta[None, :])).to(key.dtype)
        if grad_key_ptr is not None:
            grad_value = tl.dot(prob.to(grad_out.dtype), grad_out, input_precision="ieee")
            exists = token < end
            store_rows(grad_value_ptr, token, grad_key_row, grad_value, exists, HEAD_DIM, DIM)
            grad_key = tl.dot(grad_logit, query, input_precision="ieee") * scale
            store_rows(grad_key_ptr, token, grad_key_row, grad_key, exists, HEAD_DIM, DIM)
        acc = tl.dot(tl.trans(grad_logit), key, acc, input_precision="ieee")
    acc *= scale
    if partial_ptr is not None:
        slot = (pair * parts + part) * num_queries + row
        store_rows(partial_ptr, slot, HEAD_DIM, acc, row_exists, HEAD_DIM, DIM)
    else:
        grad_query_ptr += batch * grad_query_batch + head * grad_query_head
        store_rows(grad_query_ptr, row, grad_query_row, acc, row_exists, HEAD_DIM, DIM)


@triton.jit(do_not_specialize=_SIZES)
def _grad_key_kernel(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, mask_ptr, lse_ptr, stats_ptr, delta_ptr,
    grad_key_ptr, grad_value_ptr, scale,
    num_heads, num_queries, num_keys, key_tiles, stats_stack,
    grad_out_batch, grad_out_head, grad_out_row, query_batch, query_head, query_row,
    key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_key_batch, grad_key_head, grad_key_row,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of `COLUMNS` keys, from all queries in tiles of `ROWS`."""
    pair, batch, head, _, tile = own_tile(num_heads, key_tiles, 1, WIDE)
    first = pair * num_queries
    if stats_ptr is not None:
        stats_ptr += first
    if mask_ptr is not None:
        mask_ptr += batch * num_keys
    query_ptr += batch * query_batch + head * query_head
    grad_out_ptr += batch * grad_out_batch + head * grad_out_head

    token = tile * COLUMNS + tl.arange(0, COLUMNS)
    seen = attended(mask_ptr, token, num_keys)
    key_ptr += batch * key_batch + head * key_head
    key = load_rows(key_ptr, token, key_row, seen, HEAD_DIM, DIM)
    value_ptr += batch * value_batch + head * value_head
    value = load_rows(value_ptr, token, value_row, seen, HEAD_DIM, DIM)
    scale_log2 = scale * LOG2_E
    acc_key = tl.zeros([COLUMNS, DIM], tl.float32)
    acc_value = tl.zeros([COLUMNS, DIM], tl.float32)
    for start in range(0, num_queries, ROWS):
        row = start + tl.arange(0, ROWS)
        if WIDE:
            row = row.to(tl.int64)
        exists = row < num_queries
        query = load_rows(query_ptr, row, query_row, exists, HEAD_DIM, DIM)
        lse, lse_low = load_offsets(lse_ptr + first, stats_ptr, stats_stack, row, exists)
        logit = products(key, query) * scale_log2 - lse[None, :]
        if stats_ptr is not None:
            logit -= lse_low[None, :]
        prob = tl.where(seen[:, None], tl.exp2(logit), 0.0)
        grad_out = load_rows(grad_out_ptr, row, grad_out_row, exists, HEAD_DIM, DIM)
        acc_value = tl.dot(prob.to(grad_out.dtype), grad_out, acc_value, input_precision="ieee")
        grad_prob = products(value, grad_out)
        delta = tl.load(delta_ptr + first + row, mask=exists, other=0.0)
        grad_logit = prob * (grad_prob - delta[None, :])
        acc_key = tl.dot(grad_logit.to(query.dtype), query, acc_key, input_precision="ieee")
    offset = batch * grad_key_batch + head * grad_key_head
    is_key = token < num_keys
    store_rows(grad_key_ptr + offset, token, grad_key_row, acc_key * scale, is_key, HEAD_DIM, DIM)
    store_rows(grad_value_ptr + offset, token, grad_key_row, acc_value, is_key, HEAD_DIM, DIM)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "tiles", "parts"])
def _combine_grads_kernel(
    partial_ptr, grad_query_ptr, num_heads, num_queries, tiles, parts,
    grad_query_batch, grad_query_head, grad_query_row,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradient of `CHUNK` queries of one (batch, head): the sum over the parts, in order."""
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * CHUNK + tl.arange(0, CHUNK)
    exists = row < num_queries
    acc = tl.zeros([CHUNK, DIM], tl.float32)
    for part in range(parts):
        slot = (pair * parts + part) * num_queries + row
        acc += load_rows(partial_ptr, slot, HEAD_DIM, exists, HEAD_DIM, DIM)
    grad_query_ptr += pair // num_heads * grad_query_batch + pair % num_heads * grad_query_head
    store_rows(grad_query_ptr, row, grad_query_row, acc, exists, HEAD_DIM, DIM)


def cross_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the backward kernels: one, with more than 64 queries two, one more with split keys.

    (For fp32 inputs, the forward's before them; see the top of this file.)

    Arguments are those of the op `svitt_ops::cross_attention_backward`, validated by its caller.

    Returns:
        grad_query, grad_key, grad_value as their inputs.
    """
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    grad_query = query.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
    grad_key, grad_value = (
        key.new_empty(batch, num_keys, heads, head_dim).transpose(1, 2) for _ in range(2)
    )
    if batch == 0 or heads == 0 or num_queries == 0:
        return grad_query, grad_key.zero_(), grad_value.zero_()

    stats, stats_stack = None, 0
    if query.dtype == torch.float32:
        # One rounded lse is 1e-4 off at logits of 1,000, far from an fp32 result: find both parts
        # again.
        stats = lse.new_empty(2, *lse.shape)
        stats_stack = stats.stride(0)
        cross_attention(query, key, value, key_padding_mask, scale, 0, row_stats=stats)

    arch = device_arch(query.device)
    mask = None if key_padding_mask is None else key_padding_mask.view(torch.int8)
    tile = cross_tile("grad", num_queries, head_dim, query.dtype, arch)
    query_tiles = cdiv(num_queries, tile.rows)
    parts, span = split_keys(batch * heads * query_tiles, num_keys, tile.columns)
    at_once = query_tiles == 1
    delta = None if at_once else torch.empty_like(lse)
    partial = None
    if parts > 1:
        shape = (batch, heads, parts, num_queries, head_dim)
        partial = query.new_empty(shape, dtype=torch.float32)
    inputs = [x.stride(i) for x in (grad_out, query, key, value) for i in range(3)]
    wide = needs_wide_offsets(grad_out, query, key, value, out, grad_query, grad_key)
    with on_device(query):
        _grad_kernel[(batch * heads * parts * query_tiles,)](
            grad_out, query, key, value, mask, out, lse, stats, delta, grad_query, partial,
            grad_key if at_once else None, grad_value if at_once else None, scale,
            heads, num_queries, num_keys, query_tiles, parts, span, stats_stack,
            *inputs, *out.stride()[:3], *grad_query.stride()[:3], *grad_key.stride()[:3],
            HEAD_DIM=head_dim, WIDE=wide, **tile.shape, **tile.options,
        )  # fmt: skip
        if partial is not None:
            chunk = max(combine_chunk(tile.head_dim) // 2, 16)
            tiles = cdiv(num_queries, chunk)
            _combine_grads_kernel[(batch * heads * tiles,)](
                partial, grad_query, heads, num_queries, tiles, parts, *grad_query.stride()[:3],
                HEAD_DIM=head_dim, DIM=tile.head_dim, CHUNK=chunk, maxnreg=255, **launch_options(),
            )  # fmt: skip
        if not at_once and num_keys > 0:
            tile = cross_tile("grad_key", num_queries, head_dim, query.dtype, arch)
            key_tiles = cdiv(num_keys, tile.columns)
            _grad_key_kernel[(batch * heads * key_tiles,)](
                grad_out, query, key, value, mask, lse, stats, delta, grad_key, grad_value, scale,
                heads, num_queries, num_keys, key_tiles, stats_stack,
                *inputs, *grad_key.stride()[:3],
                HEAD_DIM=head_dim, WIDE=wide, **tile.shape, **tile.options,
            )  # fmt: skip
    return grad_query, grad_key, grad_value

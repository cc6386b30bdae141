"""Block-sparse attention backward: query, key, value, bias table, without float atomics.

Tiling. Two kernels walk the layout as the forward does (see `block_sparse_attention`): the first
owns query rows and walks the keys they attend; the second owns key rows and walks, in the
transposed lists, the queries that attend them. Each tile recomputes its logits (seven matrix
products in all). The global rows sit in the spare rows of both: every program scores the global
queries against its own block's keys, and its own block's queries against the global keys, and
writes partial gradients; one more kernel adds the partials of the M blocks in ascending order.

Memory traffic per token and head of dimension D with e bytes an element: query kernel q, k, v, out,
grad_out read, grad_query written, 6 D e; key kernel q, k, v, grad_out read, grad_key and grad_value
written, 6 D e; together 12 D e bytes (1,536 for D = 64 in bf16), plus 20 for lse and delta.
Repeated reads come from L2.

Numerics. Logits as in the forward: fp32 dot product, then scale. delta = rowsum(grad_out * out) in
fp32. P and dS are cast to the dtype of the inputs for the products, sums stay in fp32, `scale`
multiplies the sums. An lse rounded to fp32 shifts all of a row's probabilities; half-precision
results cannot tell, but for fp32 inputs the forward runs again to find its two parts unrounded.

Gradient of the table. Every pair adds to one entry, in an order that only atomics could serve, and
float atomics would make the result depend on the order. Integers do not: the sum is taken in int64
fixed point. The query kernel finds, per head, the largest magnitude a pair may contribute (an
integer maximum over float bits); the key kernel scales by a power of two such that all pairs of
that head together stay below 2^62, rounds, and adds. With 2^c pairs a head this keeps 62 - c bits
below the largest contribution (about 38 for 32 clips of 4 frames, against the 24 of an fp32 sum).
All tokens share the entries of a global: where it is the only one, its sums are reduced in the
program first. A NaN or infinite contribution makes that head's gradient NaN.

Source: SViTT (Li et al., CVPR 2023), section 3.2; FlashAttention-2 (Dao, 2023), algorithm 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .block_sparse_attention import block_sparse_attention
from .block_sparse_walk import (
    bias_arguments,
    column_logits,
    key_value_strides,
    layout_strides,
    list_entries,
    list_extent,
    logit_weight,
    own_tile,
    row_codes,
    row_tokens,
    row_tokens_again,
    sample_length,
)
from .rows import load_offsets, load_rows, needs_wide_offsets, products, store_rows
from .tiles import (
    attention_tile,
    cdiv,
    combine_chunk,
    device_arch,
    launch_options,
    next_pow2,
    on_device,
)

_SIZES = [
    "num_heads", "seq_len", "num_blocks", "list_width", "num_offsets", "pair_bits",
    "layout_batch", "layout_head", "codes_batch", "stats_stack",
]  # fmt: skip
_FINITE_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _fixed_point_exponent(top_bits, pair_bits):
    """Exponent s such that 2^pair_bits contributions up to the top one, times 2^s, fit int64."""
    exponent = ((top_bits >> 23) & 0xFF) - 126
    # One bit of headroom for the rounding differences between the two kernels' contributions.
    return tl.minimum(tl.maximum(61 - pair_bits - exponent, -120), 120)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _add_fixed(ptr, value, unit, mask):
    """Adds value to int64 fixed-point sums; exact, hence independent of the order."""
    tl.atomic_add(ptr, tl.floor(value * unit + 0.5).to(tl.int64), mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=_SIZES)
def _grad_query_kernel(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, stats_ptr, terms_ptr,
    grad_query_ptr, partial_ptr, entries_ptr,
    counts_ptr, blocks_ptr, table_ptr, codes_ptr, lengths_ptr, scale,
    num_heads, seq_len, num_blocks, list_width, num_offsets, layout_batch, layout_head, codes_batch,
    stats_stack, grad_out_batch, grad_out_head, grad_out_row, query_batch, query_head, query_row,
    key_batch, key_head, key_row, value_batch, value_head, value_row,
    out_batch, out_head, out_row, grad_batch, grad_head, grad_row,
    BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, ROW_TILES: tl.constexpr,
    WIDE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Gradient of one row tile of queries; their lse in base 2 and delta, side by side for the next
    kernel; the top magnitude of a bias term.
    """
    grid_blocks, pair, batch, head, block, tile = own_tile(num_heads, num_blocks, ROW_TILES, WIDE)
    length = sample_length(lengths_ptr, batch, seq_len)
    if value_row is None:  # one offset, and its registers, for both
        value_row = key_row
    key_ptr += batch * key_batch + head * key_head
    value_ptr += batch * value_batch + head * value_head
    lse_ptr += pair.to(tl.int64) * seq_len
    if stats_ptr is not None:
        stats_ptr += pair.to(tl.int64) * seq_len
    terms_ptr += pair.to(tl.int64) * (seq_len + 1) * 2

    rows, row_token, row_exists = row_tokens(block, tile, length, BLOCK_SIZE, NUM_GLOBAL, ROWS)
    query_ptr += batch * query_batch + head * query_head
    query = load_rows(query_ptr, row_token, query_row, row_exists, HEAD_DIM, DIM)
    grad_out_ptr += batch * grad_out_batch + head * grad_out_head
    grad_out = load_rows(grad_out_ptr, row_token, grad_out_row, row_exists, HEAD_DIM, DIM)
    out_ptr += batch * out_batch + head * out_head
    out = load_rows(out_ptr, row_token, out_row, row_exists, HEAD_DIM, DIM)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), axis=1)
    lse, lse_low = load_offsets(lse_ptr, stats_ptr, stats_stack, row_token, row_exists)
    own_rows = tl.where(block == 0, BLOCK_SIZE + NUM_GLOBAL, BLOCK_SIZE)
    owned = (rows < own_rows) & (row_token < seq_len)
    terms = tl.join(lse, delta)
    places = tl.broadcast_to(row_token[:, None] * 2 + tl.arange(0, 2)[None, :], terms.shape)
    tl.store(terms_ptr + places, terms, mask=owned[:, None])
    if tl.program_id(0) % (grid_blocks * ROW_TILES) == 0:
        # Of a query that does not exist, for the next kernel: its probabilities are 0.
        which = tl.arange(0, 2)
        tl.store(terms_ptr + seq_len * 2 + which, tl.where(which == 0, float("inf"), 0.0))
    blocks_ptr, listed, walked, start, steps = list_extent(
        counts_ptr, blocks_ptr, batch * layout_batch + head * layout_head + block, list_width,
        block, num_blocks, tile, length, BLOCK_SIZE, NUM_GLOBAL, ROWS, COLUMNS,
    )  # fmt: skip
    row_code = 0
    if table_ptr is not None:
        table_ptr += head * (num_offsets + 2 * NUM_GLOBAL + NUM_GLOBAL * NUM_GLOBAL)
        codes_ptr += batch * codes_batch
        row_code = row_codes(
            codes_ptr, row_token, length, num_offsets, False, BLOCK_SIZE, NUM_GLOBAL, COLUMNS
        )
        top_bits = tl.zeros([ROWS, 4], tl.int32)

    scale_log2 = logit_weight(scale)
    weight = scale_log2
    if table_ptr is not None:
        weight = 1.0
    acc = tl.zeros([ROWS, DIM], tl.float32)
    entry = list_entries(start, blocks_ptr, listed, walked, BLOCK_SIZE, COLUMNS)
    for step in range(start, steps):
        following = list_entries(step + 1, blocks_ptr, listed, walked, BLOCK_SIZE, COLUMNS)
        _, _, key, value, logit, active, _ = column_logits(
            step, entry, listed, walked, start, block, length, rows,
            query, key_ptr, key_row, value_ptr, value_row,
            scale_log2, table_ptr, codes_ptr, row_code, 0, num_offsets,
            False, BLOCK_SIZE, NUM_GLOBAL, HEAD_DIM, COLUMNS, DIM,
        )  # fmt: skip
        logit = logit * weight - tl.where(active, lse, float("inf"))[:, None]
        if stats_ptr is not None:
            logit -= lse_low[:, None]
        prob = tl.exp2(logit)
        entry = following
        grad_prob = products(grad_out, value)
        if table_ptr is not None:
            # Without the cancellation between the two terms, a bound for the other kernel's
            # rounding too.
            bound = prob * (tl.abs(grad_prob) + tl.abs(delta)[:, None])
            bits = tl.reshape(bound.to(tl.int32, bitcast=True), [ROWS, COLUMNS // 8, 4, 2])
            top_bits = tl.maximum(top_bits, tl.max(tl.max(bits, axis=3), axis=1))
        grad_logit = prob * (grad_prob - delta[:, None])
        acc = tl.dot(grad_logit.to(key.dtype), key, acc, input_precision="ieee")

    acc *= scale
    rows, row_token, _ = row_tokens_again(
        entry, block, tile, length, BLOCK_SIZE, NUM_GLOBAL, ROWS, COLUMNS
    )
    is_token = (rows < BLOCK_SIZE) & (row_token < seq_len)
    grad_query_ptr += batch * grad_batch + head * grad_head
    store_rows(grad_query_ptr, row_token, grad_row, acc, is_token, HEAD_DIM, DIM)
    is_global = (rows >= BLOCK_SIZE) & (rows < BLOCK_SIZE + NUM_GLOBAL)
    if NUM_GLOBAL > 0:
        slot = (pair.to(tl.int64) * NUM_GLOBAL + rows - BLOCK_SIZE) * grid_blocks + block
        store_rows(partial_ptr, slot, HEAD_DIM, acc, is_global, HEAD_DIM, DIM)
    if table_ptr is not None:
        top_ptr = entries_ptr + (head + 1) * 2 * SLOTS - 1
        tl.atomic_max(top_ptr, tl.max(tl.max(top_bits, axis=1), axis=0).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=_SIZES)
def _grad_key_kernel(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, stats_ptr, terms_ptr,
    grad_key_ptr, grad_value_ptr, partial_key_ptr, partial_value_ptr,
    counts_ptr, blocks_ptr, entries_ptr, codes_ptr, lengths_ptr, scale,
    num_heads, seq_len, num_blocks, list_width, num_offsets, pair_bits,
    layout_batch, layout_head, codes_batch,
    stats_stack, grad_out_batch, grad_out_head, grad_out_row, query_batch, query_head, query_row,
    key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_batch, grad_head, grad_row,
    BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, ROW_TILES: tl.constexpr,
    WIDE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Gradients of one row tile of keys and values; columns are the queries that attend them."""
    grid_blocks, pair, batch, head, block, tile = own_tile(num_heads, num_blocks, ROW_TILES, WIDE)
    length = sample_length(lengths_ptr, batch, seq_len)
    query_ptr += batch * query_batch + head * query_head
    grad_out_ptr += batch * grad_out_batch + head * grad_out_head
    if stats_ptr is not None:
        stats_ptr += stats_stack + pair.to(tl.int64) * seq_len
    terms_ptr += pair.to(tl.int64) * (seq_len + 1) * 2

    rows, row_token, row_exists = row_tokens(block, tile, length, BLOCK_SIZE, NUM_GLOBAL, ROWS)
    key_ptr += batch * key_batch + head * key_head
    key = load_rows(key_ptr, row_token, key_row, row_exists, HEAD_DIM, DIM)
    value_ptr += batch * value_batch + head * value_head
    value = load_rows(value_ptr, row_token, value_row, row_exists, HEAD_DIM, DIM)
    blocks_ptr, listed, walked, start, steps = list_extent(
        counts_ptr, blocks_ptr, batch * layout_batch + head * layout_head + block, list_width,
        block, num_blocks, tile, length, BLOCK_SIZE, NUM_GLOBAL, ROWS, COLUMNS,
    )  # fmt: skip
    row_code, centre = 0, 0
    if entries_ptr is not None:
        entries_ptr += head * 2 * SLOTS
        codes_ptr += batch * codes_batch
        row_code = row_codes(
            codes_ptr, row_token, length, num_offsets, True, BLOCK_SIZE, NUM_GLOBAL, COLUMNS
        )
        centre = (num_offsets - 1) // 2
        top_bits = tl.load(entries_ptr + 2 * SLOTS - 1).to(tl.int32)
        unit = _power_of_two(_fixed_point_exponent(top_bits, pair_bits))
        with_globals = tl.zeros([ROWS], tl.float32)
        with_all = tl.zeros([ROWS], tl.float32)

    scale_log2 = logit_weight(scale)
    weight = scale_log2
    if entries_ptr is not None:
        weight = 1.0
    LINES: tl.constexpr = NUM_GLOBAL <= 1 and COLUMNS // BLOCK_SIZE <= 1
    parts: tl.constexpr = (BLOCK_SIZE + COLUMNS - 1) // COLUMNS
    acc_key = tl.zeros([ROWS, DIM], tl.float32)
    acc_value = tl.zeros([ROWS, DIM], tl.float32)
    entry = list_entries(start, blocks_ptr, listed, walked, BLOCK_SIZE, COLUMNS)
    for step in range(start, steps):
        following = list_entries(step + 1, blocks_ptr, listed, walked, BLOCK_SIZE, COLUMNS)
        columns, to_globals, query, grad_out, logit, active, entries = column_logits(
            step, entry, listed, walked, start, block, length, rows,
            key, query_ptr, query_row, grad_out_ptr, grad_out_row,
            scale_log2, entries_ptr, codes_ptr, row_code, centre, num_offsets,
            True, BLOCK_SIZE, NUM_GLOBAL, HEAD_DIM, COLUMNS, DIM,
        )  # fmt: skip
        token, exists, beyond, _, _ = columns
        entry = following
        # As many numbers as threads, and the compiler loads them once, not for each thread: two for
        # each of 64 columns; of fewer columns, each of the two twice.
        which = tl.arange(0, 2 if COLUMNS >= 64 else 4) % 2
        places = tl.where(exists, token, seq_len)[:, None] * 2 + which[None, :]
        terms = tl.load(terms_ptr + places)
        if COLUMNS < 64:
            even, odd = tl.split(tl.reshape(terms, [COLUMNS, 2, 2]))
            terms = tl.join(tl.split(even)[0], tl.split(odd)[0])
        lse, delta = tl.split(terms)
        if entries_ptr is not None:
            active = active & row_exists  # a logit of 0 may be far above a query's lse
        shift = tl.where(active[:, None], lse[None, :], float("inf"))
        logit = logit * weight - shift
        if stats_ptr is not None:
            logit -= tl.load(stats_ptr + token, mask=exists, other=0.0)[None, :]
        prob = tl.exp2(logit)
        acc_value = tl.dot(prob.to(grad_out.dtype), grad_out, acc_value, input_precision="ieee")
        grad_prob = products(value, grad_out)
        grad_logit = prob * (grad_prob - delta[None, :])
        acc_key = tl.dot(grad_logit.to(query.dtype), query, acc_key, input_precision="ieee")
        if entries_ptr is not None:
            entries += SLOTS
            if LINES:
                # Pairs among tokens: a mask that does not wait for the values.
                pairs = (rows < BLOCK_SIZE)[:, None] & (exists & ~beyond)[None, :]
                _add_fixed(entries, grad_logit, unit, pairs)
                if NUM_GLOBAL > 0:
                    if step < parts:  # the steps that can hold a global
                        of_global = tl.where(beyond[None, :], grad_logit, 0.0)
                        with_globals += tl.sum(of_global, axis=1)
                    if to_globals:
                        with_all += tl.sum(grad_logit, axis=1)
            else:
                _add_fixed(entries, grad_logit, unit, grad_logit != 0)

    acc_key *= scale
    rows, row_token, row_exists = row_tokens_again(
        entry, block, tile, length, BLOCK_SIZE, NUM_GLOBAL, ROWS, COLUMNS
    )
    acc_key = tl.where(row_exists[:, None], acc_key, 0.0)
    acc_value = tl.where(row_exists[:, None], acc_value, 0.0)
    is_token = (rows < BLOCK_SIZE) & (row_token < seq_len)
    offset = batch * grad_batch + head * grad_head
    store_rows(grad_key_ptr + offset, row_token, grad_row, acc_key, is_token, HEAD_DIM, DIM)
    store_rows(grad_value_ptr + offset, row_token, grad_row, acc_value, is_token, HEAD_DIM, DIM)
    if NUM_GLOBAL > 0:
        partial = (rows >= BLOCK_SIZE) & (rows < BLOCK_SIZE + NUM_GLOBAL)
        slot = (pair.to(tl.int64) * NUM_GLOBAL + rows - BLOCK_SIZE) * grid_blocks + block
        store_rows(partial_key_ptr, slot, HEAD_DIM, acc_key, partial, HEAD_DIM, DIM)
        store_rows(partial_value_ptr, slot, HEAD_DIM, acc_value, partial, HEAD_DIM, DIM)
        if entries_ptr is not None and LINES:
            sums = entries_ptr + SLOTS + num_offsets
            to_tokens = tl.sum(tl.where(rows < BLOCK_SIZE, with_globals, 0.0), axis=0)
            _add_fixed(sums, to_tokens, unit, to_tokens != 0)
            sums += tl.zeros([ROWS], tl.int32)
            _add_fixed(sums + 1, with_all - with_globals, unit, partial)
            _add_fixed(sums + 2, with_globals, unit, partial)


@triton.jit(do_not_specialize=["num_heads", "num_partials", "stack"])
def _combine_grads_kernel(
    partial_ptr, grad_query_ptr, grad_key_ptr, grad_value_ptr, num_heads, num_partials, stack,
    grad_batch, grad_head, grad_row,
    NUM_GLOBAL: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradient of one global row: the sum of its partials, in order. Axis 1: which gradient."""
    pair = tl.program_id(0) // NUM_GLOBAL
    which = tl.program_id(0) % NUM_GLOBAL
    grad = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * num_partials
    acc = tl.zeros([DIM], tl.float32)
    for start in range(0, num_partials, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        part = load_rows(
            partial_ptr + grad.to(tl.int64) * stack, first + slot, HEAD_DIM, slot < num_partials,
            HEAD_DIM, DIM,
        )  # fmt: skip
        acc += tl.sum(part, axis=0)
    dim = tl.arange(0, DIM)
    target = grad_query_ptr
    if grad == 1:
        target = grad_key_ptr
    elif grad == 2:
        target = grad_value_ptr
    target += (pair // num_heads).to(tl.int64) * grad_batch + (pair % num_heads) * grad_head
    target += which * grad_row + dim
    tl.store(target, acc.to(target.dtype.element_ty), mask=dim < HEAD_DIM)


@triton.jit(do_not_specialize=["num_heads", "table_size", "pair_bits"])
def _finish_table_kernel(
    entries_ptr, grad_ptr, num_heads, table_size, pair_bits, SIZE: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """Fixed-point sums of all heads to the fp32 gradient (R, heads)."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    exists = place < num_heads * table_size
    row, head = place // num_heads, (place % num_heads).to(tl.int64)
    entries_ptr += head * 2 * SLOTS
    total = tl.load(entries_ptr + SLOTS + row, mask=exists, other=0)
    top_bits = tl.load(entries_ptr + 2 * SLOTS - 1, mask=exists, other=0).to(tl.int32)
    unit = _power_of_two(-_fixed_point_exponent(top_bits, pair_bits))
    grad = tl.where(top_bits < _FINITE_BITS, total.to(tl.float32) * unit, float("nan"))
    tl.store(grad_ptr + place, grad, mask=exists)


def block_sparse_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_counts: torch.Tensor,
    key_blocks: torch.Tensor,
    query_counts: torch.Tensor,
    query_blocks: torch.Tensor,
    block_size: int,
    num_global: int,
    bias_table: torch.Tensor | None,
    position_codes: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the backward kernels: two, one more with globals, one more with a bias table.

    (For fp32 inputs, the forward's before them; see the top of this file.)

    Arguments are those of the op `svitt_ops::block_sparse_attention_backward`, validated by its
    caller.

    Returns:
        grad_query, grad_key, grad_value as their inputs, and grad_bias_table (R, heads) fp32, or
        empty without a table.
    """
    if scale < 0:
        grads = block_sparse_attention_backward(
            grad_out, -query, key, value, out, lse, key_counts, key_blocks, query_counts,
            query_blocks, block_size, num_global, bias_table, position_codes, key_lengths, -scale,
        )  # fmt: skip
        return -grads[0], *grads[1:]
    batch, heads, seq_len, head_dim = query.shape
    num_blocks, num_tokens = key_counts.shape[2], seq_len - num_global
    grads = [query.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2) for _ in range(3)]
    table_shape = (0,) if bias_table is None else bias_table.shape
    grad_table = query.new_empty(table_shape, dtype=torch.float32)
    if batch == 0 or heads == 0 or seq_len == 0:
        return grads[0], grads[1], grads[2], grad_table.zero_()

    stats, stats_stack = None, 0
    if query.dtype == torch.float32:
        # One rounded lse is 1e-4 off at logits of 1,000, far from an fp32 result: find both parts
        # again.
        stats = lse.new_empty(2, *lse.shape)
        stats_stack = stats.stride(0)
        lists = (key_counts, key_blocks, query_counts, query_blocks, block_size, num_global)
        block_sparse_attention(
            query, key, value, *lists, bias_table, position_codes, key_lengths, scale, False,
            row_stats=stats,
        )  # fmt: skip

    biased, arch = bias_table is not None, device_arch(query.device)
    grid_blocks = max(num_blocks, 1)
    terms = lse.new_empty(batch, heads, seq_len + 1, 2)
    partial_shape = (3, batch, heads, num_global, grid_blocks, head_dim)
    partials = query.new_empty(partial_shape, dtype=torch.float32)
    partial_query, partial_key, partial_value = partials.unbind(0)
    table, num_offsets, codes_batch = bias_arguments(bias_table, position_codes, num_global)
    entries, slots = None, 1
    if table is not None:
        # Of each head the table, an entry in the first half of 8 bytes; as far behind each as these
        # are many, its fixed-point sum; and as the last, the bits of the top magnitude.
        slots = next_pow2(table.shape[1] + 1)
        entries = query.new_zeros(heads, 2, slots, dtype=torch.int64)
        entries[:, 0].view(torch.float32)[:, : 2 * table.shape[1] : 2] = table
    degree = num_global + min(max(key_blocks.shape[3], 1) * block_size, num_tokens)
    pair_bits = (batch * (num_tokens * degree + num_global * seq_len)).bit_length()
    inputs = [x.stride(i) for x in (grad_out, query, key, value) for i in range(3)]
    config = {"BLOCK_SIZE": block_size, "NUM_GLOBAL": num_global, "HEAD_DIM": head_dim}
    config["WIDE"] = needs_wide_offsets(grad_out, query, key, value, out, *grads)
    config["SLOTS"] = slots

    with on_device(query):
        for which in ("grad_query", "grad_key"):
            tile = attention_tile(
                which, head_dim, block_size, num_global, query.dtype, biased, arch
            )
            row_tiles = cdiv(block_size + num_global, tile.rows)
            grid = (batch * heads * grid_blocks * row_tiles,)
            shape = {"ROW_TILES": row_tiles, **tile.shape, **tile.options}
            if which == "grad_query":
                _grad_query_kernel[grid](
                    grad_out, query, key, value, out, lse, stats, terms,
                    grads[0], partial_query, entries,
                    key_counts, key_blocks, table, position_codes, key_lengths, scale,
                    heads, seq_len, num_blocks, key_blocks.shape[3], num_offsets,
                    *layout_strides(key_counts), codes_batch, stats_stack,
                    *inputs[:6], *key_value_strides(key, value), *out.stride()[:3],
                    *grads[0].stride()[:3], **config, **shape,
                )  # fmt: skip
            else:
                _grad_key_kernel[grid](
                    grad_out, query, key, value, stats, terms,
                    grads[1], grads[2], partial_key, partial_value,
                    query_counts, query_blocks, entries, position_codes, key_lengths, scale,
                    heads, seq_len, num_blocks, query_blocks.shape[3], num_offsets, pair_bits,
                    *layout_strides(query_counts), codes_batch, stats_stack,
                    *inputs, *grads[1].stride()[:3], **config, **shape,
                )  # fmt: skip
        if num_global > 0:
            dim = tile.head_dim
            _combine_grads_kernel[(batch * heads * num_global, 3)](
                partials, *grads, heads, grid_blocks, partials.stride(0), *grads[0].stride()[:3],
                NUM_GLOBAL=num_global, HEAD_DIM=head_dim, DIM=dim,
                CHUNK=combine_chunk(dim), **launch_options(),
            )  # fmt: skip
        if entries is not None:
            _finish_table_kernel[(cdiv(grad_table.numel(), 1024),)](
                entries, grad_table, heads, grad_table.shape[0], pair_bits,
                SIZE=1024, SLOTS=slots, **launch_options(),
            )  # fmt: skip
    return grads[0], grads[1], grads[2], grad_table

"""Block-sparse attention forward: local and random key blocks, global tokens, table bias, saliency.

Tiling. One program owns one row tile of one (batch, head, block): the block's `BLOCK_SIZE` tokens
followed by the `NUM_GLOBAL` global rows, cut into tiles of `ROWS`. Programs of one (batch, head)
run side by side, so that its keys and values are served from L2. The program walks the listed
blocks in steps of `COLUMNS`, which end where a block does: one block of 56 a step of 64. So the
address of a step is one look-up, and which columns hold tokens is known when it is compiled. The
global keys lie in the spare columns of the first block, or in steps of their own before it.

Global rows attend everything, and cost no pass of their own: in the spare rows of the tile (a block
of 56 leaves 8 of 64) every program scores the global rows against the keys of its *own* block,
which it has at hand for its tokens anyway (a layout without the diagonal walks one block more), and
writes a partial output, maximum and sum. A second, small kernel combines the M partials in
ascending order. A block that leaves no spare row (64, 128) gets one more row tile, which walks its
own block only. For the saliency the row of global 0 also stores its logits (4 bytes a token and
head), and a third kernel turns them into the mean over heads once maximum and sum are known.

A row sees all of a block's tokens or none. In a step of one block, or a part of one, one number a
row decides that; selects are left for the spare columns and for blocks of which a part is missing,
and for steps of several blocks.

Memory traffic per token and head of dimension D with e bytes an element: q, k, v read once from
DRAM and out written, 4 D e bytes (512 for D = 64 in bf16), lse 4 bytes; k and v again for every
block that attends them, from L2; partials 4 (D + 2) / BLOCK_SIZE bytes. Inputs are read in place
through their strides.

Numerics. Dot products accumulate in fp32 (fp32 inputs without TF32); scale and log2(e) multiply the
fp32 logit after the dot product, in the fused multiply-add that subtracts the maximum; online
softmax in base 2; probabilities are cast to the dtype of `value` for the second product. Masked
columns are -inf. No atomics: a rerun is bitwise identical.

Source: SViTT (Li et al., CVPR 2023), section 3.2; FlashAttention (Dao et al., 2022), algorithm 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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
from .rows import LN_2, load_rows, needs_wide_offsets, store_rows, weigh_values
from .tiles import attention_tile, cdiv, combine_chunk, device_arch, launch_options, on_device

# Sizes that change from call to call and bring nothing when the compiler knows their divisibility.
_SIZES = [
    "num_heads", "seq_len", "num_blocks", "list_width", "num_offsets",
    "layout_batch", "layout_head", "codes_batch", "stats_stack", "partial_stack",
]  # fmt: skip


@triton.jit
def store_row(ptr, columns, tile, is_row, exists):
    """One row of a tile."""
    places = tl.broadcast_to((ptr + columns)[None, :], tile.shape)
    tl.store(places, tile, mask=is_row[:, None] & exists[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, stats_ptr,
    partial_ptr, partial_stats_ptr, logits_ptr,
    counts_ptr, blocks_ptr, table_ptr, codes_ptr, lengths_ptr, scale,
    num_heads, seq_len, num_blocks, list_width, num_offsets, layout_batch, layout_head, codes_batch,
    stats_stack, partial_stack,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    value_batch, value_head, value_row, out_batch, out_head, out_row,
    BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, ROW_TILES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One row tile of one block: outputs of its tokens, partial outputs of the globals."""
    grid_blocks, pair, batch, head, block, tile = own_tile(num_heads, num_blocks, ROW_TILES, WIDE)
    length = sample_length(lengths_ptr, batch, seq_len)
    if value_row is None:  # one offset, and its registers, for both
        value_row = key_row
    query_ptr += batch * query_batch + head * query_head
    key_ptr += batch * key_batch + head * key_head
    value_ptr += batch * value_batch + head * value_head

    rows, row_token, row_exists = row_tokens(block, tile, length, BLOCK_SIZE, NUM_GLOBAL, ROWS)
    query = load_rows(query_ptr, row_token, query_row, row_exists, HEAD_DIM, DIM)
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

    scale_log2 = logit_weight(scale)
    weight = scale_log2
    if table_ptr is not None:
        weight = 1.0
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    entry = list_entries(start, blocks_ptr, listed, walked, BLOCK_SIZE, COLUMNS)
    for step in range(start, steps):
        following = list_entries(step + 1, blocks_ptr, listed, walked, BLOCK_SIZE, COLUMNS)
        columns, to_globals, _, value, logit, active, _ = column_logits(
            step, entry, listed, walked, start, block, length, rows,
            query, key_ptr, key_row, value_ptr, value_row,
            scale_log2, table_ptr, codes_ptr, row_code, 0, num_offsets,
            False, BLOCK_SIZE, NUM_GLOBAL, HEAD_DIM, COLUMNS, DIM,
        )  # fmt: skip
        entry = following
        if logits_ptr is not None:
            base = logits_ptr + pair.to(tl.int64) * (seq_len - NUM_GLOBAL) - NUM_GLOBAL
            if COLUMNS // BLOCK_SIZE > 1 or to_globals:
                own = columns[1] & ~columns[2]
                if COLUMNS // BLOCK_SIZE > 1:
                    own = own & to_globals
                store_row(base, columns[0], logit * weight, rows == BLOCK_SIZE, own)
        top, total, acc = weigh_values(top, total, acc, logit, weight, active, value)

    rows, row_token, row_exists = row_tokens_again(
        entry, block, tile, length, BLOCK_SIZE, NUM_GLOBAL, ROWS, COLUMNS
    )
    empty = total == 0  # NaN is no empty row
    if NUM_GLOBAL > 0:
        empty = empty & (rows >= BLOCK_SIZE)  # a token sees the globals: NaN if all logits are -inf
    filled = row_exists & ~empty
    acc = tl.where(filled[:, None], acc / tl.where(empty, 1.0, total)[:, None], 0.0)
    top = tl.where(filled, top, float("-inf"))
    total = tl.where(filled, total, 1.0)
    stored = (rows < BLOCK_SIZE) & (row_token < seq_len)
    out_ptr += batch * out_batch + head * out_head
    store_rows(out_ptr, row_token, out_row, acc, stored, HEAD_DIM, DIM)
    place = pair.to(tl.int64) * seq_len + row_token
    tl.store(lse_ptr + place, (top + tl.log2(total)) * LN_2, mask=stored)
    if stats_ptr is not None:
        tl.store(stats_ptr + place, top, mask=stored)
        tl.store(stats_ptr + stats_stack + place, tl.log2(total), mask=stored)
    if NUM_GLOBAL > 0:
        partial = (rows >= BLOCK_SIZE) & (rows < BLOCK_SIZE + NUM_GLOBAL)
        slot = (pair.to(tl.int64) * NUM_GLOBAL + rows - BLOCK_SIZE) * grid_blocks + block
        store_rows(partial_ptr, slot, HEAD_DIM, acc, partial, HEAD_DIM, DIM)
        tl.store(partial_stats_ptr + slot, top, mask=partial)
        tl.store(partial_stats_ptr + partial_stack + slot, total, mask=partial)


@triton.jit(do_not_specialize=[*_SIZES[:2], "num_partials", "stats_rows", *_SIZES[-2:]])
def _combine_kernel(
    partial_ptr, partial_stats_ptr, out_ptr, lse_ptr, stats_ptr,
    num_heads, seq_len, num_partials, stats_rows, stats_stack, partial_stack,
    out_batch, out_head, out_row,
    NUM_GLOBAL: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Output and statistics of one global row of one (batch, head) from its blocks' partials."""
    pair = tl.program_id(0) // NUM_GLOBAL
    which = tl.program_id(0) % NUM_GLOBAL
    first = tl.program_id(0).to(tl.int64) * num_partials
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM], tl.float32)
    for start in range(0, num_partials, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        exists = slot < num_partials
        part_top = tl.load(partial_stats_ptr + first + slot, mask=exists, other=float("-inf"))
        totals_ptr = partial_stats_ptr + partial_stack
        part_total = tl.load(totals_ptr + first + slot, mask=exists, other=0.0)
        part = load_rows(partial_ptr, first + slot, HEAD_DIM, exists, HEAD_DIM, DIM)
        new_top = tl.maximum(top, tl.max(part_top, axis=0))
        offset = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = part_total * tl.exp2(part_top - offset)
        shrink = tl.exp2(top - offset)
        total = total * shrink + tl.sum(weight, axis=0)
        acc = acc * shrink + tl.sum(weight[:, None] * part, axis=0)
        top = new_top
    total = tl.where(total != 0, total, 1.0)
    dim = tl.arange(0, DIM)
    out_ptr += (pair // num_heads).to(tl.int64) * out_batch + (pair % num_heads) * out_head
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + which * out_row + dim, out, mask=dim < HEAD_DIM)
    tl.store(lse_ptr + pair.to(tl.int64) * seq_len + which, (top + tl.log2(total)) * LN_2)
    if stats_ptr is not None:
        stats_ptr += pair.to(tl.int64) * stats_rows + which
        tl.store(stats_ptr, top)
        tl.store(stats_ptr + stats_stack, tl.log2(total))


@triton.jit(do_not_specialize=["num_heads", "seq_len", "num_tiles", "stats_rows", "stats_stack"])
def _saliency_kernel(
    logits_ptr, stats_ptr, lengths_ptr, saliency_ptr,
    num_heads, seq_len, num_tiles, stats_rows, stats_stack,
    NUM_GLOBAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Saliency of one tile of tokens: global row 0's probabilities, mean over heads in order."""
    batch = (tl.program_id(0) // num_tiles).to(tl.int64)
    num_tokens = seq_len - NUM_GLOBAL
    place = tl.program_id(0) % num_tiles * COLUMNS + tl.arange(0, COLUMNS)
    length = sample_length(lengths_ptr, batch, seq_len)
    exists = place + NUM_GLOBAL < length
    total = tl.zeros([COLUMNS], tl.float32)
    for head in range(num_heads):
        pair = batch * num_heads + head
        logit = tl.load(logits_ptr + pair * num_tokens + place, mask=exists, other=float("-inf"))
        # Finite even for a sample without tokens, whose logits are all -inf.
        top = tl.maximum(tl.load(stats_ptr + pair * stats_rows), -1e38)
        # Two subtractions: top is one of the logits, so the first is exact where it matters.
        total += tl.exp2((logit - top) - tl.load(stats_ptr + stats_stack + pair * stats_rows))
    tl.store(saliency_ptr + batch * num_tokens + place, total / num_heads, mask=place < num_tokens)


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
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
    return_saliency: bool,
    *,
    row_stats: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the forward kernels: one, with globals two, with saliency three.

    Arguments are those of the op `svitt_ops::block_sparse_attention`, validated by its caller. The
    backward also passes `row_stats`, fp32 (2, batch, heads, tokens), to be filled with each row's
    maximal logit and the log of its sum, both in base 2: more exact than their rounded sum, the
    lse.

    Returns:
        out (batch, heads, tokens, head_dim) in the dtype of query, lse (batch, heads, tokens) fp32,
        and saliency (batch, tokens - num_global) fp32, or empty unless asked for.
    """
    if scale < 0:  # the kernels take a row's maximum before they scale it
        query, scale = -query, -scale
    elif scale == 0:
        query, scale = 0 * query, 1.0  # an infinite key shows: 0 times it is NaN
    batch, heads, seq_len, head_dim = query.shape
    num_tokens = seq_len - num_global
    out = query.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, seq_len, dtype=torch.float32)
    saliency_shape = (batch, num_tokens) if return_saliency else (0,)
    saliency = query.new_empty(saliency_shape, dtype=torch.float32)
    if batch == 0 or heads == 0 or seq_len == 0:
        return out, lse, saliency.zero_()

    biased, arch = bias_table is not None, device_arch(query.device)
    tile = attention_tile("forward", head_dim, block_size, num_global, query.dtype, biased, arch)
    grid_blocks = max(key_counts.shape[2], 1)
    row_tiles = cdiv(block_size + num_global, tile.rows)
    partial_shape = (batch, heads, num_global, grid_blocks)
    partial = query.new_empty(*partial_shape, head_dim, dtype=torch.float32)
    partial_stats = query.new_empty(2, *partial_shape, dtype=torch.float32)
    logits, global_stats = None, row_stats
    if return_saliency:
        logits = query.new_empty(batch, heads, num_tokens, dtype=torch.float32)
        if global_stats is None:
            global_stats = query.new_empty(2, batch, heads, num_global, dtype=torch.float32)
    table, num_offsets, codes_batch = bias_arguments(bias_table, position_codes, num_global)
    stacks = [0 if x is None else x.stride(0) for x in (row_stats, partial_stats, global_stats)]
    stats_rows = 0 if global_stats is None else global_stats.shape[3]
    with on_device(query):
        _forward_kernel[(batch * heads * grid_blocks * row_tiles,)](
            query, key, value, out, lse, row_stats, partial, partial_stats, logits,
            key_counts, key_blocks, table, position_codes, key_lengths, scale,
            heads, seq_len, key_counts.shape[2], key_blocks.shape[3], num_offsets,
            *layout_strides(key_counts), codes_batch, stacks[0], stacks[1],
            *query.stride()[:3], *key_value_strides(key, value), *out.stride()[:3],
            BLOCK_SIZE=block_size, NUM_GLOBAL=num_global, HEAD_DIM=head_dim,
            ROW_TILES=row_tiles, WIDE=needs_wide_offsets(query, key, value, out),
            **tile.shape, **tile.options,
        )  # fmt: skip
        if num_global > 0:
            _combine_kernel[(batch * heads * num_global,)](
                partial, partial_stats, out, lse, global_stats,
                heads, seq_len, grid_blocks, stats_rows, stacks[2], stacks[1], *out.stride()[:3],
                NUM_GLOBAL=num_global, HEAD_DIM=head_dim, DIM=tile.head_dim,
                CHUNK=combine_chunk(tile.head_dim), **launch_options(),
            )  # fmt: skip
        if logits is not None and num_tokens > 0:
            num_tiles = cdiv(num_tokens, 128)
            _saliency_kernel[(batch * num_tiles,)](
                logits, global_stats, key_lengths, saliency,
                heads, seq_len, num_tiles, stats_rows, stacks[2],
                NUM_GLOBAL=num_global, COLUMNS=128, **launch_options(),
            )  # fmt: skip
    return out, lse, saliency

"""Walking a block layout: what the kernels of block-sparse attention share, forward and backward.

A program owns the rows of one tile of a block and walks a gathered list of columns: the globals,
the tokens of the listed blocks in order, and, where the tile holds global rows and the list lacks
it, the own block. Forward and dQ rows are queries and columns keys; in the dK/dV kernel rows are
keys, columns queries and the lists transposed. Nothing else differs, so that all three recompute
the same logits from the same masks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rows import LOG2_E, load_rows, products

CODE_LIMIT = tl.constexpr(1 << 28)
GLOBAL_CODE = tl.constexpr(1 << 30)


@triton.jit
def own_tile(num_heads, num_blocks, ROW_TILES: tl.constexpr, WIDE: tl.constexpr):
    """Blocks of the grid, and which (batch, head), block and row tile this program owns."""
    grid_blocks = tl.maximum(num_blocks, 1)
    pair = tl.program_id(0) // (grid_blocks * ROW_TILES)
    within = tl.program_id(0) % (grid_blocks * ROW_TILES)
    batch, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
    block, tile = within // ROW_TILES, within % ROW_TILES
    if WIDE:
        block = block.to(tl.int64)
    return grid_blocks, pair, batch, head, block, tile


@triton.jit
def row_tokens(
    block, tile, length,
    BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of a tile (position in the block, then the globals), their tokens, which exist."""
    rows = tile * ROWS + tl.arange(0, ROWS)
    tokens = tl.where(rows < BLOCK_SIZE, NUM_GLOBAL + block * BLOCK_SIZE + rows, rows - BLOCK_SIZE)
    return rows, tokens, (rows < BLOCK_SIZE + NUM_GLOBAL) & (tokens < length)


@triton.jit
def list_extent(
    counts_ptr, blocks_ptr, row, width, block, num_blocks, tile, length,
    BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Where the list of a block starts, how many listed blocks a tile walks, and how many columns.

    A tile with global rows also needs the own block: as one more block after the list where the
    list lacks it. A tile of nothing but global rows walks only that one.
    """
    blocks_ptr += row.to(tl.int64) * width
    has_tokens = tile * ROWS < BLOCK_SIZE
    listed = tl.load(counts_ptr + row, mask=(block < num_blocks) & has_tokens, other=0)
    walked = listed
    has_globals = (NUM_GLOBAL > 0) & ((tile + 1) * ROWS > BLOCK_SIZE)
    if has_globals:
        found = 0
        for start in range(0, listed, 128):
            slot = start + tl.arange(0, 128)
            entry = tl.load(blocks_ptr + slot, mask=slot < listed, other=-1)
            found += tl.sum((entry == block).to(tl.int32), axis=0)
        walked += tl.where(found > 0, 0, 1)
    columns = NUM_GLOBAL + walked * BLOCK_SIZE
    # A block that does not exist in this sample has nothing to do, but block 0 always serves the
    # globals.
    columns = tl.where((block > 0) & (NUM_GLOBAL + block * BLOCK_SIZE >= length), 0, columns)
    return blocks_ptr, listed, columns


@triton.jit
def column_tokens(
    start, columns, blocks_ptr, listed, block, length,
    BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tokens behind one tile of the list; which exist, which the tokens see, which the globals."""
    position = start + tl.arange(0, COLUMNS)
    offset = tl.maximum(position - NUM_GLOBAL, 0)
    slot = offset // BLOCK_SIZE
    entry = tl.load(blocks_ptr + slot, mask=slot < listed, other=0)
    entry = tl.where(slot < listed, entry, block)
    token = NUM_GLOBAL + entry * BLOCK_SIZE + (offset - slot * BLOCK_SIZE)
    token = tl.where(position < NUM_GLOBAL, position, token)
    exists = (position < columns) & (token < length)
    in_list = exists & (position < NUM_GLOBAL + listed * BLOCK_SIZE)
    # Each global row meets a token in that token's own block, and the globals in block 0.
    own = exists & (tl.where(position < NUM_GLOBAL, 0, entry) == block)
    return token, exists, in_list, own


@triton.jit
def column_mask(rows, in_list, own, BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr):
    """0 where a row attends a column, else -inf: added to the logit, mask and scale are one FMA."""
    mask = tl.where(in_list, 0.0, float("-inf"))[None, :]
    if NUM_GLOBAL > 0:
        global_mask = tl.where(own, 0.0, float("-inf"))[None, :]
        mask = tl.where((rows >= BLOCK_SIZE)[:, None], global_mask, mask)
    return mask


@triton.jit
def load_codes(ptr, tokens, exists, shift, NUM_GLOBAL: tl.constexpr):
    """Position codes of tokens, plus shift; the code of a global is GLOBAL_CODE plus its number."""
    code = tl.load(ptr + tokens - NUM_GLOBAL, mask=exists & (tokens >= NUM_GLOBAL), other=0)
    code = tl.minimum(tl.maximum(code, -CODE_LIMIT), CODE_LIMIT) + shift
    return tl.where(tokens < NUM_GLOBAL, GLOBAL_CODE + tokens, code)


@triton.jit
def bias_index(query_code, key_code, num_offsets, NUM_GLOBAL: tl.constexpr):
    """Row of the bias table for each pair; the arguments broadcast against each other.

    Queries are shifted by (num_offsets - 1) // 2 already; num_offsets is R0. Whether a token is
    global is part of its code, because a thread's share of a gather has many rows, and each number
    kept per row costs as many registers. The clamp keeps bad codes inside the table.
    """
    index = tl.minimum(tl.maximum(query_code - key_code, 0), num_offsets - 1)
    if NUM_GLOBAL == 1:
        index = tl.where(query_code >= GLOBAL_CODE, num_offsets, index)
        to_global = tl.where(query_code >= GLOBAL_CODE, num_offsets + 2, num_offsets + 1)
        index = tl.where(key_code >= GLOBAL_CODE, to_global, index)
    elif NUM_GLOBAL > 1:
        a = query_code - GLOBAL_CODE
        b = key_code - GLOBAL_CODE
        index = tl.where(a >= 0, num_offsets + a, index)
        to_global = num_offsets + NUM_GLOBAL + b + tl.where(a >= 0, NUM_GLOBAL * (a + 1), 0)
        index = tl.where(b >= 0, to_global, index)
    return index


@triton.jit
def column_logits(
    start, columns, blocks_ptr, listed, block, length, rows, own, ptr, step,
    scale_log2, table_ptr, codes_ptr, row_code, shift, num_offsets,
    ROWS_ARE_KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One tile of columns: tokens, which exist, which the globals see, what they hold, their
    logits in base 2 with the rows that hold `own`, and the table's entry behind each.
    """
    token, exists, in_list, seen = column_tokens(
        start, columns, blocks_ptr, listed, block, length, BLOCK_SIZE, NUM_GLOBAL, COLUMNS
    )
    held = load_rows(ptr, token, step, exists, HEAD_DIM, DIM)
    logit = products(own, held) * scale_log2
    logit += column_mask(rows, in_list, seen, BLOCK_SIZE, NUM_GLOBAL)
    index = 0
    if table_ptr is not None:
        code = load_codes(codes_ptr, token, exists, shift, NUM_GLOBAL)
        if ROWS_ARE_KEYS:
            index = bias_index(code[None, :], row_code[:, None], num_offsets, NUM_GLOBAL)
        else:
            index = bias_index(row_code[:, None], code[None, :], num_offsets, NUM_GLOBAL)
        logit += tl.load(table_ptr + index) * LOG2_E
    return token, exists, seen, held, logit, index


@triton.jit
def sample_length(lengths_ptr, batch, seq_len):
    """Number of tokens that exist in a sample, globals included."""
    length = seq_len
    if lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), seq_len)
    return length


def layout_strides(counts: torch.Tensor) -> tuple[int, int]:
    """Rows of the layout from one sample, and one head, to the next; 0 where they share."""
    return (
        counts.stride(0) if counts.shape[0] > 1 else 0,
        counts.stride(1) if counts.shape[1] > 1 else 0,
    )


def bias_arguments(
    bias_table: torch.Tensor | None, position_codes: torch.Tensor | None, num_global: int
) -> tuple[torch.Tensor | None, int, int]:
    """Table with a head's entries side by side (to fit L1), R0, batch stride of the codes."""
    if bias_table is None or position_codes is None:
        return None, 1, 0
    num_offsets = bias_table.shape[0] - 2 * num_global - num_global**2
    codes_batch = position_codes.stride(0) if position_codes.shape[0] > 1 else 0
    return bias_table.t().contiguous(), num_offsets, codes_batch

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
    BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Where the list of a block starts, how many of its blocks a tile walks, how many in all, and
    in how many steps.

    A tile with global rows also needs the own block: as one more block after the list where the
    list lacks it. A tile of nothing but global rows walks only that one.
    """
    blocks_ptr += row.to(tl.int64) * width
    has_tokens = tile * ROWS < BLOCK_SIZE
    listed = tl.load(counts_ptr + row, mask=(block < num_blocks) & has_tokens, other=0)
    walked = listed
    has_globals = (NUM_GLOBAL > 0) & ((tile + 1) * ROWS > BLOCK_SIZE)
    if has_globals:
        # One entry a lane, without waiting for the count: a warp adds them without a barrier.
        found = 0
        for start in range(0, width, 32):
            slot = start + tl.arange(0, 32)
            entry = tl.load(blocks_ptr + slot, mask=slot < width, other=-1)
            found += tl.sum(((entry == block) & (slot < listed)).to(tl.int32), axis=0)
        walked += tl.where(found > 0, 0, 1)
    pack: tl.constexpr = COLUMNS // BLOCK_SIZE if COLUMNS > BLOCK_SIZE else 1
    parts: tl.constexpr = (BLOCK_SIZE + COLUMNS - 1) // COLUMNS
    steps = (walked + pack - 1) // pack * parts
    if parts * COLUMNS - pack * BLOCK_SIZE < NUM_GLOBAL:
        steps += (NUM_GLOBAL + COLUMNS - 1) // COLUMNS
    elif NUM_GLOBAL > 0:
        steps = tl.maximum(steps, parts)  # for the globals that they hold
    # A block that does not exist in this sample has nothing to do, but block 0 always serves the
    # globals.
    steps = tl.where((block > 0) & (NUM_GLOBAL + block * BLOCK_SIZE >= length), 0, steps)
    return blocks_ptr, listed, walked, steps


@triton.jit
def column_tokens(
    step, blocks_ptr, listed, walked, block, length,
    BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns of one step: `first` + `place` is the token of each. Which exist, and whether all do
    that are tokens; which the token rows see, which the global rows; which can only be globals, and
    their numbers.

    Whether a column holds a token or a global, and where in its block, are constants of the compile
    where a tile holds a whole block: `place` leaves the loop, and masks of it fold away.
    """
    pack: tl.constexpr = COLUMNS // BLOCK_SIZE if COLUMNS > BLOCK_SIZE else 1
    parts: tl.constexpr = (BLOCK_SIZE + COLUMNS - 1) // COLUMNS
    leads: tl.constexpr = parts * COLUMNS - pack * BLOCK_SIZE < NUM_GLOBAL
    lead: tl.constexpr = (NUM_GLOBAL + COLUMNS - 1) // COLUMNS if leads else 0
    column = tl.arange(0, COLUMNS)
    turn = step - lead + tl.zeros_like(walked)  # the interpreter's steps are no tensors
    slot = turn
    within = column
    if parts > 1:
        slot = turn // parts
        within += turn % parts * COLUMNS
    beyond = within >= pack * BLOCK_SIZE
    number = within - pack * BLOCK_SIZE
    if pack > 1:
        slot = turn * pack + tl.minimum(column // BLOCK_SIZE, pack - 1)
        within = column % BLOCK_SIZE
    globals = tl.minimum(NUM_GLOBAL, length)
    if leads:
        slot = tl.where(turn >= 0, slot, walked)
        number = step * COLUMNS + column
        beyond = beyond | (number < lead * COLUMNS)
        is_global = number < globals
    else:
        is_global = number < tl.where(turn < parts, globals, 0)
    there = slot < walked
    listed_here = slot < listed
    entry = tl.load(blocks_ptr + slot, mask=listed_here, other=0)
    entry = tl.where(listed_here, entry, block)
    first = NUM_GLOBAL + entry * BLOCK_SIZE
    limit = tl.where(there, length - first, 0)
    exists = tl.where(beyond, is_global, within < limit)
    to_tokens = tl.where(beyond, is_global, listed_here)
    # Each global row meets a token in that token's own block, and the globals in block 0.
    owner = tl.where(beyond, tl.where(is_global, 0, -1), tl.where(there, entry, -1))
    to_globals = owner == block
    if pack > 1:
        within += first
        first = 0
    place = tl.where(beyond, number - first, within)
    return first, place, exists, limit >= BLOCK_SIZE, to_tokens, to_globals, beyond, number


@triton.jit
def load_codes(ptr, tokens, exists, shift, of_globals, NUM_GLOBAL: tl.constexpr):
    """Position codes of tokens, plus shift; `of_globals` for the globals."""
    code = tl.load(ptr + tokens - NUM_GLOBAL, mask=exists & (tokens >= NUM_GLOBAL), other=0)
    code = tl.minimum(tl.maximum(code, -CODE_LIMIT), CODE_LIMIT) + shift
    return tl.where(tokens < NUM_GLOBAL, of_globals, code)


@triton.jit
def bias_index(
    rows, row_code, code, beyond, number, num_offsets,
    ROWS_ARE_KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr,
):  # fmt: skip
    """Row of the bias table for each pair of a row and a column; num_offsets is R0.

    One unsigned minimum keeps bad codes inside the table, where a negative index is a huge one, and
    leads global rows, whose codes are out of reach, to the one entry that they have for all tokens.
    """
    last = tl.zeros_like(rows) + num_offsets - 1
    to_global = last + 1
    if NUM_GLOBAL > 0:
        of_global = tl.minimum(rows - BLOCK_SIZE, NUM_GLOBAL - 1)
        among = num_offsets + 2 * NUM_GLOBAL + of_global
        if ROWS_ARE_KEYS:
            last = tl.where(of_global >= 0, to_global + NUM_GLOBAL + of_global, last)
        else:
            last = tl.where(of_global >= 0, to_global + of_global, last)
            among += of_global * (NUM_GLOBAL - 1)
            to_global += NUM_GLOBAL
        to_global = tl.where(of_global >= 0, among, to_global)
    if ROWS_ARE_KEYS:
        index = code[None, :] - row_code[:, None]
    else:
        index = row_code[:, None] - code[None, :]
    index = tl.minimum(index.to(tl.uint32), last.to(tl.uint32)[:, None]).to(tl.int32)
    if NUM_GLOBAL > 0:
        number = tl.minimum(number, NUM_GLOBAL - 1)[None, :]
        if ROWS_ARE_KEYS and NUM_GLOBAL > 1:
            number *= tl.where(rows >= BLOCK_SIZE, NUM_GLOBAL, 1)[:, None]
        index = tl.where(beyond[None, :], to_global[:, None] + number, index)
    return index


@triton.jit
def column_logits(
    step, blocks_ptr, listed, walked, block, length, rows, held, ptr, stride,
    scale_log2, table_ptr, codes_ptr, row_code, shift, num_offsets,
    ROWS_ARE_KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One step of columns: first token, place of each after it, which exist, which are tokens of
    the own block, what they hold, their logits in base 2 with the rows that hold `held`, and the
    table's entry behind each.
    """
    first, place, exists, whole, to_tokens, to_globals, beyond, number = column_tokens(
        step, blocks_ptr, listed, walked, block, length, BLOCK_SIZE, NUM_GLOBAL, COLUMNS
    )
    bias, index = 0.0, 0
    if table_ptr is not None:
        # Before the product: of two layouts that meet, the compiler goes on with the later one's.
        code = load_codes(codes_ptr, first + place, exists, shift, 0, NUM_GLOBAL)
        index = bias_index(
            rows, row_code, code, beyond, number, num_offsets,
            ROWS_ARE_KEYS, BLOCK_SIZE, NUM_GLOBAL,
        )  # fmt: skip
        bias = tl.load(table_ptr + index)
    there = load_rows(ptr + first * stride, place, stride, exists, HEAD_DIM, DIM)
    # Added to the logit, 0 or -inf, mask and scale are one FMA.
    mask = tl.where(to_tokens, 0.0, float("-inf"))[None, :]
    if NUM_GLOBAL > 0:
        global_mask = tl.where(to_globals, 0.0, float("-inf"))[None, :]
        mask = tl.where((rows >= BLOCK_SIZE)[:, None], global_mask, mask)
    logit = products(held, there) * scale_log2 + mask
    if table_ptr is not None:
        logit += bias * LOG2_E
    if COLUMNS // BLOCK_SIZE > 1 or not whole:
        logit = tl.where(exists[None, :], logit, float("-inf"))
    return first, place, exists, exists & to_globals & ~beyond, there, logit, index


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

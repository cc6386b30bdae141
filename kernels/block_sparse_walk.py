"""Walking a block layout: what the kernels of block-sparse attention share, forward and backward.

A program owns the rows of one tile of a block and walks columns in steps: the listed blocks in
order, and, where the tile holds global rows and the list lacks it, the own block. A step is one
block, a part of one, or several, and the globals lie in columns that the first block leaves spare,
or in steps before it. Forward and dQ rows are queries and columns keys; in the dK/dV kernel rows
are keys, columns queries and the lists transposed. Nothing else differs, so that all three
recompute the same logits from the same masks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rows import LOG2_E, load_rows, products

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
def row_tokens_again(
    entry, block, tile, length,
    BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`row_tokens` after a loop that ends with `entry`, without keeping registers in the loop for
    them: no entry is negative, but that the compiler cannot know.
    """
    zero = 0
    if COLUMNS // BLOCK_SIZE <= 1:
        zero = tl.minimum(entry, 0)
    return row_tokens(block + zero, tile + zero, length, BLOCK_SIZE, NUM_GLOBAL, ROWS)


@triton.jit
def list_extent(
    counts_ptr, blocks_ptr, row, width, block, num_blocks, tile, length,
    BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Where the list of a block starts, how many of its blocks a tile walks, how many blocks in
    all, and the steps: of which number the first is, below 0 where some come before the blocks for
    nothing but globals, and how many are of blocks.

    A tile with global rows also needs the own block: as one more block after the list where the
    list lacks it. A tile of nothing but global rows walks only that one.
    """
    blocks_ptr += row.to(tl.int64) * width
    has_tokens = tile * ROWS < BLOCK_SIZE
    listed = tl.load(counts_ptr + row, mask=(block < num_blocks) & has_tokens, other=0)
    missing = listed * 0
    if (NUM_GLOBAL > 0) & ((tile + 1) * ROWS > BLOCK_SIZE):
        # One entry a lane, without waiting for the count: a warp adds them without a barrier.
        found = 0
        end = tl.where(block < num_blocks, width, 0)  # block 0 of none has no list
        for start in range(0, end, 32):
            slot = start + tl.arange(0, 32)
            entry = tl.load(blocks_ptr + slot, mask=slot < end, other=-1)
            found += tl.sum(((entry == block) & (slot < listed)).to(tl.int32), axis=0)
        missing = tl.where(found > 0, 0, 1)
    walked = listed + missing
    pack: tl.constexpr = COLUMNS // BLOCK_SIZE if COLUMNS > BLOCK_SIZE else 1
    parts: tl.constexpr = (BLOCK_SIZE + COLUMNS - 1) // COLUMNS
    steps = (walked + pack - 1) // pack * parts
    start = 0
    if NUM_GLOBAL > 0:
        if parts * COLUMNS - pack * BLOCK_SIZE < NUM_GLOBAL:
            start = missing * 0 - (NUM_GLOBAL + COLUMNS - 1) // COLUMNS
        else:
            # Beside the first block's tokens, if all rows see both.
            start = -missing
            steps = tl.maximum(steps, parts)
    # A block that does not exist in this sample has nothing to do, but block 0 always serves the
    # globals.
    gone = (block > 0) & (NUM_GLOBAL + block * BLOCK_SIZE >= length)
    return blocks_ptr, listed, walked, tl.where(gone, 0, start), tl.where(gone, 0, steps)


@triton.jit
def list_slots(step, walked, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Which of the walked blocks a step is of, of several the one behind each column; more than any
    in the steps for nothing but globals.
    """
    step += tl.zeros_like(walked)  # the interpreter's steps are no tensors
    slot = step.to(tl.uint32)
    if COLUMNS < BLOCK_SIZE:
        slot = slot // ((BLOCK_SIZE + COLUMNS - 1) // COLUMNS)
    elif COLUMNS // BLOCK_SIZE > 1:
        pack: tl.constexpr = COLUMNS // BLOCK_SIZE
        slot = slot * pack + tl.minimum(tl.arange(0, COLUMNS) // BLOCK_SIZE, pack - 1)
    return slot


@triton.jit
def list_entries(step, blocks_ptr, listed, walked, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """The listed blocks of a step; all its loads wait for them, so they are loaded a step ahead."""
    slot = list_slots(step, walked, BLOCK_SIZE, COLUMNS)
    slot = tl.minimum(slot, walked.to(tl.uint32)).to(tl.int32)
    return tl.load(blocks_ptr + slot, mask=slot < listed, other=0)


@triton.jit
def column_tokens(
    step, entry, listed, walked, start, block, length,
    BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns of one step: the token of each; which exist; the token to read for each, and whether
    to read any; the first token of their block, their places from there, and how many tokens there
    are from there; which the token rows see, which the global rows, or whether they see any; which
    can only be globals, and their numbers.

    For a column that does not exist one is read that the same rows see anyway, the last token of
    its block or a global: that takes one minimum, where a mask takes four instructions. Its
    probabilities are 0, so nothing of it counts, but that an infinite value of that token, times
    one of them, is NaN.
    """
    pack: tl.constexpr = COLUMNS // BLOCK_SIZE if COLUMNS > BLOCK_SIZE else 1
    parts: tl.constexpr = (BLOCK_SIZE + COLUMNS - 1) // COLUMNS
    leads: tl.constexpr = parts * COLUMNS - pack * BLOCK_SIZE < NUM_GLOBAL
    step += tl.zeros_like(walked)  # the interpreter's steps are no tensors
    slot = list_slots(step, walked, BLOCK_SIZE, COLUMNS)
    column = tl.arange(0, COLUMNS)
    within = column
    if parts > 1:
        within += ((step + parts).to(tl.uint32) % parts).to(tl.int32) * COLUMNS
    beyond = within >= pack * BLOCK_SIZE
    number = within - pack * BLOCK_SIZE
    if pack > 1:
        within = column % BLOCK_SIZE
    with_globals = step < tl.where(start < 0, 0, parts)
    globals = tl.where(with_globals, tl.minimum(NUM_GLOBAL, length), 0)
    if leads:
        number = (step - start) * COLUMNS + column
        beyond = beyond | (number < tl.where(step < 0, NUM_GLOBAL + COLUMNS, 0))
    is_global = beyond & (number < globals)
    there = slot < walked.to(tl.uint32)
    in_list = slot < listed.to(tl.uint32)
    entry = tl.where(in_list, entry, block)
    first = NUM_GLOBAL + entry * BLOCK_SIZE
    limit = tl.where(there, length - first, 0)
    exists = tl.where(beyond, number < globals, within < limit)
    token = tl.where(beyond, number, first + within)
    last = tl.where(limit > 0, length - 1, 0)
    if pack == 1 and parts * COLUMNS > BLOCK_SIZE:
        last = tl.minimum(last, first + (BLOCK_SIZE - 1))
    source = tl.minimum(first + within, last)
    if NUM_GLOBAL > 0:
        source = tl.where(is_global, number, source)
    some = tl.broadcast_to(tl.maximum(limit, globals), [COLUMNS]) > 0
    # Each global row meets a token in that token's own block, and the globals in block 0, whose own
    # block is the first that it lists, if any.
    if pack > 1:
        to_tokens = in_list | (beyond & with_globals)
        to_globals = tl.where(beyond, 0, tl.where(there, entry, -1)) == block
    else:
        to_tokens = in_list | with_globals
        to_globals = tl.where(step < 0, 0, entry) == block
    return (
        token, exists, source, some, first, within, limit, to_tokens, to_globals, beyond, number
    )  # fmt: skip


@triton.jit
def load_codes(ptr, tokens, length, shift, of_globals, NUM_GLOBAL: tl.constexpr):
    """Position codes of tokens, plus shift; `of_globals` for the globals."""
    held = (tokens < length) & (tokens >= NUM_GLOBAL)
    code = tl.load(ptr + tokens - NUM_GLOBAL, mask=held, other=0) + shift
    return tl.where(tokens < NUM_GLOBAL, of_globals, code)


@triton.jit
def row_codes(
    codes_ptr, tokens, length, num_offsets, ROWS_ARE_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What `column_logits` takes as the codes of rows.

    Where it can be, three numbers by which a pair's row of the bias table is one addition: where a
    row has the column of least code; that code, and how far above it a column's may be. Clamped are
    the few codes rather than each pair: those of rows to at most (R0 - 1) / 2 below the largest,
    and those of columns to as much from every row. That changes none that fits the table, and leads
    no other outside it.
    """
    centre = (num_offsets - 1) // 2
    if NUM_GLOBAL > 1 or COLUMNS // BLOCK_SIZE > 1:
        if ROWS_ARE_KEYS:
            return load_codes(codes_ptr, tokens, length, 0, -GLOBAL_CODE, NUM_GLOBAL)
        else:
            return load_codes(codes_ptr, tokens, length, centre, GLOBAL_CODE, NUM_GLOBAL)
    else:
        held = (tokens < length) & (tokens >= NUM_GLOBAL)
        code = tl.load(codes_ptr + tokens - NUM_GLOBAL, mask=held, other=-(2**31))
        largest = tl.max(code, axis=0)
        code = tl.where(held, tl.minimum(tl.maximum(code - largest, -centre), 0), 0)
        line = -code if ROWS_ARE_KEYS else code + 2 * centre
        return line, largest - centre, (tl.min(code, axis=0) + 2 * centre).to(tl.uint32)


@triton.jit
def load_bias(entries):
    """The bias of entries of the table, which start with it: in the dK/dV kernel they are int64."""
    return tl.load(entries.to(tl.pointer_type(tl.float32), bitcast=True))


@triton.jit
def bias_index(
    rows, row_code, code, beyond, number, num_offsets,
    ROWS_ARE_KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr,
):  # fmt: skip
    """Row of the bias table for each pair of a row and a column; num_offsets is R0.

    One unsigned minimum keeps bad codes inside the table, where a negative index is a huge one, and
    leads global rows and columns, whose codes are out of reach, to a row's last entry: of a global
    row the one that it has for all tokens. From there it is as far to a single global's entry for
    token rows as for the global's own.
    """
    last = tl.zeros_like(rows) + num_offsets - 1
    if NUM_GLOBAL > 0:
        of_global = tl.minimum(rows - BLOCK_SIZE, NUM_GLOBAL - 1)
        beyond_tokens = num_offsets + of_global + (NUM_GLOBAL if ROWS_ARE_KEYS else 0)
        last = tl.where(of_global >= 0, beyond_tokens, last)
    if ROWS_ARE_KEYS:
        index = code[None, :] - row_code[:, None]
    else:
        index = row_code[:, None] - code[None, :]
    index = tl.minimum(index.to(tl.uint32), last.to(tl.uint32)[:, None]).to(tl.int32)
    if NUM_GLOBAL > 1:
        number = tl.minimum(number, NUM_GLOBAL - 1)[None, :]
        a = tl.where(of_global >= 0, of_global, 0)[:, None]
        if ROWS_ARE_KEYS:
            among, to_global = number * NUM_GLOBAL + a, number
        else:
            among, to_global = a * NUM_GLOBAL + number, NUM_GLOBAL + number
        to_global = tl.where((of_global >= 0)[:, None], 2 * NUM_GLOBAL + among, to_global)
        index = tl.where(beyond[None, :], num_offsets + to_global, index)
    return index


@triton.jit
def column_logits(
    step, entry, listed, walked, start, block, length, rows,
    held, ptr, stride, other_ptr, other_stride,
    scale_log2, table_ptr, codes_ptr, row_code, shift, num_offsets,
    ROWS_ARE_KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_GLOBAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One step of columns: their tokens, which exist, which can only be globals, the tokens to read
    and whether to read any, all five together; whether the global rows see any (of several blocks,
    which), their rows behind `ptr` and `other_ptr`, the logits of the first with the rows that hold
    `held`, which rows see any of them, and where the table's entry of each pair is.

    With a table logits are in base 2, without one they are bare products, to be multiplied by
    `scale_log2` where that costs nothing. Those of pairs that do not attend are -inf, but where a
    whole row sees nothing, or the column is a query that does not exist: a select for each pair is
    kept for the few steps that need it.
    """
    token, exists, source, some, first, within, limit, to_tokens, to_globals, beyond, number = (
        column_tokens(
            step, entry, listed, walked, start, block, length, BLOCK_SIZE, NUM_GLOBAL, COLUMNS
        )
    )
    parts: tl.constexpr = (BLOCK_SIZE + COLUMNS - 1) // COLUMNS
    if ROWS_ARE_KEYS and COLUMNS // BLOCK_SIZE <= 1:
        # The same by one comparison: fewer instructions, but for queries more registers.
        to_tokens = step < tl.where(start < 0, listed * parts, 2**31 - 1)
    entries = 0
    LINES: tl.constexpr = NUM_GLOBAL <= 1 and COLUMNS // BLOCK_SIZE <= 1
    if table_ptr is not None:
        # Before the product: of two layouts that meet, the compiler goes on with the later one's.
        if LINES:
            line, least, span = row_code
            # Two of each, or every thread would load the codes of all its columns.
            last = length - NUM_GLOBAL - 1  # below 0 without tokens
            place = tl.minimum(first - NUM_GLOBAL + within, last)
            places = place[:, None] + tl.zeros([1, 2], tl.int32)
            code = tl.load(codes_ptr + places, mask=places >= 0, other=0)
            code = tl.minimum((code - least).to(tl.uint32), span).to(tl.int32)
            code, _ = tl.split(code if ROWS_ARE_KEYS else -code)
            near, far = line[:, None], code[None, :]
            if ROWS_ARE_KEYS:
                near, far = code[None, :], line.to(tl.uint32)[:, None]
        else:
            of_globals = GLOBAL_CODE if ROWS_ARE_KEYS else -GLOBAL_CODE
            code = load_codes(codes_ptr, token, length, shift, of_globals, NUM_GLOBAL)
            far = bias_index(
                rows, row_code, code, beyond, number, num_offsets,
                ROWS_ARE_KEYS, BLOCK_SIZE, NUM_GLOBAL,
            )  # fmt: skip
            near = tl.zeros([1, COLUMNS], tl.int32)
            if NUM_GLOBAL == 1:
                near = tl.where(beyond, 1 if ROWS_ARE_KEYS else 2, 0)[None, :]
        entries = (table_ptr + near) + far
        bias = load_bias(entries)
    # Both on their way before anything waits for one of them.
    here = load_rows(ptr, source, stride, some, HEAD_DIM, DIM)
    other = load_rows(other_ptr, source, other_stride, some, HEAD_DIM, DIM)
    product = products(held, here)
    logit = product
    is_token = rows < BLOCK_SIZE
    if table_ptr is not None:
        logit = product * scale_log2 + bias
        if LINES and NUM_GLOBAL == 1:  # noqa: SIM102 (while compiling)
            # Only in these steps does the global row, or the global column, count.
            if to_globals | (step < parts):
                globals_ptr = table_ptr + num_offsets
                of_global = tl.fma(product, scale_log2, load_bias(globals_ptr + ROWS_ARE_KEYS))
                logit = tl.where(is_token[:, None], logit, of_global)
                from_token = load_bias(globals_ptr + (1 - ROWS_ARE_KEYS))
                to_global = tl.where(is_token, from_token, load_bias(globals_ptr + 2))
                to_global = product * scale_log2 + to_global[:, None]
                logit = tl.where(beyond[None, :], to_global, logit)
    if COLUMNS // BLOCK_SIZE > 1:
        seen = tl.where(is_token[:, None], to_tokens[None, :], to_globals[None, :])
        logit = tl.where(seen & exists[None, :], logit, float("-inf"))
        active = rows >= 0
    else:
        unseen = (tl.where(is_token, 0, block) != 0)[:, None]
        if not ROWS_ARE_KEYS:  # of a query that does not exist the lse is infinite
            unseen = unseen | ~exists[None, :]
        logit = tl.where(beyond[None, :] & unseen, float("-inf"), logit)
        if not ROWS_ARE_KEYS:  # noqa: SIM102 (while compiling)
            if limit < BLOCK_SIZE:
                # A thread has the same two of all eight columns: it compares one number of its own
                # with constants.
                column = tl.arange(0, COLUMNS)
                present = limit - (within - column) - (column & 6) > (column & -7)
                logit = tl.where((present | beyond)[None, :], logit, float("-inf"))
        active = tl.where(is_token, to_tokens, to_globals)
    columns = token, exists, beyond, source, some
    return columns, to_globals, here, other, logit, active, entries


@triton.jit
def logit_weight(scale):
    """From a product to base 2. Times a positive weight, -inf stays what it is."""
    return tl.maximum(scale * LOG2_E, 1e-37)


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


def key_value_strides(key: torch.Tensor, value: torch.Tensor) -> tuple[int | None, ...]:
    """Strides of both; the last is None where it is the key's, as in a packed projection."""
    of_rows = None if value.stride(2) == key.stride(2) else value.stride(2)
    return *key.stride()[:3], *value.stride()[:2], of_rows


def bias_arguments(
    bias_table: torch.Tensor | None, position_codes: torch.Tensor | None, num_global: int
) -> tuple[torch.Tensor | None, int, int]:
    """Table in base 2, a head's entries side by side (to fit L1); R0; batch stride of the codes."""
    if bias_table is None or position_codes is None:
        return None, 1, 0
    num_offsets = bias_table.shape[0] - 2 * num_global - num_global**2
    codes_batch = position_codes.stride(0) if position_codes.shape[0] > 1 else 0
    table = bias_table.new_empty(bias_table.shape[::-1])
    torch.mul(bias_table.t(), LOG2_E.value, out=table)
    return table, num_offsets, codes_batch

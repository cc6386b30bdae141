"""Token pruning: select the highest scores of each sample, copy the rows that they leave.

Tiling. One program selects for one sample. A score becomes an int32 that orders as the score does;
the threshold, the largest key that at least `keep` tokens reach, is found by bisection over the
bits (32 counts, 16 for halves), which costs the same however many scores tie, unlike a histogram
whose bins all threads would then add to. Up to `SELECT_TILE` tokens stay in registers; longer
samples are read again, from L2, for each count. One walk in the order of the sequence then emits
the survivors by prefix sums: ties go to the lower index by themselves.

Rows are copied by programs that each own a tile of output rows: from `FUSED_BATCH` samples on, when
there is one for every multiprocessor, by the program that selected them, in the same launch; for
fewer samples by a second launch over all of them. The backward is one launch and a gather, too: row
i of the gradient is the row of its slot in the inverse map, or zeros. Each element of a result is
written once; no atomics, nothing read by the host.

Memory traffic, e bytes an element and s a score: forward reads and writes (num_global + keep) dim e
a sample, backward reads as much and writes (num_global + num_tokens) dim e; beside it s + 4 bytes a
token and 8 to 20 a survivor.

Numerics: none; bits are compared and copied.

Source: SViTT (Li et al., CVPR 2023), section 3.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tiles import cdiv, copy_tile, launch_options, next_pow2, on_device

SELECT_TILE = 4096
FUSED_BATCH = 128


@triton.jit
def _load_keys(scores_ptr, number, num_tokens):
    """int32 keys that order as scores do: -0 is 0, NaN below -inf, below it what is no token."""
    exists = number < num_tokens
    score = tl.load(scores_ptr + number, mask=exists, other=0.0)
    if score.dtype == tl.float32:
        bits = score.to(tl.int32, bitcast=True)
        magnitude, infinity = 0x7FFFFFFF, 0x7F800000
    else:
        bits = score.to(tl.int16, bitcast=True).to(tl.int32)
        magnitude = 0x7FFF
        infinity = 0x7F80 if score.dtype == tl.bfloat16 else 0x7C00
    size = bits & magnitude
    key = tl.where(bits < 0, bits ^ magnitude, bits)
    key = tl.where(size == 0, 0, key)
    key = tl.where(size > infinity, -magnitude, key)
    return tl.where(exists, key, -0x80000000)


@triton.jit
def _reaching(scores_ptr, keys, num_tokens, least, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    """How many of a sample's keys are at least `least`."""
    count = tl.sum((keys >= least).to(tl.int32), axis=0)
    if not ONE_TILE:
        for start in range(TILE, num_tokens, TILE):
            more = _load_keys(scores_ptr, start + tl.arange(0, TILE), num_tokens)
            count += tl.sum((more >= least).to(tl.int32), axis=0)
    return count


@triton.jit
def _emit(
    keys, number, num_tokens, least, wanted, above_seen, ties_seen,
    indices_ptr, inverse_ptr, codes_ptr, kept_codes_ptr,
):  # fmt: skip
    """Write what one tile of a sample keeps; the numbers above and at the threshold so far."""
    exists = number < num_tokens
    above, tie = (keys > least).to(tl.int32), (exists & (keys == least)).to(tl.int32)
    above_before = above_seen + tl.cumsum(above, axis=0) - above
    ties_before = ties_seen + tl.cumsum(tie, axis=0) - tie
    kept = (above > 0) | ((tie > 0) & (ties_before < wanted))
    slot = above_before + tl.minimum(ties_before, wanted)
    tl.store(indices_ptr + slot, number.to(tl.int64), mask=kept)
    if inverse_ptr is not None:
        tl.store(inverse_ptr + number, tl.where(kept, slot, -1), mask=exists)
    if codes_ptr is not None:
        tl.store(kept_codes_ptr + slot, tl.load(codes_ptr + number, mask=kept), mask=kept)
    return above_seen + tl.sum(above, axis=0), ties_seen + tl.sum(tie, axis=0)


@triton.jit
def _gather_rows(
    from_ptr, map_ptr, to_ptr, first, num_global, count, from_row,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write rows `first` on of one sample: the globals as they are, then the rows that a map names.

    Forward the map is the list of survivors; backward it is the inverse map, whose -1 are zeros.
    """
    row = first + tl.arange(0, ROWS)
    exists = row < num_global + count
    mapped = tl.load(map_ptr + row - num_global, mask=exists & (row >= num_global), other=-1)
    mapped = mapped.to(tl.int64)
    given = exists & ((row < num_global) | (mapped >= 0))
    from_ptr += tl.where(row < num_global, row, num_global + mapped)[:, None] * from_row
    to_ptr += row.to(tl.int64)[:, None] * DIM
    for start in tl.static_range(0, DIM, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (column < DIM)[None, :]
        x = tl.load(from_ptr + column[None, :], mask=given[:, None] & inside, other=0.0)
        tl.store(to_ptr + column[None, :], x, mask=exists[:, None] & inside)


_COUNTS = ["num_tokens", "keep", "count", "num_global", "row_tiles", "score_batch", "codes_batch"]


@triton.jit(do_not_specialize=_COUNTS)
def _select_kernel(
    scores_ptr, codes_ptr, indices_ptr, inverse_ptr, kept_codes_ptr, tokens_ptr, out_ptr,
    num_tokens, keep, num_global, score_batch, codes_batch, token_batch, token_row,
    TILE: tl.constexpr, ONE_TILE: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Select for one sample and, given tokens, copy its rows."""
    sample = tl.program_id(0).to(tl.int64)
    scores_ptr += sample * score_batch
    indices_ptr += sample * keep
    if inverse_ptr is not None:
        inverse_ptr += sample * num_tokens
    if codes_ptr is not None:
        codes_ptr += sample * codes_batch
        kept_codes_ptr += sample * keep
    number = tl.arange(0, TILE)
    keys = _load_keys(scores_ptr, number, num_tokens)

    # The largest threshold that `keep` tokens reach: its sign, then bit by bit.
    bits: tl.constexpr = 32 if scores_ptr.dtype.element_ty == tl.float32 else 16
    positive = _reaching(scores_ptr, keys, num_tokens, 0, TILE, ONE_TILE) >= keep
    least = tl.where(positive, 0, -(2 ** (bits - 1)))
    for step in range(bits - 1):
        trial = least + (1 << (bits - 2 - step))
        reached = _reaching(scores_ptr, keys, num_tokens, trial, TILE, ONE_TILE)
        least = tl.where(reached >= keep, trial, least)

    wanted = keep - _reaching(scores_ptr, keys, num_tokens, least + 1, TILE, ONE_TILE)
    above, ties = _emit(
        keys, number, num_tokens, least, wanted, 0, 0,
        indices_ptr, inverse_ptr, codes_ptr, kept_codes_ptr,
    )  # fmt: skip
    if not ONE_TILE:
        for start in range(TILE, num_tokens, TILE):
            keys = _load_keys(scores_ptr, start + number, num_tokens)
            above, ties = _emit(
                keys, start + number, num_tokens, least, wanted, above, ties,
                indices_ptr, inverse_ptr, codes_ptr, kept_codes_ptr,
            )  # fmt: skip

    if tokens_ptr is not None:
        tl.debug_barrier()  # other threads read the indices that this one wrote
        tokens_ptr += sample * token_batch
        out_ptr += sample * (num_global + keep) * DIM
        for first in range(0, num_global + keep, ROWS):
            _gather_rows(
                tokens_ptr, indices_ptr, out_ptr, first, num_global, keep, token_row,
                DIM, ROWS, COLUMNS,
            )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def _gather_kernel(
    from_ptr, map_ptr, to_ptr, count, num_global, row_tiles, from_batch, from_row,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gather one tile of rows of one sample through a map of `count` tokens."""
    sample = (tl.program_id(0) // row_tiles).to(tl.int64)
    _gather_rows(
        from_ptr + sample * from_batch,
        map_ptr + sample * count,
        to_ptr + sample * (num_global + count) * DIM,
        tl.program_id(0) % row_tiles * ROWS, num_global, count, from_row, DIM, ROWS, COLUMNS,
    )  # fmt: skip


def _launch_select(
    scores: torch.Tensor,
    keep: int,
    inverse: torch.Tensor | None,
    position_codes: torch.Tensor | None,
    codes: torch.Tensor | None,
    tokens: torch.Tensor | None,
    out: torch.Tensor | None,
    num_global: int,
) -> torch.Tensor:
    """Start the selection, with the copies where tokens are given; the indices."""
    batch, num_tokens = scores.shape
    indices = scores.new_empty(batch, keep, dtype=torch.int64)
    if batch == 0 or num_tokens + num_global == 0:
        return indices
    tile = min(next_pow2(num_tokens), SELECT_TILE)
    # A limit that is said aloud keeps ptxas from spilling for the sake of occupancy.
    shape, strides = {"DIM": 1, "ROWS": 1, "COLUMNS": 1}, (0, 0)
    if tokens is not None:
        # Alone on its multiprocessor, a program needs 32 KiB on their way to use the bandwidth.
        shape, strides = copy_tile(tokens, 32 * 1024), tokens.stride()[:2]
    shared = position_codes is None or position_codes.shape[0] == 1
    with on_device(scores):
        _select_kernel[(batch,)](
            scores, position_codes, indices, inverse, codes, tokens, out,
            num_tokens, keep, num_global, scores.stride(0), 0 if shared else num_tokens, *strides,
            TILE=tile, ONE_TILE=num_tokens <= tile, **shape, **launch_options(8), maxnreg=255,
        )  # fmt: skip
    return indices


def _launch_gather(
    source: torch.Tensor, mapped: torch.Tensor, target: torch.Tensor, num_global: int
) -> None:
    """Start the copies, one program a tile of rows of the target."""
    if target.numel() == 0:
        return
    batch, rows, _ = target.shape
    tile = copy_tile(source)
    tiles = cdiv(rows, tile["ROWS"])
    with on_device(source):
        _gather_kernel[(batch * tiles,)](
            source, mapped, target, rows - num_global, num_global, tiles, *source.stride()[:2],
            **tile, **launch_options(), maxnreg=128,
        )  # fmt: skip


def select_tokens(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Launches the selection of the op `svitt_ops::select_tokens`.

    Args:
        scores: (batch, num_tokens), last stride 1.
        keep: survivors of each sample.

    Returns:
        int64 (batch, keep), ascending.
    """
    return _launch_select(scores, keep, None, None, None, None, None, 0)


def prune_tokens(
    tokens: torch.Tensor,
    scores: torch.Tensor,
    keep: int,
    num_global: int,
    position_codes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches selection and copy of the op `svitt_ops::prune_tokens`, in one launch or two.

    Args:
        tokens: (batch, num_global + num_tokens, dim), last stride 1.
        scores: (batch, num_tokens), last stride 1.
        keep: survivors of each sample.
        num_global: rows that are always kept, at the start.
        position_codes: int32 (1 or batch, num_tokens), or None.

    Returns:
        out (batch, num_global + keep, dim), indices int64 (batch, keep), inverse int32
        (batch, num_tokens), and codes int32 (batch, keep), empty without `position_codes`.
    """
    batch, num_tokens = scores.shape
    rows, dim = num_global + keep, tokens.shape[2]
    out = tokens.new_empty(batch, rows, dim)
    inverse = scores.new_empty(batch, num_tokens, dtype=torch.int32)
    codes = inverse.new_empty(0) if position_codes is None else inverse.new_empty(batch, keep)
    kept_codes = None if position_codes is None else codes
    fused = batch >= FUSED_BATCH and dim > 0
    copied = (tokens, out) if fused else (None, None)
    indices = _launch_select(scores, keep, inverse, position_codes, kept_codes, *copied, num_global)
    if not fused:
        _launch_gather(tokens, indices, out, num_global)
    return out, indices, inverse, codes


def prune_tokens_backward(
    grad_out: torch.Tensor, inverse: torch.Tensor, num_global: int
) -> torch.Tensor:
    """Launches the gather of the op `svitt_ops::prune_tokens_backward`.

    Args:
        grad_out: (batch, num_global + keep, dim), last stride 1.
        inverse: int32 (batch, num_tokens), the slot of each token or -1.
        num_global: rows that were always kept, at the start.

    Returns:
        (batch, num_global + num_tokens, dim).
    """
    batch, num_tokens = inverse.shape
    grad = grad_out.new_empty(batch, num_global + num_tokens, grad_out.shape[2])
    _launch_gather(grad_out, inverse, grad, num_global)
    return grad

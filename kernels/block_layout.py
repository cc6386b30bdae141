"""Drawing a block layout on the device: local window, largest random draws, transposed lists.

Tiling. One program holds one row of the (blocks, blocks) noise in registers, so a row may have up
to a few thousand blocks. It finds the draw that just belongs to the `num_random` largest by
bisection over float bits (31 counts, whatever num_random is), takes everything above and, of the
draws equal to it, the first ones, and writes the row's list by a prefix sum. A second kernel does
the same with the columns of the membership matrix, for the transposed lists. Two launches, no
atomics, nothing read by the host.

Memory traffic: 4 M^2 bytes of noise read, M^2 bytes of membership written and read, 4 M^2 bytes of
transposed lists written.

Numerics: integer. Non-negative floats order as their bits do. Equal noise gives an equal layout,
ties going to the lower index.

Source: SViTT (Li et al., CVPR 2023), section 3.2, and BigBird (Zaheer et al., 2020), appendix D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tiles import draw_warps, launch_options, next_pow2, on_device


@triton.jit
def _write_list(counts_ptr, blocks_ptr, row, width, member, number, num_blocks):
    """The ascending list of a row's members and their count; entries past the count become 0."""
    member = member & (number < num_blocks)
    flag = member.to(tl.int32)
    count = tl.sum(flag, axis=0)
    before = tl.cumsum(flag, axis=0) - flag
    # Non-members go, as zeros, to the places behind the members: every entry is written exactly
    # once.
    place = tl.where(member, before, count + number - before)
    entry = tl.where(member, number, 0)
    written = (number < num_blocks) & (place < width)
    tl.store(blocks_ptr + row.to(tl.int64) * width + place, entry, mask=written)
    tl.store(counts_ptr + row, count)


@triton.jit(do_not_specialize=["num_blocks", "width", "num_local", "num_random"])
def _draw_rows_kernel(
    noise_ptr, member_ptr, counts_ptr, blocks_ptr, num_blocks, width, num_local, num_random,
    NUMBERS: tl.constexpr,
):  # fmt: skip
    """Members of one row: the wrapping local window and the `num_random` largest of the others."""
    row = tl.program_id(0)
    block = row % num_blocks
    number = tl.arange(0, NUMBERS)
    exists = number < num_blocks
    place = row.to(tl.int64) * num_blocks + number
    bits = tl.load(noise_ptr + place, mask=exists, other=0.0).to(tl.int32, bitcast=True)
    local = (number - block + num_local // 2 + num_blocks) % num_blocks < num_local
    bits = tl.where(exists & ~local, bits, -1)

    # The largest threshold that at least num_random draws reach, bit by bit; 0 if none does.
    threshold = 0
    for step in range(31):
        trial = threshold | (1 << (30 - step))
        reached = tl.sum((bits >= trial).to(tl.int32), axis=0)
        threshold = tl.where(reached >= num_random, trial, threshold)
    above = bits > threshold
    equal = (bits == threshold).to(tl.int32)
    wanted = num_random - tl.sum(above.to(tl.int32), axis=0)
    first_equal = (equal > 0) & (tl.cumsum(equal, axis=0) <= wanted)
    member = exists & (local | above | first_equal)
    tl.store(member_ptr + place, member.to(tl.int8), mask=exists)
    _write_list(counts_ptr, blocks_ptr, row, width, member, number, num_blocks)


@triton.jit(do_not_specialize=["num_blocks"])
def _transpose_kernel(member_ptr, counts_ptr, blocks_ptr, num_blocks, NUMBERS: tl.constexpr):
    """List of one column of the membership matrix."""
    row = tl.program_id(0)
    number = tl.arange(0, NUMBERS)
    first = (row // num_blocks).to(tl.int64) * num_blocks * num_blocks + row % num_blocks
    place = first + number.to(tl.int64) * num_blocks
    member = tl.load(member_ptr + place, mask=number < num_blocks, other=0) != 0
    _write_list(counts_ptr, blocks_ptr, row, num_blocks, member, number, num_blocks)


def draw_block_layout(
    noise: torch.Tensor, num_local: int, num_random: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the two drawing kernels of the op `svitt_ops::draw_block_layout`.

    Args:
        noise: fp32 (*lead, blocks, blocks), in [0, 1).
        num_local: blocks of the local window.
        num_random: further blocks a row.

    Returns:
        key_counts (*lead, blocks), key_blocks (*lead, blocks, min(num_local + num_random, blocks)),
        query_counts (*lead, blocks), query_blocks (*lead, blocks, blocks), all int32.
    """
    lead, num_blocks = noise.shape[:-2], noise.shape[-1]
    num_local = min(num_local, num_blocks)
    num_random = min(num_random, num_blocks - num_local)
    width = num_local + num_random
    noise = noise.contiguous()
    key_counts = noise.new_empty(*lead, num_blocks, dtype=torch.int32)
    key_blocks = noise.new_empty(*lead, num_blocks, width, dtype=torch.int32)
    query_counts = torch.empty_like(key_counts)
    query_blocks = noise.new_empty(*lead, num_blocks, num_blocks, dtype=torch.int32)
    rows = key_counts.numel()
    if rows == 0:
        return key_counts, key_blocks, query_counts, query_blocks
    member = noise.new_empty(noise.shape, dtype=torch.int8)
    numbers, options = next_pow2(num_blocks), launch_options(draw_warps(num_blocks))
    with on_device(noise):
        _draw_rows_kernel[(rows,)](
            noise, member, key_counts, key_blocks, num_blocks, width, num_local, num_random,
            NUMBERS=numbers, **options,
        )  # fmt: skip
        _transpose_kernel[(rows,)](
            member, query_counts, query_blocks, num_blocks, NUMBERS=numbers, **options
        )
    return key_counts, key_blocks, query_counts, query_blocks

"""Tile tables: how large a tile each kernel works on, and with how many warps and pipeline stages.

The tables are explicit and depend on shapes, dtype and architecture alone; a file that `svitt tune`
wrote stands before them (`tile_table`). Nothing is tuned at run time: a result never depends on
what ran before, the first call costs one compilation, and `compile_check` can visit every
configuration without a GPU.
"""

from __future__ import annotations

from bisect import bisect_right
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from . import tile_table
from .tile_table import ContrastPass, CrossPass, Pass

Tile = TypeVar("Tile", "AttentionTile", "ContrastTile")


@dataclass(frozen=True, kw_only=True)
class AttentionTile:
    """One tile configuration of the attention kernels."""

    rows: int
    """Rows a program owns (queries, or keys in the dK/dV kernel); a power of two."""
    columns: int
    """Gathered tokens a step of the inner loop works on."""
    head_dim: int
    """The head dimension, padded to a power of two of at least 16."""
    num_warps: int
    num_stages: int
    max_registers: int = 255
    """Registers a thread at most; below 255 where one more program then runs beside the others."""

    @property
    def shape(self) -> dict[str, int]:
        """The tile's constants under the names that the kernels give them."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "DIM": self.head_dim}

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        return launch_options(self.num_warps, self.num_stages) | {"maxnreg": self.max_registers}


def next_pow2(n: int) -> int:
    """Smallest power of two that is at least n (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def launch_options(num_warps: int = 4, num_stages: int = 2) -> dict[str, int]:
    """Options every launch passes; multiply-adds fuse because we say so, not by default."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def device_arch(device: torch.device) -> int:
    """Compute capability as one number (90 for an H100); 0 for a CPU, where Triton interprets."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile_arch(arch: int) -> int:
    """The architecture whose tiles another takes that has none of its own.

    Consumer cards from sm_120 on have neither the shared memory nor the products of sm_90: theirs,
    99 KiB a program, are those of sm_86 and sm_89, where the tiles of sm_80 run.
    """
    return 80 if arch >= 120 else arch


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current, since that is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def tuned(tile: Tile, table: str, which: str, dtype: torch.dtype, arch: int, **shape: int) -> Tile:
    """The tile that the table in use has for a shape class; where it has none, the one given."""
    _, found = tile_table.in_use(arch)
    fields = found and found.get(tile_table.key(table, which, str(dtype)[6:], shape))
    return replace(tile, **fields) if fields else tile


def attention_tile(
    which: Pass,
    head_dim: int,
    block_size: int,
    num_global: int,
    dtype: torch.dtype,
    biased: bool,
    arch: int,
) -> AttentionTile:
    """Tile of one of the three block-sparse attention kernels.

    64 rows are what one warp group's WGMMA takes on sm_90, and hold a block of 56 with 8 rows to
    spare for the global tokens. Smaller blocks take the next power of two; larger ones take several
    row tiles. The entries keep every configuration free of spills (see `compile_check`), and where
    head_dim is at most 64 let two to four programs share a multiprocessor, which is what hides the
    latency of gathered loads.
    """
    dim = max(16, next_pow2(head_dim))
    rows = min(max(16, next_pow2(block_size)), 64)
    # Said aloud, the limit of the hardware keeps ptxas from spilling for the sake of occupancy.
    num_warps, num_stages, max_registers = 4, 3, 255
    device, arch = arch, tile_arch(arch)
    hopper = arch >= 90 and rows == 64
    if arch == 0:
        # The interpreter pays per program and per step, whatever their size.
        columns = 64
    elif dtype == torch.float32:
        # No tensor cores at full precision: a thread holds both operands of a dot in registers.
        tallest = 16 if dim <= 64 else 4 if dim > 128 and which == "grad_key" else 8
        if which == "grad_key" and biased and block_size <= 8:
            tallest //= 2  # several blocks a step take more registers
        rows, columns = min(rows, tallest), 16
        num_warps, num_stages = 8 if biased or dim > 64 else 4, 1
    elif head_dim % 8 != 0:
        # Rows that are not aligned to 16 bytes take several times the pointers.
        rows, columns = min(rows, 32 if dim <= 128 else 16), 16
        num_warps, num_stages = 4 if dim <= 64 else 8, 2
    elif hopper and dim <= 64 and biased:
        # Three programs beside each other, as on an H200 is faster than two, where a tile holds a
        # block and its globals. Of wider steps the registers hold just those of unmasked dims.
        whole = block_size + num_global <= 64
        plain = whole and head_dim == 64 and num_global <= 1
        columns, num_stages = 64 if which != "grad_key" and plain else 32, 1
        max_registers = 255 if which == "grad_key" or not whole else 168
    elif hopper and dim <= 64:
        columns, num_stages = 64, 1 if which == "grad_query" else 2
        max_registers = 255 if which == "grad_key" else 168
    elif dim <= 64 and biased:
        columns = 16
        if which != "forward":
            num_warps = 8 if rows == 64 else 4
    elif dim <= 64:
        columns = 32 if which == "forward" or arch >= 90 else 16
    else:
        columns = 16 if dim > 128 or (biased and which == "grad_key") else 32
        if dim > 128 and which == "grad_key":
            rows = min(rows, 32)
        num_warps = 8 if rows == 64 or dim > 128 else 4
        # Indirect loads are pipelined from three stages on; here that would spill.
        num_stages = 2 if dim > 128 and biased else 3
    tile = AttentionTile(
        rows=rows, columns=columns, head_dim=dim, num_warps=num_warps, num_stages=num_stages,
        max_registers=max_registers,
    )  # fmt: skip
    return tuned(
        tile, "attention", which, dtype, device, head_dim=head_dim, block_size=block_size,
        globals=min(num_global, 2), biased=biased,
    )  # fmt: skip


def cross_tile(
    which: CrossPass, num_queries: int, head_dim: int, dtype: torch.dtype, arch: int
) -> AttentionTile:
    """Tile of one of the cross-attention kernels: `rows` queries by `columns` keys.

    Up to 64 queries are one tile, so that keys are read once. Few queries leave little to compute
    for each key that is read: columns and stages are there to have many bytes on their way.
    """
    dim = max(16, next_pow2(head_dim))
    rows = min(max(16, next_pow2(num_queries)), 64)
    num_warps, num_stages = 4, 3
    if arch == 0:
        # The interpreter pays per program and per step, whatever their size.
        columns = 64
    elif dtype == torch.float32:
        # No tensor cores at full precision: a thread holds both operands of a dot in registers.
        # A dot needs 16 terms: the backward sums over both sides of a tile, "grad_key" over rows.
        rows, columns = min(rows, 8 if dim > 64 and which in ("forward", "saliency") else 16), 16
        if which == "grad_key":
            columns = 8 if dim <= 128 else 4
        num_warps, num_stages = 4 if dim <= 64 else 8, 1
    else:
        columns = 64 if dim <= 64 and which != "grad_key" else 32 if dim <= 128 else 16
        num_warps = 4 if dim <= 64 else 8
        if head_dim % 8 != 0:
            # Rows that are not aligned to 16 bytes take several times the pointers.
            rows, columns = min(rows, 32 if dim <= 128 else 16), 16
            num_stages = 2 if dim <= 128 else 1
        elif dim > 128 and which.startswith("grad") and tile_arch(arch) < 90:
            num_stages = 2  # three, or more rows, would take more than 99 KiB
            rows = min(rows, 32) if which == "grad_key" else rows
    tile = AttentionTile(
        rows=rows, columns=columns, head_dim=dim, num_warps=num_warps, num_stages=num_stages
    )
    return tuned(
        tile, "cross", which, dtype, arch, head_dim=head_dim,
        queries=min(max(16, next_pow2(num_queries)), 128),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ContrastTile:
    """One tile configuration of the contrastive kernels."""

    rows: int
    """Rows of one side that a program owns."""
    columns: int
    """Rows of the other side in a step."""
    chunk: int
    """Dims that a dot product sums at a time."""
    slice: int
    """Dims of the gradient that a program owns."""
    num_warps: int
    num_stages: int
    programs: int = 132
    """Programs that fill the machine: fewer are split over the other side."""
    max_registers: int = 255
    """Registers a thread at most; said aloud, it keeps ptxas from spilling for occupancy."""

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        return launch_options(self.num_warps, self.num_stages) | {"maxnreg": self.max_registers}

    def dims(self, dim: int) -> dict[str, int | bool]:
        """Constants: dims of a dot product at a time, whether that is all, whether it divides."""
        wide = max(self.chunk, self.slice)
        return {"CHUNK": self.chunk, "WHOLE": self.chunk >= dim, "EVEN": dim % wide == 0}

    def splits(self, blocks: int, length: int) -> tuple[int, int]:
        """Into how many splits to divide `length` rows, beside `blocks`; steps of each."""
        steps = max(cdiv(length, self.columns), 1)
        each = cdiv(steps, max(self.programs // blocks, 1))
        return cdiv(steps, each), each


ROW_CLASSES = (0, 128, 512, 2048, 8192)
"""The fewest rows of each class of a table: tiles are tuned for one size of each."""


def contrast_tile(
    which: ContrastPass, dim: int, rows: int, dtype: torch.dtype, arch: int
) -> ContrastTile:
    """Tile of a contrastive kernel for embeddings of `dim`, `rows` on the longer side."""
    tile = _contrast_tile(which, dim, rows, dtype, tile_arch(arch))
    masked = dtype == torch.float32 and arch and dim % tile.chunk
    if masked and (which == "ranks" or which.startswith("sigmoid_forward")):
        tile = replace(tile, columns=32)  # masks of dims, beside a softplus or ids, would spill
    least = ROW_CLASSES[bisect_right(ROW_CLASSES, rows) - 1]
    return tuned(tile, "contrast", which, dtype, arch, dim=dim, rows=least)


def _contrast_tile(which: str, dim: int, rows: int, dtype: torch.dtype, arch: int) -> ContrastTile:
    """The tile where no table has one.

    On sm_90 a program holds all dims of its rows: the other side's are read once, by a pipeline
    that does not drain between tiles. A warp owns whole rows of a tile of 16 rows a warp, so that
    sums over a row take two shuffles and no barrier.
    """
    width = max(16, next_pow2(dim))
    softmax = which in ("forward", "forward_ids", "backward", "backward_ids")
    which = which.removeprefix("sigmoid_")
    backward = which in ("backward", "backward_ids")
    if arch == 0:
        # The interpreter pays per program and per step, whatever their size.
        return ContrastTile(
            rows=32, columns=64, chunk=min(width, 256), slice=min(width, 512),
            num_warps=4, num_stages=1, programs=16,
        )  # fmt: skip
    if dtype == torch.float32:
        # No tensor cores at full precision: a thread holds both operands of a dot in registers.
        # Sixteen elements of a tile are four rows and four columns of a thread, read once each.
        large = backward or which in ("forward", "forward_ids", "ranks")
        wide = large and which != "ranks"
        return ContrastTile(
            rows=64 if large else 16, columns=64 if large and not backward else 16, chunk=16,
            slice=min(width, 128 if backward and dim % 128 == 0 else 64),
            num_warps=8 if wide or which == "taught_queue" else 4,
            num_stages=2 if which == "ranks" else 1, programs=264,
        )  # fmt: skip
    aligned = dim % 8 == 0
    if which in ("queue", "taught_queue"):
        # As many dims as registers hold: the candidates are read once for each slice.
        whole = aligned and arch >= 90 and width <= 256 and which == "queue"
        return ContrastTile(
            rows=64 if aligned else 16, columns=32,
            chunk=width if whole else min(width, 64 if aligned else 32),
            slice=min(width, 256 if aligned and arch >= 90 else 128),
            num_warps=4 if whole or not aligned else 8, num_stages=3 if whole else 2,
            programs=264 if whole else 132,
        )  # fmt: skip
    if which == "combine":
        return ContrastTile(
            rows=16, columns=32, chunk=min(width, 32), slice=min(width, 64), num_warps=8,
            num_stages=2,
        )  # fmt: skip
    if not aligned:
        # Rows that are not aligned to 16 bytes take several times the pointers.
        return ContrastTile(
            rows=16, columns=16 if softmax and which == "backward_ids" else 32,
            chunk=min(width, 32), slice=min(width, 128), num_warps=4, num_stages=2, programs=264,
        )  # fmt: skip
    if softmax:
        return _info_nce_tile(which, dim, width, rows, arch)
    if which == "sample":
        return ContrastTile(
            rows=16, columns=64, chunk=width if width <= 256 else 64, slice=16, num_warps=4,
            num_stages=2,
        )  # fmt: skip
    tall = arch >= 90 and rows >= 2048
    whole = arch >= 90 and width <= 256
    chunk = width if whole else min(width, 64)
    if backward:
        # Where more than masks hangs on the ids, 64 columns would spill.
        return ContrastTile(
            rows=64, columns=64 if arch >= 90 and which == "backward" else 32, chunk=chunk,
            slice=min(width, 256), num_warps=8, num_stages=3 if arch >= 90 else 2,
        )  # fmt: skip
    return ContrastTile(
        rows=128 if tall else 64, columns=32 if which == "forward_ids" else 64,
        chunk=chunk, slice=16, num_warps=8 if tall else 4,
        num_stages=3,
    )  # fmt: skip


def _info_nce_tile(which: str, dim: int, width: int, rows: int, arch: int) -> ContrastTile:
    """A tile for tensor cores and aligned rows, whose dims fill `width` once they are padded."""
    backward, ids = which.startswith("backward"), which.endswith("_ids")
    if dim % min(width, 64) != 0:
        # Dims that do not fill a chunk are masked, which takes registers.
        return ContrastTile(
            rows=64, columns=32, chunk=32, slice=min(width, 128), num_warps=8, num_stages=2,
            programs=264,
        )  # fmt: skip
    whole = arch >= 90 and dim == width <= 256
    tall = arch >= 90 and rows >= 2048
    chunk = width if whole else min(width, 64)
    if which == "forward_ids":
        # Four warps would spill, and so would three stages on sm_80 by Triton 3.6.
        return ContrastTile(
            rows=128, columns=32, chunk=chunk, slice=16, num_warps=8,
            num_stages=3 if arch >= 90 else 2,
        )  # fmt: skip
    if whole and not tall and not ids:
        # Two programs side by side: the products of one hide the exponentials of the other.
        return ContrastTile(
            rows=64, columns=32 if backward else 64, chunk=chunk, slice=width, num_warps=4,
            num_stages=2, programs=264,
        )  # fmt: skip
    if backward and arch >= 90 and dim == width <= 512 and not ids:
        # What the memory holds: all dims of the rows, and two or three stages of 32 columns.
        return ContrastTile(
            rows=128, columns=32, chunk=width, slice=min(width, 256), num_warps=8,
            num_stages=3 if whole else 2,
        )  # fmt: skip
    if backward:
        # Where more than masks hangs on the ids, 64 columns would spill.
        return ContrastTile(
            rows=64, columns=64 if arch >= 90 and not ids else 32, chunk=chunk,
            slice=min(width, 256), num_warps=8, num_stages=3 if arch >= 90 else 2,
        )  # fmt: skip
    return ContrastTile(
        rows=128 if tall else 64, columns=64, chunk=chunk, slice=16, num_warps=8 if tall else 4,
        num_stages=3,
    )  # fmt: skip


def draw_warps(num_blocks: int) -> int:
    """Warps of the layout kernels, which hold one row of the M x M noise in registers."""
    return min(max(next_pow2(num_blocks) // 256, 1), 8)


def combine_chunk(dim: int) -> int:
    """Partials that a combining kernel adds at a time: 16 KiB of fp32."""
    return max(16, 4096 // dim)


def copy_tile(rows: torch.Tensor, size: int = 16 * 1024) -> dict[str, int]:
    """Tile of `size` bytes of a kernel that copies rows of (batch, rows, dim).

    By 4 warps 16 KiB are eight vectors of 16 bytes on their way at a time in each thread, and leave
    registers for five programs on a multiprocessor. 256 columns divide the usual dims.
    """
    dim, each = rows.shape[2], rows.element_size()
    if dim * each % 16 != 0:
        size //= 4  # rows that are not aligned to 16 bytes take several times the pointers
    columns = min(next_pow2(dim), 256)
    return {"DIM": dim, "ROWS": min(max(size // (columns * each), 1), 128), "COLUMNS": columns}

"""What a compiled kernel costs, read off its machine code: no GPU is needed for that.

`Usage` has the resources that decide how many programs run side by side, and the innermost loops
with a tensor-core instruction: how many instructions a warp issues for a pass through each, and how
many of them only compute addresses, masks and loop counts.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory of one program, at most."""
SHARED_OF_SM = {80: 164 * 1024, 90: 228 * 1024}
SHARED_RESERVED = 1024  # by the driver, for each program
REGISTERS = 64 * 1024
REGISTER_UNIT = 256  # a warp gets a multiple of it
MOST_WARPS, MOST_PROGRAMS = 64, 32

TENSOR_CORE = ("HGMMA", "HMMA", "IMMA", "QGMMA")
INDEX = (
    "IMAD", "LOP3", "ISETP", "LEA", "SEL", "VIADD", "IADD3", "SHF", "IABS", "PLOP3", "PRMT",
    "VIMNMX", "VIADDMNMX", "UIMAD", "ULOP3", "UISETP", "ULEA", "USEL", "UIADD3", "USHF", "UPLOP3",
    "UPRMT",
)  # fmt: skip
"""Integer, index and select instructions; "IMAD" is also how a register is copied."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One innermost loop that multiplies matrices."""

    instructions: int
    index: int
    """Of them integer, index and select."""
    products: int
    """Of them on the tensor cores."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one compiled kernel takes."""

    registers: int
    spills: int
    """Bytes of memory of a thread."""
    shared: int
    programs: int
    """That fit on a multiprocessor."""
    loops: list[Loop] = field(default_factory=list)


def usage(compiled: Any, arch: int, num_warps: int, loops: bool = True) -> Usage:
    """Reads a kernel that `triton.compile` returned; its loops take a third of a second more."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = _run("cuobjdump", "--dump-resource-usage", cubin)
        listing = _run("nvdisasm", "-c", cubin) if loops else ""
    # LOCAL and STACK both are per-thread memory that only spills make these kernels use.
    found = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", resources)}
    registers, shared = found["REG"], int(compiled.metadata.shared)
    return Usage(
        registers=registers,
        spills=found["STACK"] + found["LOCAL"],
        shared=shared,
        programs=programs_beside(registers, shared, num_warps, arch),
        loops=matrix_loops(listing),
    )


def programs_beside(registers: int, shared: int, num_warps: int, arch: int) -> int:
    """How many programs fit on one multiprocessor: by warps, registers and shared memory."""
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // of_warp // num_warps
    by_shared = SHARED_OF_SM[arch] // (shared + SHARED_RESERVED)
    return min(by_registers, by_shared, MOST_WARPS // num_warps, MOST_PROGRAMS)


def matrix_loops(listing: str) -> list[Loop]:
    """Innermost loops with a tensor-core instruction in what `nvdisasm -c` prints, in order."""
    names: list[str] = []
    labels: dict[str, int] = {}
    backwards: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line):
            target = re.search(r"`\((\.L_x_\d+)\)", code[2])
            if code[1].startswith("BRA") and target and target[1] in labels:
                backwards.append((labels[target[1]], len(names)))
            names.append(code[1].partition(".")[0])
    innermost = [
        (first, last)
        for first, last in backwards
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in backwards)
    ]
    loops = []
    for first, last in innermost:
        counts = Counter(names[first : last + 1])
        products = sum(counts[name] for name in TENSOR_CORE)
        if products:
            index = sum(counts[name] for name in INDEX)
            loops.append(Loop(instructions=last - first + 1, index=index, products=products))
    return loops


def _run(tool: str, *arguments: str | Path) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([path, *arguments], check=True, capture_output=True, text=True)
    return done.stdout

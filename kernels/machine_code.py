"""What a compiled kernel costs, read off its machine code: no GPU is needed for that.

`Usage` has the resources that decide how many programs run side by side, and the innermost loops
with a tensor-core instruction: how many instructions a warp issues for a pass through each, how
many of them only compute addresses, masks and loop counts, how many cycles they keep their
scheduler, and what their accesses to memory do. The last is `cuxray`'s reading of the first warp;
only who develops kernels needs it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton

SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory of one program, at most. Tiles of sm_80, which has 163 KiB, also serve
sm_86, sm_89 and sm_120, which have this."""
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
    cycles: int
    """From issue to issue, as the compiler scheduled them; what waits for memory comes on top."""
    conflict_ways: int
    """Times that the worst access to shared memory is served; 1 is without conflict."""
    uncoalesced: int
    """Accesses to global memory that touch more sectors of 32 bytes than their bytes fill, and the
    one more that it takes to start inside a sector."""
    untraced: int
    """Accesses of whose addresses neither is known: by unknown strides, or by what was loaded."""


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
    resources = taken_apart(compiled, "cuobjdump", "--dump-resource-usage")
    listing = taken_apart(compiled, "nvdisasm", "-c", "-hex") if loops else ""
    # LOCAL and STACK both are per-thread memory that only spills make these kernels use.
    found = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", resources)}
    registers, shared = found["REG"], int(compiled.metadata.shared)
    return Usage(
        registers=registers,
        spills=found["STACK"] + found["LOCAL"],
        shared=shared,
        programs=programs_beside(registers, shared, num_warps, arch),
        loops=matrix_loops(listing, num_warps) if loops else [],
    )


def programs_beside(registers: int, shared: int, num_warps: int, arch: int) -> int:
    """How many programs fit on one multiprocessor: by warps, registers and shared memory."""
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // of_warp // num_warps
    by_shared = SHARED_OF_SM[arch] // (shared + SHARED_RESERVED)
    return min(by_registers, by_shared, MOST_WARPS // num_warps, MOST_PROGRAMS)


def matrix_loops(listing: str, num_warps: int) -> list[Loop]:
    """Innermost loops with a tensor-core instruction in `nvdisasm -c -hex`'s listing, in order."""
    from cuxray import analyze_accesses
    from cuxray.parse import ctrl, sass

    (function,) = sass.parse_gi(listing).functions.values()
    code = function.instructions
    names = [x.opcode.partition(".")[0] for x in code]
    words = re.findall(r"/\* 0x([0-9a-f]{16}) \*/", listing)
    stalls = [ctrl.decode_word(int(word, 16)).stall for word in words[1::2]]
    function.instructions = [y for x in code for y in _traceable(x)]
    found = analyze_accesses(function, (32 * num_warps, 1, 1))
    loops = []
    for first, last in _innermost(code):
        counts = Counter(names[first : last + 1])
        products = sum(counts[name] for name in TENSOR_CORE)
        if not products:
            continue
        start, end = code[first].addr, code[last].addr
        known = [x for x in found["accesses"] if start <= x["addr"] <= end]
        loops.append(
            Loop(
                instructions=last - first + 1,
                index=sum(counts[name] for name in INDEX),
                products=products,
                cycles=sum(max(stall, 1) for stall in stalls[first : last + 1]),
                conflict_ways=max((x.get("conflict_ways", 1) for x in known), default=1),
                uncoalesced=sum(
                    x["verdict"] == "uncoalesced" and x["sectors_best"] > x["sectors_ideal"] + 1
                    for x in known
                ),
                untraced=sum(start <= x["addr"] <= end for x in found["unanalyzed"]),
            )
        )
    return loops


def _innermost(code: list[Any]) -> list[tuple[int, int]]:
    """First and last instruction of every loop without another one inside."""
    labels: dict[str, int] = {}
    backwards = []
    for place, instruction in enumerate(code):
        labels.setdefault(instruction.block, place)
        target = re.search(r"`\((\.L_x_\d+)\)", instruction.operands)
        if instruction.opcode.startswith("BRA") and target and target[1] in labels:
            backwards.append((labels[target[1]], place))
    return [
        (first, last)
        for first, last in backwards
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in backwards)
    ]


def _traceable(instruction: Any) -> list[Any]:
    """The same in instructions that cuxray follows, which knows no extension of a sign.

    A clamp, by which indices stay inside a tensor, lets its first operand through as inside.
    """
    name, *kinds = instruction.opcode.split(".")
    operands = [x.strip() for x in instruction.operands.split(",")]
    zero = "URZ" if name.startswith("U") else "RZ"
    if name in ("SGXT", "USGXT"):
        # ((x & mask) ^ sign) - sign
        to, value, bits = operands
        mask = (1 << int(bits, 0)) - 1
        sign = 0 if "U32" in kinds else (mask + 1) >> 1
        written = [
            ("LOP3.LUT", f"{to}, {value}, {mask:#x}, {sign:#x}, 0x6a, !PT"),
            ("IADD3", f"{to}, {to}, -{sign:#x}, {zero}"),
        ]
    elif name == "VIMNMX":
        written = [("MOV", f"{operands[0]}, {operands[1]}")]
    elif name == "VIADDMNMX":
        written = [("IADD3", f"{operands[0]}, {operands[1]}, {operands[2]}, {zero}")]
    else:
        return [instruction]
    return [replace(instruction, opcode=opcode, operands=given) for opcode, given in written]


def tool(name: str) -> Path:
    """A program that comes with Triton.

    Raises:
        FileNotFoundError: it does not.
    """
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: it comes with Triton's wheel for Linux")
    return path


def taken_apart(compiled: Any, name: str, *options: str) -> str:
    """What a program of Triton's prints of a kernel that `triton.compile` returned."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [tool(name), *options, cubin]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

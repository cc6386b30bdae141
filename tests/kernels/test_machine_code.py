"""What the compile check reads off machine code, and what turns it red; no GPU, no interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("cuxray")

from svitt_ops.kernels import compile_check
from svitt_ops.kernels.machine_code import Loop, Usage, matrix_loops, programs_beside

CODE = """
MOV R1, c[0x0][0x28]
S2R R0, SR_TID.X
.L_x_1:
SHF.L.U32 R2, R0, 0x2, RZ
SGXT R3, R0, 0x1
LOP3.LUT R3, R3, 0x84, RZ, 0xc0, !PT
IADD3 R3, R3, R2, RZ
VIMNMX R7, R2, c[0x0][0x210], PT
SHF.L.U32 R8, R7, 0x3, RZ
.L_x_2:
LDS R4, [R3]
LDG.E R5, desc[UR4][R2.64]
LDG.E R5, desc[UR4][R2.64+0x4]
LDG.E R5, desc[UR4][R8.64]
@!P0 IMAD.MOV.U32 R5, RZ, RZ, R6
LDG.E R6, desc[UR4][R5.64]
HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT
@!P1 BRA `(.L_x_2)
@P2 BRA `(.L_x_1)
.L_x_3:
FADD R2, R2, R3
@P0 BRA `(.L_x_3)
EXIT
"""
STALLS = 3
LOOP = Loop(
    instructions=8,
    index=1,
    products=1,
    cycles=8 * STALLS,
    conflict_ways=2,  # odd threads read 33 words further on
    uncoalesced=1,  # 32 bytes apart, not side by side from inside a sector; the bound is outside
    untraced=1,  # at an address that was loaded
)


def listing(code: str) -> str:
    """As `nvdisasm -c -hex` prints it, each instruction issued STALLS cycles before the next."""
    lines = ['\t.section\t.text._kernel,"ax",@progbits']
    for instruction in code.strip().splitlines():
        if instruction.endswith(":"):
            lines.append(instruction)
            continue
        lines.append(f"\t/*{8 * len(lines):04x}*/ {instruction} ;  /* 0x{0:016x} */")
        lines.append(f"\t  /* 0x{STALLS << 41:016x} */")
    return "\n".join(lines)


def test_loops_that_multiply_matrices_are_the_innermost() -> None:
    assert matrix_loops(listing(CODE), num_warps=4) == [LOOP]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(128, 0, 4, 4), (168, 0, 4, 3), (169, 0, 4, 2), (255, 0, 8, 1), (32, 0, 4, 16),
     (16, 0, 1, 32), (64, 100 * 1024, 4, 2)],
)  # fmt: skip
def test_programs_side_by_side(registers: int, shared: int, warps: int, programs: int) -> None:
    assert programs_beside(registers, shared, warps, 90) == programs


def test_what_takes_more_is_seen() -> None:
    kept: dict[str, Any] = {"programs": 3, "loops": [asdict(LOOP)]}

    def found(programs: int, *loops: Loop) -> Usage:
        return Usage(registers=1, spills=0, shared=0, programs=programs, loops=list(loops))

    assert compile_check.worse(kept, found(3, LOOP)) == []
    assert compile_check.worse(kept, found(4, replace(LOOP, instructions=6, cycles=9))) == []
    assert "2 programs" in compile_check.worse(kept, found(2, LOOP))[0]
    for name, value in asdict(LOOP).items():
        (said,) = compile_check.worse(kept, found(3, replace(LOOP, **{name: value + 1})))
        assert said == f"{value + 1} {name.replace('_', ' ')} in a loop, kept are {value}"
    assert "0 loops" in compile_check.worse(kept, found(3))[0]


def test_a_bank_conflict_that_nobody_argued_for_is_a_fault() -> None:
    def said(ways: int, kept: int | None) -> list[str]:
        loops = [replace(LOOP, conflict_ways=ways)]
        found = Usage(registers=1, spills=0, shared=0, programs=1, loops=loops)
        before = [asdict(replace(LOOP, conflict_ways=kept))] if kept else []
        return compile_check.worse({"programs": 1, "loops": before} if kept else None, found)

    assert said(2, None) == []
    assert said(4, None) == ["4 conflict ways in a loop, at most 2"]
    assert said(4, 4) == []
    assert said(8, 4) == ["8 conflict ways in a loop, kept are 4"]


@pytest.fixture(scope="module")
def faults() -> dict[str, list[str]]:
    """What the compile check finds in each kernel of `planted.py`."""
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "planted.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_a_planted_spill_is_a_fault(faults: dict[str, list[str]]) -> None:
    (said,) = faults["spill"]
    assert said.startswith("spills")


def test_a_planted_bank_conflict_is_a_fault(faults: dict[str, list[str]]) -> None:
    assert faults["conflict"] == ["32 conflict ways in a loop, at most 2"]
    assert faults["no conflict"] == []


def test_a_loop_slower_than_kept_is_a_fault(faults: dict[str, list[str]]) -> None:
    (said,) = faults["slower"]
    assert "cycles in a loop, kept are" in said

"""What the compile check reads off machine code, and what turns it red; no GPU, no interpreter."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

from svitt_ops.kernels import compile_check
from svitt_ops.kernels.machine_code import Loop, Usage, matrix_loops, programs_beside

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P0 IMAD.MOV.U32 R5, RZ, RZ, R6 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0050*/              @!P1 BRA `(.L_x_2) ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   FADD R2, R2, R3 ;
        /*0080*/               @P0 BRA `(.L_x_3) ;
        /*0090*/                   EXIT ;
"""


def test_loops_that_multiply_matrices_are_the_innermost() -> None:
    assert matrix_loops(LISTING) == [Loop(instructions=4, index=1, products=1)]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(128, 0, 4, 4), (168, 0, 4, 3), (169, 0, 4, 2), (255, 0, 8, 1), (32, 0, 4, 16),
     (16, 0, 1, 32), (64, 100 * 1024, 4, 2)],
)  # fmt: skip
def test_programs_side_by_side(registers: int, shared: int, warps: int, programs: int) -> None:
    assert programs_beside(registers, shared, warps, 90) == programs


def test_more_instructions_or_fewer_programs_are_seen() -> None:
    kept: dict[str, Any] = {
        "programs": 3,
        "loops": [{"instructions": 400, "index": 90, "products": 8}],
    }

    def found(programs: int, *loops: Loop) -> Usage:
        return Usage(registers=1, spills=0, shared=0, programs=programs, loops=list(loops))

    loop = Loop(instructions=400, index=90, products=8)
    assert compile_check.worse(kept, found(3, loop)) == []
    assert compile_check.worse(kept, found(4, Loop(instructions=399, index=80, products=8))) == []
    assert "2 programs" in compile_check.worse(kept, found(2, loop))[0]
    (said,) = compile_check.worse(kept, found(3, Loop(instructions=401, index=90, products=8)))
    assert said == "401 instructions in a loop, kept are 400"
    assert "0 loops" in compile_check.worse(kept, found(3))[0]


PLANT = """
from dataclasses import replace
from functools import partial

import torch

from svitt_ops.kernels import block_sparse_attention, compile_check

today = block_sparse_attention.attention_tile
block_sparse_attention.attention_tile = lambda *given: replace(today(*given), max_registers=96)
backward = compile_check.block_sparse_attention_backward
backward.block_sparse_attention_backward = lambda *given: None
run = partial(compile_check.run_attention, 64, 56, 1, torch.bfloat16, False)
for kernel in compile_check.check(90, "planted", run):
    print(kernel.name, kernel.faults)
"""


def test_a_planted_spill_is_a_fault() -> None:
    """In a process of its own: other tests here interpret."""
    command = [sys.executable, "-c", f"import os; os.environ.pop('TRITON_INTERPRET', 0)\n{PLANT}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    forward, combine = done.stdout.splitlines()
    assert forward.startswith("90 forward_kernel planted ['spills")
    assert combine.endswith("[]")

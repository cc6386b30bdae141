"""Kernels with planted faults, and what the compile check says of each: a line of JSON.

A process of its own: where the tests run, Triton interprets.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch
import triton
import triton.language as tl

from svitt_ops.kernels import block_sparse_attention, compile_check


@triton.jit
def _strided_kernel(x_ptr, out_ptr, steps, STRIDE: tl.constexpr):
    """Products, beside which each thread reads a word of shared memory, STRIDE bytes apart."""
    places = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    total = tl.zeros((64, 64), tl.float32)
    words = tl.zeros((128,), tl.float32)
    for step in range(steps):
        x = tl.load(x_ptr + step * 4096 + places)
        total = tl.dot(x, x, total)
        address = tl.arange(0, 128) * STRIDE
        words += tl.inline_asm_elementwise(
            "ld.shared.f32 $0, [$1];", "=f,r", [address], tl.float32, is_pure=False, pack=1
        )
    tl.store(out_ptr + places, total)
    tl.store(out_ptr + 4096 + tl.arange(0, 128), words)


def strided(stride: int) -> None:
    x, out = (torch.empty(65536, dtype=x, device="meta") for x in (torch.bfloat16, torch.float32))
    _strided_kernel[(1,)](x, out, 16, STRIDE=stride, num_warps=4, num_stages=1)


def attention_in_64_registers() -> None:
    today = block_sparse_attention.attention_tile
    block_sparse_attention.attention_tile = lambda *given: replace(today(*given), max_registers=64)
    backward = compile_check.block_sparse_attention_backward
    backward.block_sparse_attention_backward = lambda *given: None
    compile_check.run_attention(64, 56, 1, torch.bfloat16, False)


PLANTED: dict[str, Callable[[], None]] = {
    "conflict": partial(strided, 128),
    "no conflict": partial(strided, 4),
    "spill": attention_in_64_registers,
}

if __name__ == "__main__":
    found = {name: compile_check.check(90, name, call)[0] for name, call in PLANTED.items()}
    kept = asdict(found["no conflict"].usage)
    kept["loops"][0]["cycles"] -= 1
    before = {found["no conflict"].name: kept}
    found["slower"] = compile_check.check(90, "no conflict", PLANTED["no conflict"], before)[0]
    print(json.dumps({name: kernel.faults for name, kernel in found.items()}))

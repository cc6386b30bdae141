"""Freed memory stays with the process, so that what comes next need not touch fresh pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from svitt_ops import _extension

pytestmark = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", "")
    or platform.libc_ver()[0] != "glibc"
    or not _extension.load_cpu(),
    reason="about glibc's heap and the C++ kernels",
)


def printed(script: str, **chosen: str) -> list[int]:
    """The numbers that a process prints, whose environment chooses only this of its heap."""
    env = {name: x for name, x in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.check_output([sys.executable, "-c", script], env=env | chosen, text=True)
    return [int(number) for number in found.split()]


def test_gradients_reuse_memory() -> None:
    """Large gradients of later calls lie where those of earlier ones did, without page faults."""
    faults = printed("""
import resource, torch, svitt_ops as so
torch.set_num_threads(1)
q, k, v = (torch.randn(8, n, 12, 64).bfloat16().transpose(1, 2) for n in (5, 1569, 1569))
leaves = [x.requires_grad_() for x in (q, k, v)]
for _ in range(64):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gradients = torch.autograd.grad(so.cross_attention(*leaves).sum(), leaves)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
""")
    assert sum(pages >= 64 for pages in faults[32:]) <= 2, faults  # the first calls make room


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [
        ({}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}, False),
    ],
)
def test_thresholds_of_the_heap(chosen: dict[str, str], kept: bool) -> None:
    """Freed memory stays with the process, unless its environment sets malloc's own thresholds."""
    faults = printed(
        """
import resource
from svitt_ops import _extension
assert _extension.load_cpu()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(30 << 20)
    del block
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
""",
        **chosen,
    )
    assert (faults[-1] < 64) == kept, faults


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [
        ({}, True),
        ({"MALLOC_MMAP_MAX_": "65536"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}, False),
    ],
)
def test_training_keeps_all_of_it(chosen: dict[str, str], kept: bool) -> None:
    """As much as a step frees, in blocks of any size; but what the environment chooses holds."""
    set_it, *faults = printed(
        """
import resource
from svitt_ops.training.engine.process import keep_freed_memory
print(int(keep_freed_memory()))
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(size << 20) for size in (20, 30, 40, 300)]
    del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
""",
        **chosen,
    )
    assert set_it == kept
    assert (faults[-1] < 64) == kept, faults


def test_timed_steps_keep_what_they_free_and_no_longer() -> None:
    *_, inside, outside = printed("""
import resource
from bench.measure.resident import all_kept
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(size << 20) for size in (20, 40, 300)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with all_kept():
    print(faults(), faults(), faults())
print(faults())
""")
    assert inside < 64 < outside

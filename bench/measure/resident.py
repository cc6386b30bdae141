"""The peak resident set of one call, as the Linux kernel counts it: it sees every allocator."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from svitt_ops.training.engine.process import keep_freed_memory

SUPPORTED = sys.platform.startswith("linux")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def peak(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """What a call returns, and the bytes by which it raised the resident set at its peak.

    None where the system lets nobody ask.
    """
    try:
        before = _status("VmRSS")
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # sets the peak to what is resident now
    except OSError:
        return call(), None
    kept = call()
    return kept, max(0, _status("VmHWM") - before)


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Freed memory goes back to the system at once: in what is kept, a second array could hide."""
    _set_heap(mmap=2**16, trim=0)
    try:
        yield
    finally:
        _set_heap()


@contextmanager
def all_kept() -> Iterator[None]:
    """Freed memory is kept, as `svitt pretrain` keeps it."""
    keep_freed_memory()
    try:
        yield
    finally:
        _set_heap()


def _set_heap(mmap: int = 2**25, trim: int = 2**26) -> None:
    """Thresholds of glibc, and what lies above; those that it sets itself once it freed much."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 2**16)
        libc.mallopt(_M_MMAP_THRESHOLD, mmap)
        libc.mallopt(_M_TRIM_THRESHOLD, trim)
        libc.malloc_trim(0)


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields[key].split()[0]) * 1024

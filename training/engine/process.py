"""Settings of a process that trains."""

from __future__ import annotations

import ctypes
import os
import platform

import torch
import torch._functorch.config

from svitt_ops import retrieval_ranks

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have glibc give no freed memory back to the system, and take large blocks from the heap too.

    A step frees gigabytes of activations, gradients and weights in bf16, which the next one needs
    again: given back, each page of 4 KiB costs it a page fault, up to a fifth of a step on a CPU.
    The peak stays what it was. A process whose environment chooses such settings keeps them.

    Returns:
        Whether it was set: not without glibc, nor where the environment chooses.
    """
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc." in tunables:
        return False
    if any(name in os.environ for name in names):
        return False
    retrieval_ranks(torch.ones(1, 1), torch.ones(1, 1))  # loads the kernels, which set smaller ones
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM_THRESHOLD, -1) and mallopt(_MMAP_MAX, 0))


def compile_backward_outside_autocast() -> None:
    """Have `torch.compile` give a backward the precision that it has in eager mode.

    Compiled with the forward, it is traced under the forward's autocast unless told otherwise: the
    gradients of layers that run in fp32 for a reason were rounded to bf16, and the code for that is
    miscompiled by g++ 12, to NaN.
    """
    torch._functorch.config.backward_pass_autocast = "off"

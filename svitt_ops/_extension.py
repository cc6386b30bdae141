"""The compiled extensions: where they are, whether they load, and why not.

Each is a plain shared library beside this file that registers kernels with the torch dispatcher;
there is nothing to import from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from svitt_ops._ops import ops

_NOT_BUILT = {
    "_C_cpu": "not built: the install found no C++20 compiler",
    "_C_cuda": "not built: the install found no CUDA sources, or no nvcc of torch's CUDA release",
}


@dataclass(frozen=True, kw_only=True)
class Status:
    """What was compiled and can be used."""

    cpu_path: str | None
    """The CPU extension, or None where it was not built."""
    cpu_reason: str
    """Why the CPU extension is not in use; empty where it is."""
    cuda_path: str | None
    """The CUDA extension, or None where it was not built."""
    cuda_reason: str
    """Why the CUDA extension cannot be used; empty where it can."""


def load_cpu() -> bool:
    """Load the CPU extension, once; whether its kernels are registered."""
    return not _load("_C_cpu")


def load_cuda() -> bool:
    """Load the CUDA extension, once; whether its kernels are registered. Needs no GPU."""
    return not cuda_reason()


def cuda_reason() -> str:
    """Why the CUDA extension cannot be used; empty where it can. Loads it where it was built."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return _load("_C_cuda")


def status() -> Status:
    """What was compiled, and why what is not in use is not."""
    return Status(
        cpu_path=_path("_C_cpu"),
        cpu_reason=_load("_C_cpu"),
        cuda_path=_path("_C_cuda"),
        cuda_reason=cuda_reason(),
    )


def cpu_capability() -> str | None:
    """The instruction set that the C++ kernels use on this machine; None where they are missing."""
    return ops.cpu_capability() if load_cpu() else None


def _path(name: str) -> str | None:
    folder = Path(__file__).parent
    # A package for the kernel hub has one file for both, named as its namespace.
    paths = [folder / f"{stem}.abi3.so" for stem in (name, ops.name)]
    return next((str(path) for path in paths if path.exists()), None)


@cache
def _load(name: str) -> str:
    """Load one extension; the reason where that did not work."""
    path = _path(name)
    if path is None:
        return _NOT_BUILT[name]
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"{path} did not load: {error}"
    return ""

"""A small native probe of the processor's ceilings, compiled when it is first asked for."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

COPIED_BYTES = 2**28


@cache
def probe() -> tuple[ctypes.CDLL | None, str]:
    """The compiled probe; or None, and why it could not be built."""
    source = Path(__file__).parent / "probe.cpp"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-O3", "-std=c++20", "-march=native", "-ffp-contract=fast", "-pthread"]
    # It is compiled for the very processor that runs it, so another one builds its own.
    made_for = platform.machine() + _processor() + str(command) + source.read_text()
    name = f"svitt_probe_{hashlib.sha256(made_for.encode()).hexdigest()[:12]}.so"
    path = Path(__file__).parents[3] / "build" / name
    part = path.with_suffix(f".{os.getpid()}")
    try:
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            command += ["-shared", "-fPIC", str(source), "-o", str(part)]
            subprocess.run(command, check=True, capture_output=True)
            part.replace(path)
        library = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").replace(f"{source.parent}/", "")
        lines = said.splitlines()
        return None, f"{compiler[0]}: {lines[0][:200] if lines else 'failed'}"
    except OSError as error:
        return None, f"{type(error).__name__}: {error.strerror or error}"
    library.fma_gflops.argtypes = [ctypes.c_int]
    library.copy_gbs.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.fma_gflops.restype = library.copy_gbs.restype = ctypes.c_double
    return library, ""


def ceilings(threads: int) -> dict[str, Any]:
    """fp32 multiply-add rate and copy bandwidth for 1 to `threads` threads, by doubling.

    Returns:
        ``{"fma_gflops": {threads: GFLOP/s}, "copy_gbs": {threads: GB/s}}``, or ``{"reason": why}``
        where nothing could be built.
    """
    library, reason = probe()
    if library is None:
        return {"reason": reason}
    counts = sorted({min(2**i, threads) for i in range(threads.bit_length() + 1)})
    return {
        "fma_gflops": {str(n): library.fma_gflops(n) for n in counts},
        "copy_gbs": {str(n): library.copy_gbs(n, COPIED_BYTES) for n in counts},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines if line.startswith(("model name", "flags")))[:8000]

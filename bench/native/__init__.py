"""A small native probe of the processor's ceilings, built by ninja when it is first asked for."""

from __future__ import annotations

import hashlib
import platform
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

COPIED_BYTES = 2**28


@cache
def probe() -> tuple[ModuleType | None, str]:
    """The compiled probe; or None, and why it could not be built."""
    from torch.utils import cpp_extension

    source = Path(__file__).parent / "probe.cpp"
    # It is compiled for the very processor that runs it, so another one builds its own.
    machine = platform.machine() + sys.version + _processor() + source.read_text()
    name = f"svitt_probe_{hashlib.sha256(machine.encode()).hexdigest()[:12]}"
    folder = Path(__file__).parents[2] / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-std=c++20", "-march=native", "-ffp-contract=fast", "-pthread"]
    try:
        module = cpp_extension.load(
            name, [str(source)], extra_cflags=flags, build_directory=str(folder)
        )
    except (OSError, RuntimeError, ImportError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return None, f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
    return module, ""


def ceilings(threads: int) -> dict[str, Any]:
    """fp32 multiply-add rate and copy bandwidth for 1 to `threads` threads, by doubling.

    Returns:
        ``{"fma_gflops": {threads: GFLOP/s}, "copy_gbs": {threads: GB/s}}``, or ``{"reason": why}``
        where nothing could be built.
    """
    module, reason = probe()
    if module is None:
        return {"reason": reason}
    counts = sorted({min(2**i, threads) for i in range(threads.bit_length() + 1)})
    return {
        "fma_gflops": {str(n): module.fma_gflops(n) for n in counts},
        "copy_gbs": {str(n): module.copy_gbs(n, COPIED_BYTES) for n in counts},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines if line.startswith(("model name", "flags")))[:8000]

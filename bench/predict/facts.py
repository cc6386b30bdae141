"""What is known of a kernel once it is compiled, for one architecture and without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from bench.predict import code
from bench.predict.launches import Launch
from svitt_ops.kernels import machine_code


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one compiled kernel."""

    usage: machine_code.Usage
    code: code.Loop
    tensor: bool
    """Whether tensor cores multiply."""
    wgmma: bool
    """Whether they do so for four warps at a time."""


class Compiler:
    """Compiles launches for one architecture, each kernel once."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.known: dict[tuple[Any, ...], Facts] = {}

    def __call__(self, launch: Launch) -> Facts:
        """The facts of a Triton launch."""
        source, options = launch.source, launch.options
        key = (source.hash(), *sorted(options.items()))
        if key not in self.known:
            target = GPUTarget("cuda", self.arch, 32)
            compiled = triton.compile(source, target=target, options=options)
            usage = machine_code.usage(compiled, self.arch, options["num_warps"], loops=False)
            listing = machine_code.taken_apart(compiled, "nvdisasm", "-c")
            self.known[key] = Facts(
                usage=usage,
                code=code.kernel(listing),
                tensor="HGMMA." in listing or "HMMA." in listing,
                wgmma="HGMMA." in listing,
            )
        return self.known[key]

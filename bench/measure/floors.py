"""The machine's ceilings, measured in the same run as what is compared with them.

A floor is the time below which no implementation can be: `max(bytes / bandwidth, FLOP / rate)`,
with the copy bandwidth and the rate of large matrix products that this machine was seen to reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.measure.timing import Call, Effort, interleave

IMPLAUSIBLE = 2.0
"""How much faster than a large product a kernel may seem before its time is refused."""

RETIMED = 50
"""Samples of a product when a time seems impossible."""


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Something simple that runs at the machine's limit."""

    name: str
    call: Call
    device: torch.device
    flops: float = 0.0
    bytes: float = 0.0


def ceilings(device: torch.device, dtype: torch.dtype, quick: bool) -> list[Ceiling]:
    """What is timed in turns with the providers of a case of this dtype."""
    if device.type == "cuda":
        sizes, copied = ((4096,) if quick else (4096, 8192)), 2**28 if quick else 2**30
        found = [_gemm(f"gemm_{_short(dtype)}_{size}", size, dtype, device) for size in sizes]
    else:
        size, copied = (512 if quick else 2048), 2**22 if quick else 2**28
        # CPU kernels are compared with the fp32 product, whatever their dtype.
        found = [_gemm(f"gemm_fp32_{size}", size, torch.float32, device)]
        if dtype != torch.float32:
            found.append(_gemm(f"gemm_{_short(dtype)}_{size}", size, dtype, device))
    return [*found, _copy(copied, device)]


def machine(device: torch.device) -> dict[str, Any]:
    """What a native probe measures once a run; empty on a GPU, where torch's calls reach the limit.

    Returns:
        See `bench.measure.native.ceilings`.
    """
    if device.type == "cuda":
        return {}
    from bench.measure import native

    return native.ceilings(torch.get_num_threads())


def rates(
    found: list[Ceiling], milliseconds: Mapping[str, float], native: Mapping[str, Any]
) -> dict[str, Any]:
    """GFLOP/s of each product and GB/s of the copy.

    `gemm_gflops` is what kernels are compared with: fp32 on a CPU, the case's dtype on a GPU.
    `peak_gflops` sets the floor: the fastest product, since a kernel may choose its dtype, or the
    native probe's multiply-adds where they are faster; so does the faster copy.
    """
    gemms = {x.name: x.flops / milliseconds[x.name] / 1e6 for x in found if x.flops}
    copies = [x.bytes / milliseconds[x.name] / 1e6 for x in found if x.bytes]
    on_cpu = found[0].device.type == "cpu"
    compared = gemms[found[0].name] if on_cpu else max(gemms.values())
    return {
        "products": gemms,
        "gemm_gflops": compared,
        "peak_gflops": max(*gemms.values(), *native.get("fma_gflops", {}).values(), 0.0),
        "copy_gbs": max(*copies, *native.get("copy_gbs", {}).values(), 0.0),
    }


def least_ms(
    flops: float, found: list[Ceiling], best: Mapping[str, float], native: Mapping[str, Any]
) -> float:
    """Less time than this is no result: useful FLOP at twice the best rate that was seen here.

    Memory sets no such limit, since what fits a cache is read faster than any copy runs.
    """
    peaks = [x.flops / best[x.name] / 1e6 for x in found if x.flops]
    peak = max(*peaks, *native.get("fma_gflops", {}).values(), 0.0)
    return flops / peak / 1e6 / IMPLAUSIBLE


def timed_again(
    found: list[Ceiling], best: Mapping[str, float], effort: Effort
) -> dict[str, float]:
    """The best times of the products, each from more samples, nothing else in between.

    A neighbour on the machine slows the products down as well, and so makes others seem too fast.
    """
    products = {x.name: x.call for x in found if x.flops}
    longer = replace(effort, min_samples=RETIMED, max_samples=RETIMED)
    samples = interleave(products, found[0].device, longer)
    return {name: min(best[name], *samples[name].ms) for name in products}


def floor_ms(flops: float, moved: float, rates: Mapping[str, Any]) -> tuple[float, str]:
    """The floor in ms, and whether "memory" or "compute" sets it."""
    memory, compute = moved / rates["copy_gbs"] / 1e6, flops / rates["peak_gflops"] / 1e6
    return (memory, "memory") if memory > compute else (compute, "compute")


def _gemm(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Ceiling:
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    flops = 2.0 * size**3
    return Ceiling(name=name, call=lambda: torch.mm(a, b, out=out), device=device, flops=flops)


def _copy(size: int, device: torch.device) -> Ceiling:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceiling(name="copy", call=lambda: target.copy_(source), device=device, bytes=2.0 * size)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

"""The GPUs that times are predicted for: what NVIDIA publishes of them, and what is assumed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU. Rates are peaks; `model` says what of them is assumed to be reached."""

    name: str
    arch: int
    processors: int
    clock_ghz: float
    dram_gbs: float
    l2_bytes: float
    tensor_flops: int
    """Dense FLOP of half precision a clock and multiprocessor."""
    fp32_flops: int
    """The same of fp32, without tensor cores."""
    source: str

    def __str__(self) -> str:
        return (
            f"{self.name} (sm_{self.arch}): {self.processors} multiprocessors at "
            f"{self.clock_ghz:g} GHz, {self.dram_gbs:g} GB/s, L2 of {self.l2_bytes / 2**20:g} MiB, "
            f"{self.tensor_flops} FLOP a clock and multiprocessor on tensor cores ({self.source})"
        )


# The clock is the one behind the published peak: 989.4 TFLOP/s are 132 x 4096 x 1.83 GHz.
_H100 = "NVIDIA H100 Tensor Core GPU Architecture, and data sheet, SXM5"
CARDS = {
    "h100": Card(
        name="H100 SXM", arch=90, processors=132, clock_ghz=1.83, dram_gbs=3350,
        l2_bytes=50 * 2**20, tensor_flops=4096, fp32_flops=256, source=_H100,
    ),
    "h200": Card(
        name="H200 SXM", arch=90, processors=132, clock_ghz=1.83, dram_gbs=4800,
        l2_bytes=50 * 2**20, tensor_flops=4096, fp32_flops=256,
        source="NVIDIA H200 data sheet, SXM",
    ),
    "a100": Card(
        name="A100 SXM 80 GB", arch=80, processors=108, clock_ghz=1.41, dram_gbs=2039,
        l2_bytes=40 * 2**20, tensor_flops=2048, fp32_flops=128,
        source="NVIDIA A100 Tensor Core GPU Architecture, and data sheet, SXM4",
    ),
}  # fmt: skip


def card(name: str) -> Card:
    """The card of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in CARDS:
        raise ValueError(f"card must be one of {', '.join(CARDS)}, got {name!r}")
    return CARDS[name]

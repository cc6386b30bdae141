"""From what a kernel is made of to how long a launch takes: the limit that binds, and its time.

A launch takes at least as long as each of these, and is predicted to take as long as the largest:

    dram      bytes that no cache holds / bandwidth
    l2        bytes that programs load and store / bandwidth of L2
    tensor    FLOP of the matrix products / rate, on the busiest multiprocessor, as all below
    exp       exponentials, logarithms, divisions: one for 4 threads a clock and scheduler
    alu       integer, compare, select, minimum and conversion: 16 threads
    memory    loads, stores and shuffles through shared memory or L1: 8 threads of 4 bytes
    issue     instructions: one warp's a clock and scheduler
    latency   instructions of one warp, each some clocks after the last, times how often programs
              follow each other on a multiprocessor that holds only so many side by side

A call takes the sum of its launches. Constants that are fitted and not published say so.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.predict import code
from bench.predict.cards import Card
from bench.predict.facts import Facts
from bench.predict.launches import Launch
from bench.predict.steps import Steps

SCHEDULERS = 4
DRAM_SHARE = 0.87
"""Of the published bandwidth; a copy on an H200 reached 4.16 of 4.8 TB/s (bench/results)."""
TENSOR_SHARE = 0.78
"""Of the published rate; a large product on an H200 reached 770 of 989 TFLOP/s (bench/results)."""
SYNCHRONOUS_SHARE = 0.62
"""Of sm_90's tensor cores for mma.sync (HMMA) in place of wgmma (HGMMA): Luo et al., Benchmarking
and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking, 2024."""
L2_BYTES = 5120
"""A clock: the A100's by NVIDIA's paper on its architecture, taken for all."""
INSTRUCTION_CLOCKS = 7.5
"""From an instruction of a warp to its next, waits included; fitted."""
LAUNCH_US = 4.75
"""To begin and end a kernel of a CUDA graph, first loads from a cold L2 included; fitted."""
COPYING = 32 * 32
"""Bytes of a warp from which on a loop is one that copies."""


class Unpredictable(Exception):
    """What is known of a kernel does not fit together."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One launch."""

    name: str
    us: float
    limits: dict[str, float]
    """Microseconds by each limit, without the launch."""
    programs: int
    beside: int
    """Programs on a multiprocessor at a time."""

    @property
    def bound(self) -> str:
        """The limit that binds."""
        most = max(self.limits, key=lambda x: self.limits[x])
        return most if self.limits[most] > LAUNCH_US else "launch"


def way(facts: Facts, steps: Steps) -> code.Counts:
    """What a warp does in one program."""

    def turned(loop: code.Loop, inner: float) -> code.Counts:
        total = dict(loop.counts)
        for x in loop.loops:
            code.add(total, turned(x, inner), inner if x.products else 1.0)
        return total

    total = dict(facts.code.counts)
    products = sum(x.products > 0 for x in facts.code.loops)
    walks = steps.walks
    if len(walks) != products:  # older kernels walk all in one loop
        walks = (steps.outer / max(products, 1),) * products
    walk = iter(walks)
    for loop in facts.code.loops:
        times = steps.copying if loop.counts["bytes"] >= COPYING else steps.other
        if loop.products:
            times = next(walk)
        code.add(total, turned(loop, steps.inner), times)
    return total


def predict(
    launch: Launch, card: Card, cached: float, facts: Facts | None, steps: Steps
) -> Prediction:
    """How long a launch takes on a card.

    Args:
        launch: the kernel.
        card: the GPU.
        cached: bytes of its tensors that L2 still holds.
        facts: of the compiled kernel; None for one of PyTorch's, which only moves bytes.
        steps: how often its loops turn.

    Raises:
        Unpredictable: it multiplies matrices in a loop, but none of its loops looks like that.
    """
    clocks_us = card.clock_ghz * 1e3
    moved = float(sum(unique_bytes(launch).values()))
    if facts is None:
        return Prediction(
            name=launch.name, us=LAUNCH_US + max(moved - cached, 0) / dram(card),
            limits={"dram": max(moved - cached, 0) / dram(card)}, programs=1, beside=1,
        )  # fmt: skip
    if steps.outer > 1 and not facts.code.products:
        raise Unpredictable(f"in the code of {launch.name} no loop looks like a matrix product")
    warp, warps = way(facts, steps), launch.options["num_warps"]
    asked = warp["bytes"] * warps * launch.programs
    busiest = -(-launch.programs // card.processors)
    beside = max(min(facts.usage.programs, busiest), 1)
    flops = card.tensor_flops * TENSOR_SHARE
    if card.arch >= 90 and not facts.wgmma:
        flops *= SYNCHRONOUS_SHARE
    clocks = {kind: busiest * warps * warp[kind] / SCHEDULERS for kind in code.CLOCKS}
    clocks["tensor"] = busiest * warps * warp["flops"] / flops if facts.tensor else 0.0
    clocks["latency"] = max(busiest / beside, 1.0) * warp["issue"] * INSTRUCTION_CLOCKS
    limits = {
        "dram": max(min(moved, asked) - cached, 0.0) / dram(card),
        "l2": asked / L2_BYTES / clocks_us,
        **{kind: value / clocks_us for kind, value in clocks.items()},
    }
    return Prediction(
        name=launch.name, us=LAUNCH_US + max(limits.values()), limits=limits,
        programs=launch.programs, beside=beside,
    )  # fmt: skip


def dram(card: Card) -> float:
    """Bytes a microsecond."""
    return card.dram_gbs * 1e3 * DRAM_SHARE


def rates(card: Card, dtype: str) -> dict[str, float]:
    """What sets the floor, as `bench.measure.floors` takes it: GB/s of a copy, GFLOP/s."""
    flops = card.fp32_flops if dtype == "fp32" else card.tensor_flops * TENSOR_SHARE
    peak = flops * card.processors * card.clock_ghz
    return {"copy_gbs": card.dram_gbs * DRAM_SHARE, "peak_gflops": peak}


def assumptions() -> list[str]:
    """What is assumed of any card, in lines."""
    return [
        f"copies reach {DRAM_SHARE:g} of the bandwidth and products {TENSOR_SHARE:g} of the rate, "
        "as on an H200 (bench/results)",
        f"mma.sync reaches {SYNCHRONOUS_SHARE:g} of wgmma's rate on sm_90 (Luo et al., 2024)",
        "a scheduler spends 8 clocks on a warp's exponentials, 2 on an integer, compare, select or "
        "minimum, 4 on each 4 bytes a thread loads, stores or shuffles (CUDA C++ guide)",
        f"L2 gives {L2_BYTES} bytes a clock (the A100's), and holds what the last half of it moved",
        f"a warp goes on {INSTRUCTION_CLOCKS:g} clocks after each instruction, a launch takes "
        f"{LAUNCH_US:g} us in a CUDA graph: both fitted to what was measured on an H200",
        "a branch takes the side with the fewest instructions, of those with the most products",
        "the L2 is cold before each call, as in the benchmark",
    ]


def unique_bytes(launch: Launch) -> dict[int, int]:
    """Of each tensor by its address, once; what is broadcast counts once too."""
    found: dict[int, int] = {}
    for x in launch.tensors:
        size = x.element_size()
        for length, stride in zip(x.shape, x.stride(), strict=True):
            size *= length if stride else min(length, 1)
        found[x.data_ptr()] = max(size, found.get(x.data_ptr(), 0))
    return found

"""Interleaved timing: who is timed when, for how long, and what is read off the samples."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

SHORT_MS = 2.0  # calls shorter than this are repeated on a CPU, and captured in a graph on a GPU

SLOW_MS = 1000.0
"""Calls longer than this are timed a few times only, and need no untimed one before each."""

SLOWEST_MS = 15_000.0
"""Calls longer than this are timed twice."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much time goes into one number."""

    budget_s: float = 1.0
    """Time for the samples of one provider."""
    min_samples: int = 7
    """Samples of a provider, unless its calls are slow."""
    slow_samples: int = 3
    """Samples of a provider whose calls are slow, at least 2; of the slowest 2."""
    max_samples: int = 200
    """Samples of a provider however fast it is."""
    cold: bool = False
    """Whether a CPU's caches are emptied before each sample; a GPU's L2 always is."""


@dataclass(kw_only=True)
class Samples:
    """The times of one provider, in milliseconds."""

    method: str
    """What was timed: "wall", "events" around an eager call, or "graph": kernels alone."""
    ms: list[float] = field(default_factory=list)
    call_ms: list[float] = field(default_factory=list)
    """On a GPU: eager call until the device is done, as the host sees it."""

    def summary(self) -> dict[str, Any]:
        """Median, p20, p80, minimum and number of the samples."""
        low, median, high = quantiles(self.ms, (0.2, 0.5, 0.8))
        result: dict[str, Any] = {"ms": median, "p20": low, "p80": high, "min": min(self.ms)}
        result |= {"samples": len(self.ms), "method": self.method}
        if self.call_ms:
            result["call_ms"] = quantiles(self.call_ms, (0.5,))[0]
        return result


class Stopwatch(Protocol):
    """Times one call on one kind of device."""

    samples: Samples
    slow: bool

    def sample(self) -> float:
        """Take one sample; the seconds that it cost."""
        ...


def quantiles(values: Sequence[float], at: Sequence[float]) -> list[float]:
    """Quantiles by linear interpolation between the ordered values."""
    if not values:
        raise ValueError("quantiles: values must not be empty")
    ordered = sorted(values)
    result = []
    for q in at:
        place = q * (len(ordered) - 1)
        low, high = math.floor(place), math.ceil(place)
        result.append(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
    return result


def interleave(
    calls: Mapping[str, Call], device: torch.device, effort: Effort
) -> dict[str, Samples]:
    """Time calls in turns, so that a machine that speeds up or slows down does so for all of them.

    The order rotates from round to round: nobody always follows the same neighbour. A slow call
    takes part in fewer rounds, evenly spread. Calls must have run before: compilation is not timed.
    """
    make = _CudaStopwatch if device.type == "cuda" else _CpuStopwatch
    watches: dict[str, Stopwatch] = {name: make(call, effort) for name, call in calls.items()}
    wanted = {}
    for name, watch in watches.items():
        if watch.slow:  # what was timed already counts
            spent = watch.sample()
            least = effort.slow_samples if spent * 1e3 < SLOWEST_MS else 2
            wanted[name] = max(int(effort.budget_s / spent), least) - 2
            continue
        spent = min(watch.sample() for _ in range(2))
        count = int(effort.budget_s / max(spent, 1e-9))
        wanted[name] = min(max(count, effort.min_samples), effort.max_samples)
        watch.samples.ms.clear()
        watch.samples.call_ms.clear()
    rounds, names = max(wanted.values(), default=0), list(watches)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if (turn + 1) * wanted[name] // rounds > turn * wanted[name] // rounds:
                watches[name].sample()
    return {name: watch.samples for name, watch in watches.items()}


class _CpuStopwatch:
    def __init__(self, call: Call, effort: Effort) -> None:
        self.call, self.samples = call, Samples(method="wall")
        self.flush = torch.empty(cache_bytes(), dtype=torch.uint8) if effort.cold else None
        once = self._time(1)
        if once * 1e3 < SLOW_MS:
            once = min(self._time(1) for _ in range(2))
        if slow := once * 1e3 > SLOW_MS:
            self.samples.ms.append(once * 1e3)
        self.slow = slow
        # Emptied caches are warm again at the second repetition.
        self.repeats = 1 if effort.cold else max(1, math.ceil(SHORT_MS / (once * 1e3)))

    def sample(self) -> float:
        start = time.perf_counter()
        if self.flush is not None:
            self.flush.add_(1)
        elif not self.slow:
            self.call()  # else caches and clock are as the neighbour in the round left them
        self.samples.ms.append(self._time(self.repeats) * 1e3)
        return time.perf_counter() - start

    def _time(self, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            self.call()
        return max(time.perf_counter() - start, 1e-9) / repeats


class _CudaStopwatch:
    """CUDA events around a call with a flushed L2: around a graph of it where it is short.

    A short eager call is bound by its launches, so its kernels are timed by replaying a graph, and
    the eager call beside them by the host's clock.
    """

    def __init__(self, call: Call, effort: Effort) -> None:
        self.call, self.samples = call, Samples(method="events")
        self.flush = torch.empty(cache_bytes(), dtype=torch.uint8, device="cuda")
        self.run: Call = call
        self.slow = False
        for _ in range(3):
            call()
        if min(self._events() for _ in range(3)) < SHORT_MS:
            try:
                self.run, self.samples.method = _capture(call).replay, "graph"
            except RuntimeError as error:
                torch.cuda.synchronize()
                line = next(iter(str(error).splitlines()), "")
                warnings.warn(f"timed with its launches, as no graph: {line}", stacklevel=2)

    def sample(self) -> float:
        start = time.perf_counter()
        self.samples.ms.append(self._events())
        self.flush.zero_()
        torch.cuda.synchronize()
        before = time.perf_counter()
        self.call()
        torch.cuda.synchronize()
        self.samples.call_ms.append((time.perf_counter() - before) * 1e3)
        return time.perf_counter() - start

    def _events(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        self.run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


def _capture(call: Call) -> torch.cuda.CUDAGraph:
    """The call as a CUDA graph; a RuntimeError where it cannot be captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def cache_bytes() -> int:
    """Bytes that push everything else out of the last-level cache, whatever the machine."""
    return 512 * 2**20

"""Cases, providers, the correctness gate, and the run of one case."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bench.measure import floors, resident
from bench.measure.timing import Effort, interleave
from svitt_ops.testing import FLOOR_ULPS

Direction = Literal["forward", "forward_backward", "step"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward_backward")
"""Of an op; a "step" is a call that takes its own gradients and uses them."""
Function = Callable[..., tuple[Tensor, ...]]
"""From the problem's inputs, in order, to its outputs; the first of them has a gradient.

One that does other work than the problem's counts its FLOP itself, in an attribute `flops`.
"""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the benchmark: a name, and what it stands for. Picklable plain data."""

    name: str
    dtype: str
    device: str
    fields: Mapping[str, Any]
    quick: bool = False
    """Whether `--quick` runs it."""
    directions: tuple[Direction, ...] = DIRECTIONS
    """What is measured: forward alone where the op has no gradient."""
    named: bool = False
    """Whether only `--case` runs it, and `--quick` where it is a quick one: it takes long, or says
    little."""

    def shrunk(self, **fields: Any) -> Case:
        """The same case with other fields, under a name that says so."""
        return replace(self, name=f"{self.name}-shrunk", fields={**self.fields, **fields})


class Unavailable(Exception):
    """A provider cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way to compute a case."""

    name: str
    build: Callable[[], Function]
    """Makes the function, compiled if need be; raises `Unavailable` where it cannot run."""
    role: Literal["ours", "peer", "variant"] = "peer"
    """"variant": ours without an option, to show what the option costs."""
    oracle: str = "op"
    """Which of the problem's oracles it must agree with."""
    note: str = ""
    compiled: bool = False
    """Whether the first call compiles, which takes memory of its own."""
    quick: bool = True
    """Whether `--quick` asks it too: it compiles within seconds."""
    backward: str = ""
    """Why there is no backward; empty where there is."""
    same: bool | None = None
    """Whether it computes the op's function; by default, whether the op's oracle judges it."""


def also_compiled(name: str, function: Function, note: str) -> list[Provider]:
    """A peer, and what torch.compile makes of it."""
    return [
        Provider(name=name, build=lambda: function, note=note),
        Provider(
            name=f"{name}_compiled",
            build=lambda: torch.compile(function, dynamic=False),
            note="the same, compiled",
            compiled=True,
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What an oracle says: fp64 values, and the error of plain PyTorch in the case's dtype."""

    values: Mapping[str, Tensor]
    plain_error: Mapping[str, float]
    seen: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    """What is compared with the values: by default the outputs, else something made of them."""

    @staticmethod
    def of(compute: Callable[[torch.dtype], Mapping[str, Tensor]], dtype: torch.dtype) -> Expected:
        """The values and the error of a reference that computes in any dtype."""
        exact, plain = compute(torch.float64), compute(dtype)
        errors = {name: float((plain[name].double() - x).abs().max()) for name, x in exact.items()}
        return Expected(values=exact, plain_error=errors)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The tensors of a case and everyone who computes with them."""

    inputs: Mapping[str, Tensor]
    """Detached, in the order in which functions take them."""
    upstream: Tensor
    """Fixed gradient of the first output."""
    outputs: tuple[str, ...]
    oracles: Mapping[str, Callable[[], Expected]]
    """Values of `outputs`, and of `grad_<input>` for each input."""
    providers: list[Provider]
    flops: Mapping[Direction, float]
    """Useful ones: what the mathematics needs, not what a provider spends."""
    bytes: Mapping[Direction, float]
    """Each input read once, each result written once."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    setup: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    """Work before the first call, timed on its own."""

    def provider(self, name: str) -> Provider:
        """The provider of that name."""
        return next(x for x in self.providers if x.name == name)


PEER_SLACK = 8
"""How many times our error budget a peer may need: rounding otherwise than ours is no fault."""


def error_budget(expected: Tensor, plain_error: float, dtype: torch.dtype) -> float:
    """Twice the error of plain PyTorch in the same dtype, plus a rounding floor."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    return 2 * plain_error + FLOOR_ULPS * torch.finfo(dtype).eps * largest


def results(function: Function, problem: Problem, direction: Direction) -> dict[str, Tensor]:
    """The outputs of a function, with gradients where the direction asks for them."""
    if direction == "forward":
        with torch.no_grad():
            outputs = function(*problem.inputs.values())
        return dict(zip(problem.outputs, outputs, strict=False))
    if direction == "step":
        return dict(zip(problem.outputs, function(*problem.inputs.values()), strict=True))
    leaves = [x.detach().requires_grad_() for x in problem.inputs.values()]
    outputs = function(*leaves)
    grads = torch.autograd.grad(outputs[0], leaves, problem.upstream, allow_unused=True)
    found = dict(zip(problem.outputs, outputs, strict=False))
    named = zip(problem.inputs, grads, strict=True)
    return found | {f"grad_{name}": grad for name, grad in named if grad is not None}


def gate(
    found: Mapping[str, Tensor],
    expected: Expected,
    dtype: torch.dtype,
    direction: Direction,
    slack: float = 1,
) -> dict[str, Any]:
    """Compare results with the oracle's: error and budget of each, and all objections.

    Args:
        found: by name, with gradients where the direction has them.
        expected: what they must be.
        dtype: of the inputs.
        direction: "forward" alone has no gradients.
        slack: how many budgets an error may have.
    """
    checks: dict[str, Any] = {}
    objections = []
    found = expected.seen(found)
    for name, wanted in expected.values.items():
        if direction == "forward" and name.startswith("grad_"):
            continue
        value = found.get(name)
        if value is None or value.shape != wanted.shape:
            got = "missing" if value is None else f"of shape {tuple(value.shape)}"
            objections.append(f"{name} is {got}")
            continue
        budget = error_budget(wanted, expected.plain_error[name], dtype)
        error = float((value.detach().double() - wanted).abs().max()) if value.numel() else 0.0
        # JSON has no NaN; NaN compares false, hence `not`.
        checks[name] = {"error": error if math.isfinite(error) else None, "budget": budget}
        if not error <= slack * budget:
            times = f"{slack:g} times " * (slack != 1)
            objections.append(f"{name} is off by {error:.2e}, {times}budget {budget:.2e}")
    return {"passed": not objections, "objection": "; ".join(objections), "checks": checks}


def runner(function: Function, problem: Problem, direction: Direction) -> Callable[[], Any]:
    """The call that is timed."""
    if direction == "forward":
        inputs = tuple(problem.inputs.values())

        def forward() -> Any:
            with torch.no_grad():
                return function(*inputs)

        return forward
    if direction == "step":
        return lambda: function(*problem.inputs.values())
    leaves = tuple(x.detach().requires_grad_() for x in problem.inputs.values())

    def forward_backward() -> Any:
        out = function(*leaves)[0]
        return torch.autograd.grad(out, leaves, problem.upstream, allow_unused=True)

    return forward_backward


class CaseRun:
    """One case: its providers are built once and gated once a direction, then timed in turns."""

    def __init__(
        self,
        case: Case,
        problem: Problem,
        effort: Effort,
        quick: bool,
        only: str = "",
        native: Mapping[str, Any] | None = None,
    ) -> None:
        self.native = native or {}
        self.case, self.problem, self.effort, self.quick = case, problem, effort, quick
        self.device, self.dtype = torch.device(case.device), DTYPES[case.dtype]
        parts = only.split(",")
        chosen = [x for x in problem.providers if any(part in x.name for part in parts)]
        self.providers = [x for x in problem.providers if x in chosen or x.role == "ours"]
        self.expected: dict[str, Expected] = {}
        self.functions: dict[str, Function] = {}
        self.reasons: dict[str, str] = {}
        self.latest: dict[str, Any] = {}
        self.peaks: dict[str, int | None] = {}
        for provider in self.providers:
            try:
                if quick and not provider.quick:
                    raise Unavailable("left out by --quick, since it compiles for long")
                self.functions[provider.name] = provider.build()
            except Exception as error:
                self.reasons[provider.name] = explain(error)
        self.setup_ms = {name: _best_ms(call, self.device) for name, call in problem.setup.items()}

    def run(self, direction: Direction) -> dict[str, Any]:
        """Gate and time all providers in one direction; see `results` for what comes back."""
        rows = {x.name: self.admit(x.name, direction) for x in self.providers}
        calls = {}
        for name, row in rows.items():
            if row["status"] == "ok":
                call = runner(self.functions[name], self.problem, direction)
                calls[name] = self._keeping(name, call) if direction == "step" else call
        limits = floors.ceilings(self.device, self.dtype, self.quick)
        heap = resident.all_kept() if self._steps_on_cpu(direction) else nullcontext()
        with heap:
            samples = interleave(calls | {x.name: x.call for x in limits}, self.device, self.effort)
        found = {name: sampled.summary() for name, sampled in samples.items()}
        times = {x.name: found[x.name]["ms"] for x in limits}
        rates = floors.rates(limits, times, self.native)
        flops, moved = self.problem.flops[direction], self.problem.bytes[direction]
        floor, bound = floors.floor_ms(flops, moved, rates)
        done = {name: getattr(self.functions[name], "flops", flops) for name in calls}
        best = {x.name: found[x.name]["min"] for x in limits}

        def least(name: str) -> float:
            return floors.least_ms(done[name], limits, best, self.native)

        if any(found[name]["min"] < least(name) for name in calls):
            best = floors.timed_again(limits, best, self.effort)
        for name in calls:
            gated = "last timed call" if name in self.latest else "another call"
            if refusal := self._refusal(name, direction, found[name]["min"], least(name)):
                rows[name] |= {"status": "failed", "reason": refusal}
                continue
            gflops = done[name] / found[name]["ms"] / 1e6
            own_floor, _ = floors.floor_ms(done[name], moved, rates)
            rows[name] |= found[name] | {
                "flops": done[name],
                "gflops": gflops,
                "gemm_ratio": gflops / rates["gemm_gflops"],
                "floor_ratio": found[name]["ms"] / own_floor,
                "extra_bytes": None,
                "gated_after": gated,
            }
        return {
            "case": self.case.name,
            "direction": direction,
            "dtype": self.case.dtype,
            "device": self.case.device,
            "fields": dict(self.case.fields),
            "facts": dict(self.problem.facts),
            "useful_flops": flops,
            "bytes": moved,
            "ceilings": rates,
            "floor_ms": floor,
            "floor_bound": bound,
            "setup_ms": self.setup_ms,
            "providers": list(rows.values()),
        }

    def admit(self, name: str, direction: Direction) -> dict[str, Any]:
        """A provider's row without its times: "ok", "failed" at its gate, or "absent" and why."""
        provider = self.problem.provider(name)
        row: dict[str, Any] = {"provider": provider.name, "role": provider.role}
        same = provider.oracle == "op" if provider.same is None else provider.same
        row |= {"same_function": same, "note": provider.note}
        reason = self.reasons.get(provider.name, "")
        if not reason and direction == "forward_backward":
            reason = provider.backward
        # Ours has no excuse: what cannot run has failed.
        status = "failed" if provider.role == "ours" else "absent"
        verdict: dict[str, Any] = {}
        if not reason:
            try:
                verdict = self._verdict(provider, direction)
            except Exception as error:
                reason = explain(error)
            else:
                status = "ok" if verdict["passed"] else "failed"
                reason = verdict["objection"]
        return row | {"status": status, "reason": reason, "gate": verdict.get("checks", {})}

    def _refusal(self, name: str, direction: Direction, ms: float, least: float) -> str:
        """Why times that were taken do not count: what was timed must still be right, and possible.

        The gate before says nothing of the calls after it, if memory or code changes under them.
        """
        if ms < least:
            return f"implausible: {ms:.2g} ms, where this machine needs at least {least:.2g} ms"
        verdict = self._verdict(self.problem.provider(name), direction)
        return "" if verdict["passed"] else f"wrong after timing: {verdict['objection']}"

    def _steps_on_cpu(self, direction: Direction) -> bool:
        return direction == "step" and self.device.type == "cpu"

    def _keeping(self, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call; its last result, small for a step, stays for the gate."""

        def keeping() -> None:
            self.latest[name] = call()

        return keeping

    def _verdict(self, provider: Provider, direction: Direction) -> dict[str, Any]:
        name, function = provider.name, self.functions[provider.name]
        if name in self.latest:  # what was timed is what is judged
            found = dict(zip(self.problem.outputs, self.latest.pop(name), strict=True))
        elif self._steps_on_cpu(direction) and resident.SUPPORTED:
            with resident.nothing_kept():
                found, self.peaks[name] = resident.peak(
                    lambda: results(function, self.problem, direction)
                )
        else:
            found = results(function, self.problem, direction)
        slack = PEER_SLACK if provider.role == "peer" else 1
        return gate(found, self._expected(provider.oracle), self.dtype, direction, slack)

    def _expected(self, oracle: str) -> Expected:
        if oracle not in self.expected:
            self.expected[oracle] = self.problem.oracles[oracle]()
        return self.expected[oracle]


def explain(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, Unavailable):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _best_ms(call: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)[len(times) // 2]

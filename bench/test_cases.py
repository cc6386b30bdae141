"""The quick cases under pytest-benchmark: `pytest bench`, or `pytest bench -k svitt_ops`.

Each provider passes its gate before and after it is timed; one that cannot run here is skipped
with the reason. Where calls have to be timed in turns, `python -m bench` is the one to ask.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))  # bench is not installed
pytest.importorskip("pytest_benchmark")

from bench.cases import load, names
from bench.measure.harness import Case, CaseRun, Direction, runner
from bench.measure.timing import Effort

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.timeout(600)  # a first call may compile


def parameters() -> Iterator[Any]:
    for op in names():
        module = load(op)
        if module is None:
            continue
        for case in (x for x in module.cases(DEVICE) if x.quick):
            smallest = module.problem(module.shrunk(case))
            for direction in case.directions:
                for provider in smallest.providers:
                    name = f"{op}-{case.name}-{direction}-{provider.name}"
                    yield pytest.param(op, case, direction, provider.name, id=name)


class Latest:
    """The case that was asked for last: its tensors and compiled providers serve all its tests."""

    def __init__(self) -> None:
        self.key: tuple[str, Case] | None = None
        self.run: CaseRun | None = None

    def get(self, op: str, case: Case) -> CaseRun:
        if self.run is None or self.key != (op, case):
            self.run = None
            torch.compiler.reset()
            module = load(op)
            assert module is not None  # since it has cases
            self.key = (op, case)
            self.run = CaseRun(case, module.problem(case), Effort(), quick=True)
        return self.run


@pytest.fixture(scope="module")
def latest() -> Latest:
    return Latest()


@pytest.mark.parametrize(("op", "case", "direction", "provider"), list(parameters()))
def test_case(
    op: str, case: Case, direction: Direction, provider: str, latest: Latest, benchmark: Any
) -> None:
    run = latest.get(op, case)
    admit(run, provider, direction)
    call = runner(run.functions[provider], run.problem, direction)

    def synchronous() -> None:
        call()
        torch.cuda.synchronize()

    benchmark.group = f"{op} {case.name} {direction}"
    benchmark(synchronous if DEVICE == "cuda" else call)
    admit(run, provider, direction)


def admit(run: CaseRun, name: str, direction: Direction) -> None:
    """Go on if the provider passes its gate."""
    row = run.admit(name, direction)
    if row["status"] == "ok":
        return
    said = f"{name} {row['status']}: {row['reason']}"
    if row["role"] == "peer":
        pytest.skip(said)
    pytest.fail(said)

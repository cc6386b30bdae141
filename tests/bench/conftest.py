"""The benchmark is not installed: these tests import it from the checkout."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))

from bench.measure import harness


@pytest.fixture
def verdicts() -> Callable[[harness.Problem], dict[str, dict[str, Any]]]:
    """Of each provider of a step, all built before the first one steps, as a run does it."""

    def judge(problem: harness.Problem) -> dict[str, dict[str, Any]]:
        functions = {x.name: x.build() for x in problem.providers}
        expected = problem.oracles["op"]()
        found = {name: harness.results(f, problem, "step") for name, f in functions.items()}
        return {name: harness.gate(x, expected, torch.float32, "step") for name, x in found.items()}

    return judge

"""Each op's gate lets its providers pass, and no broken op."""

import importlib
from collections.abc import Iterator

import pytest
import torch

import svitt_ops
from bench.cases import frame_attention, token_pruning
from bench.measure import harness
from svitt_ops.integrations.transformers import sparsify

pytestmark = pytest.mark.usefixtures("one_thread")


def objections(case: harness.Case, problem: harness.Problem, name: str) -> Iterator[str]:
    """Of the gate to a provider, one in each direction."""
    provider, dtype = problem.provider(name), harness.DTYPES[case.dtype]
    for direction in case.directions:
        found = harness.results(provider.build(), problem, direction)
        expected = problem.oracles[provider.oracle]()
        yield harness.gate(found, expected, dtype, direction)["objection"]


@pytest.mark.parametrize("index", [0, 5, 9])
def test_token_pruning_and_its_peers_pass_their_gates(index: int) -> None:
    case = token_pruning.shrunk(token_pruning.cases("cpu")[index])
    problem = token_pruning.problem(case)
    for name in (x.name for x in problem.providers if not x.compiled):
        assert not any(objections(case, problem, name)), name


@pytest.mark.parametrize("index", [0, 2, -1])
def test_frame_attention_and_its_peers_pass_their_gates(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = frame_attention.shrunk(frame_attention.cases("cpu")[index])
    problem = frame_attention.problem(case)
    for provider in problem.providers:
        assert not any(objections(case, problem, provider.name)), provider.name
    if case.fields["frames"] > 1:  # else it is no other
        broken = frame_attention.problem(case)
        monkeypatch.setattr(
            svitt_ops, "cross_attention", lambda query, key, value: query.contiguous() * 0
        )
        assert next(objections(case, broken, "svitt_ops")), "a broken op passed"


def test_edges_of_frames_grow_with_them() -> None:
    """Those of patches with the frames; of [CLS] alone with their square."""
    facts = [frame_attention.problem(c).facts for c in frame_attention.cases("cpu")[:3]]
    assert [x["edges"] for x in facts] == [
        197**2,
        2 * 196 * 197 + 4 * 197,
        4 * 196 * 197 + 16 * 197,
    ]
    assert facts[2]["density"] < 0.26


@pytest.mark.parametrize(
    "name", ["queue_info_nce", "sigmoid_nce", "sample_hard_negatives", "retrieval_ranks"]
)
@pytest.mark.parametrize("index", [0, -1])
def test_gates_of_the_contrastive_ops(
    name: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"bench.cases.{name}")
    case = module.cases("cpu")[index]
    few = {"rows": 40, "queue": 300, "dim": 64}
    problem = module.problem(case.shrunk(**{key: few[key] for key in few if key in case.fields}))
    for provider in (x.name for x in problem.providers if not x.compiled and x.name != "liger"):
        assert not any(objections(case, problem, provider)), provider
    right = getattr(svitt_ops, name)
    changes = [lambda x: x + 0.5] if name == "queue_info_nce" else []
    if name == "sigmoid_nce":
        changes = [lambda x: x * 1.5]
    if name == "sample_hard_negatives":
        changes = [lambda x: (x + 1) % 40, lambda x: torch.arange(40), lambda x: x - 40]
    if name == "retrieval_ranks":
        changes = [lambda x: x + (torch.arange(40) == 7), lambda x: x * 0]
    for change in changes:
        monkeypatch.setattr(svitt_ops, name, lambda *a, f=change, **k: f(right(*a, **k)))
        assert next(objections(case, problem, "svitt_ops")), "a broken op passed"


@pytest.mark.parametrize("index", [0, -1])
def test_plug_ins_pass_their_gate_and_a_wrong_layout_does_not(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = importlib.import_module("bench.cases.plugins")
    case = plugins.cases("cpu")[index]
    case = plugins.shrunk(case) if index else case
    problem = plugins.problem(case)
    assert problem.facts["edge_ratio"] > 1 > problem.facts["mac_ratio"]
    for provider in problem.providers:
        assert not any(objections(case, problem, provider.name)), provider.name
    monkeypatch.setattr(plugins, "sparsify", lambda model, **k: sparsify(model, **k, seed=1))
    assert next(objections(case, problem, "svitt_ops")), "other blocks passed"

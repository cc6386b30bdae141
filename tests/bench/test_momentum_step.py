"""The benchmark of a step of ALBEF and SIMLA: what providers compute, and what its times mean."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import svitt_ops

pytest.importorskip("tqdm")
pytest.importorskip("transformers")

from bench import __main__
from bench.cases import momentum_step
from bench.measure import floors, harness, resident, results
from bench.peers import eager_losses
from bench.report import step
from svitt_ops.nn import BlockSparseSelfAttention, CrossAttention

pytestmark = pytest.mark.usefixtures("one_thread")
ARGUMENTS = ["--op", "momentum_step", "--device", "cpu"]


def tiny(system: str, dtype: str = "fp32") -> harness.Case:
    found = (x for x in momentum_step.cases("cpu") if x.fields["system"] == system and not x.quick)
    return dataclasses.replace(momentum_step.shrunk(next(found)), dtype=dtype)


@pytest.mark.parametrize("system", momentum_step.SYSTEMS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_provider_passes_its_gate_and_leaves_no_trace(
    system: str, dtype: str, verdicts: Callable[[harness.Problem], dict[str, dict[str, Any]]]
) -> None:
    before = [x.forward for x in (CrossAttention, BlockSparseSelfAttention)]
    before += [svitt_ops.queue_info_nce, svitt_ops.sample_hard_negatives]
    problem = momentum_step.problem(tiny(system, dtype))
    found = verdicts(problem)
    assert tuple(found) == tuple(momentum_step.PROVIDERS)
    for name, verdict in found.items():
        assert verdict["passed"], (name, verdict["objection"])
    after = [x.forward for x in (CrossAttention, BlockSparseSelfAttention)]
    assert before == [*after, svitt_ops.queue_info_nce, svitt_ops.sample_hard_negatives]
    trial = problem.providers[0].build().trial  # type: ignore[attr-defined]
    assert trial.model.queue.next == 2 * len(found) and trial.model.steps == len(found)
    losses = trial.losses(trial.inputs)[0]
    assert len(losses) == 1 + len(trial.config.losses) and (losses > 0).all()


@pytest.mark.parametrize("fault", ["attention", "losses"])
def test_a_broken_op_gets_no_time(
    fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(floors, "machine", lambda _: {})
    owner: Any = svitt_ops.nn if fault == "attention" else svitt_ops
    name = "cross_attention" if fault == "attention" else "queue_info_nce"
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **given: right(*args, **given) * 1.01)
    path = tmp_path / "step.json"
    words = [*ARGUMENTS, "--case", "albef-tiny", "--budget", "0.001", "--out", str(path)]
    assert __main__.main([*words, "--quick"]) == 1
    (result,) = results.load(path)["results"]
    passed = {row["provider"] for row in result["providers"] if row["status"] == "ok"}
    spared = "sdpa" if fault == "attention" else "eager_losses"
    assert passed == {spared, "sdpa_eager"}


def test_times_and_memory_are_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not resident.SUPPORTED:
        pytest.skip("needs Linux")
    monkeypatch.setattr(floors, "machine", lambda _: {})
    path = tmp_path / "step.json"
    words = [*ARGUMENTS, "--case", "simla-tiny", "--budget", "0.001", "--out", str(path)]
    words += ["--provider", "sdpa_eager"]
    assert __main__.main(words) == 0
    document = results.load(path)
    (result,) = document["results"]
    rates = step.rates(result)
    assert tuple(rates) == ("svitt_ops", "sdpa_eager")
    assert rates["sdpa_eager"]["time_ratio"] == 1
    facts = result["facts"]
    assert facts["state_bytes"] > 16 * facts["weights"]  # with the twin
    for row in result["providers"]:
        rate = rates[row["provider"]]
        assert rate["clips_s"] == pytest.approx(4e3 / row["ms"])
        assert rate["memory_bytes"] > facts["state_bytes"] and row["flops"] > facts["weights"]
    assert "of torch" in capsys.readouterr().out
    for row in result["providers"]:
        row |= {"ms": 250.0, "p20": 240.0, "p80": 260.0, "extra_bytes": 2**30}
    facts["state_bytes"] = 2**31
    short, long = step.render_short(document), step.render(document)
    assert "| 250 | 250 | 100.0% | 16.00 | 3.00 (1.00) | 3.00 (1.00) |" in short
    assert long.count("250 (240-260)") == 2 and "of torch" in long
    first = result["providers"][0]
    result["providers"][0] = {k: v for k, v in first.items() if k in results._ROW} | {
        "status": "failed",
        "reason": "wrong",
    }
    assert "| failed | 250 | - | - | - |" in step.render_short(document)


def test_sizes() -> None:
    """Of the models that were published, with their twins and queues."""
    facts = {}
    for case in momentum_step.cases("cuda"):
        if case.fields["size"] == "base":
            assert (case.fields["batch"], case.dtype) == (32, "bf16")
            facts[case.fields["system"]] = momentum_step.problem(case).facts
    assert set(facts) == set(momentum_step.SYSTEMS)
    for fact in facts.values():
        queues = 65536 * (2 * 256 * 4 + 8)
        assert fact["queue"] == 65536 and 208e6 < fact["weights"] < 240e6
        assert fact["state_bytes"] > 15 * fact["weights"] + queues


def test_eager_losses_are_the_ops() -> None:
    torch.manual_seed(0)
    query, key, teacher, queue = (F.normalize(torch.randn(n, 8), dim=1) for n in (4, 4, 4, 9))
    temperature = torch.tensor(0.1)
    ids, older = torch.tensor([3, 5, 3, 1]), torch.tensor([5, -100, 7, 3, -100, 1, 1, 8, 9])
    for given in (
        {},
        {"teacher_query": teacher, "alpha": 0.4},
        {"teacher_query": teacher, "alpha": 0.4, "query_ids": ids, "queue_ids": older},
    ):
        arguments: Any = (query, key, queue, temperature)
        wanted = svitt_ops.queue_info_nce(*arguments, **given)
        torch.testing.assert_close(eager_losses.contrast_with_queue(*arguments, **given), wanted)
    drawn = torch.stack(
        [eager_losses.draw_negatives(query, key, temperature, ids=ids) for _ in range(200)]
    )
    assert not (ids[drawn] == ids).any()
    op = torch.stack(
        [svitt_ops.sample_hard_negatives(query, key, temperature, ids=ids) for _ in range(200)]
    )
    for row in range(4):
        shares = [x[:, row].bincount(minlength=4) / 200 for x in (drawn, op)]
        assert (shares[0] - shares[1]).abs().max() < 0.2

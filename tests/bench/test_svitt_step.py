"""The benchmark of the training step: one model, its proofs, and what its times mean."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import svitt_ops

pytest.importorskip("tqdm")
pytest.importorskip("transformers")

from bench import __main__
from bench.cases import svitt_step
from bench.measure import floors, harness, memory, resident, results, timing
from bench.measure.training_step import CPU_FORMULAS
from bench.peers import dense_attention
from bench.report import step
from svitt_ops.reference.block_sparse_attention import _bias_index

pytestmark = pytest.mark.usefixtures("one_thread")
_compile = torch.compile
PROVIDERS = ("hybrid", "edge", "node", "dense", "dense_sdpa", "dense_plain")

COMPILED = ("hybrid_compiled", "dense_compiled")


def one_graph(function: Any, *, options: dict[str, Any], **given: Any) -> Any:
    """`torch.compile` without its generator of code, which takes minutes."""
    assert given["fullgraph"] and options["fallback_random"]
    torch._dynamo.reset()
    return _compile(function, backend="aot_eager", **given)


def tiny(part: str = "step", dtype: str = "fp32") -> harness.Case:
    case = next(x for x in svitt_step.cases("cpu") if x.fields["part"] == part and not x.quick)
    return dataclasses.replace(svitt_step.shrunk(case), dtype=dtype)


@pytest.mark.parametrize("part", ["step", "tower"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_variant_passes_its_gate_and_leaves_the_model_as_it_was(
    part: str,
    dtype: str,
    verdicts: Callable[[harness.Problem], dict[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = svitt_step.problem(tiny(part, dtype))
    monkeypatch.setattr(torch, "compile", one_graph)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fast one fails under some ATEN_CPU_CAPABILITY
        found = verdicts(problem)
    assert tuple(found) == PROVIDERS + (COMPILED if part == "step" else ())
    for name, verdict in found.items():
        assert verdict["passed"], (name, verdict["objection"])
    trial = problem.providers[0].build().trial  # type: ignore[attr-defined]
    assert (trial.model.config.keep_rate, trial.model.config.edge_sparsity) == (0.7, True)
    assert [x.attention for x in trial.model.video.layers] == trial.own_attention


@pytest.mark.parametrize("fault", ["attention", "pruning"])
def test_a_broken_step_gets_no_time(
    fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(floors, "machine", lambda _: {})
    if fault == "attention":
        attend = svitt_ops.nn.block_sparse_attention

        def broken(*args: Any, **kwargs: Any) -> Any:
            out = attend(*args, **kwargs)
            return (out[0] * 1.01, out[1]) if isinstance(out, tuple) else out * 1.01

        monkeypatch.setattr(svitt_ops.nn, "block_sparse_attention", broken)
    else:
        prune = svitt_ops.prune_tokens

        def poisoned(tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
            return prune(tokens * float("nan"), *args, **kwargs)

        monkeypatch.setattr(svitt_ops, "prune_tokens", poisoned)
    path = tmp_path / "step.json"
    arguments = ["--op", "svitt_step", "--quick", "--device", "cpu", "--provider", "plain"]
    assert __main__.main([*arguments, "--budget", "0.001", "--out", str(path)]) == 1
    (result,) = results.load(path)["results"]
    hybrid, dense = results.row_of(result, "hybrid"), results.row_of(result, "dense_plain")
    assert hybrid is not None and "ms" not in hybrid
    assert ("proof" if fault == "attention" else "finite_losses") in hybrid["reason"]
    if fault == "attention":  # NaN gradients reach the weights, which all share
        assert dense is not None and dense["status"] == "ok"


def test_a_quick_run_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(floors, "machine", lambda _: {})
    path = tmp_path / "step.json"
    arguments = ["--op", "svitt_step", "--quick", "--device", "cpu", "--out", str(path)]
    assert __main__.main(arguments) == 0
    document = results.load(path)
    (result,) = document["results"]
    rates = step.rates(result)
    assert tuple(rates) == PROVIDERS
    left_out = [x["provider"] for x in result["providers"] if x["status"] == "absent"]
    assert tuple(left_out) == COMPILED
    result["providers"] = [x for x in result["providers"] if x["status"] == "ok"]
    flops = {row["provider"]: row["flops"] for row in result["providers"]}
    assert flops["hybrid"] < min(flops["edge"], flops["node"]) < flops["dense"]
    for row in result["providers"]:
        rate = rates[row["provider"]]
        assert rate["clips_s"] == pytest.approx(2e3 / row["ms"])
        assert rate["tokens_s"] == pytest.approx(rate["clips_s"] * (64 + 1 + 32), rel=1e-3)
        assert 0 < rate["mfu"] < 1
        assert row["gated_after"] == "last timed call"
    assert min(rates[name]["time_ratio"] for name in step.DENSE) == 1
    text = capsys.readouterr().out
    assert "clips/s" in text and "hybrid of dense: 81.4%" in text
    check_tables(document)


def test_the_memory_of_a_slow_step_is_that_of_its_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    if not resident.SUPPORTED:
        pytest.skip("needs Linux")
    case = tiny("tower")
    run = harness.CaseRun(case, svitt_step.problem(case), timing.Effort(), True, "edge,plain")
    rows = [run.admit(name, "step") | {"ms": 2e3} for name in run.functions]
    assert [row["provider"] for row in rows] == ["hybrid", "edge", "dense_plain"]
    memory.fill({"direction": "step", "providers": rows}, "bench.cases.svitt_step", run)
    for row in rows:
        assert row["memory_method"] == "gate's call" and row["extra_bytes"] > 0
    own = [row | {"ms": 2.0} for row in rows[:1]]
    monkeypatch.setattr(memory, "_on_cpu", lambda *_: 123)
    memory.fill({"direction": "step", "providers": own}, "bench.cases.svitt_step", run)
    assert (own[0]["memory_method"], own[0]["extra_bytes"]) == ("own process", 123)


def test_the_peak_of_a_call_is_seen() -> None:
    if not resident.SUPPORTED:
        pytest.skip("needs Linux")
    with resident.nothing_kept():
        kept, taken = resident.peak(lambda: torch.ones(2**23).sum())
    assert kept == 2**23 and 0.9 * 2**25 < taken < 2**26  # the kernel counts in batches


def check_tables(document: dict[str, Any]) -> None:
    (result,) = document["results"]
    for row in result["providers"]:
        row |= {"ms": 250.0, "p20": 240.0, "p80": 260.0, "extra_bytes": 2**30}
    result["facts"]["state_bytes"] = 2**31
    short, long = step.render_short(document), step.render(document)
    assert "| 250 | dense 250 | 100.0% | 81.4% | 8.00 |" in short
    assert "3.00 (1.00)" in short and "3.00 (1.00)" in long
    assert long.count("250 (240-260)") == len(PROVIDERS)
    kept = {k: v for k, v in result["providers"][0].items() if k in results._ROW}
    result["providers"][0] = kept | {"status": "failed", "reason": "wrong"}
    assert "failed" in step.render_short(document)
    assert "failed" in step.render(document)
    json.dumps(document)


def test_a_compiled_step_that_computes_something_else_is_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(function: Any, **given: Any) -> Any:
        def double(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            losses, embeds = function(inputs)
            return losses * 1.1, embeds

        return double

    monkeypatch.setattr(torch, "compile", broken)
    problem = svitt_step.problem(tiny())
    with pytest.raises(AssertionError, match="not close"):
        problem.provider("hybrid_compiled").build()


def test_compiled_steps_are_compared_with_compiled_ones() -> None:
    ms = {"hybrid": 60.0, "dense": 100.0, "hybrid_compiled": 45.0, "dense_compiled": 90.0}
    result = {
        "case": "t4",
        "dtype": "fp32",
        "fields": {"batch": 2},
        "facts": {"tokens": 10, "mac_ratio": 0.5, "state_bytes": 0},
        "ceilings": {"products": {"gemm_fp32_large": 1000.0}},
        "providers": [
            {"provider": name, "status": "ok", "ms": x, "gflops": 10.0} for name, x in ms.items()
        ],
    }
    rates = step.rates(result)
    ratios = {name: rate["time_ratio"] for name, rate in rates.items()}
    assert ratios == {"hybrid": 0.6, "dense": 1, "hybrid_compiled": 0.5, "dense_compiled": 1}
    table = step.render_short({"op": "svitt_step", "results": [result]})
    assert "| t4 | 60 | dense 100 | 60.0% |" in table
    assert "| t4, compiled | 45 | dense_compiled 90 | 50.0% |" in table


def test_multiplications_are_the_paper_s() -> None:
    ratios = {}
    for case in svitt_step.cases("cuda"):
        if case.fields["size"] == "base":
            assert case.fields["batch"] == 32
            facts = svitt_step.problem(case).facts
            ratios[case.fields["frames"]] = facts["mac_ratio"]
            if case.fields["part"] == "step":
                frames = case.fields["frames"]
                wanted = {4: 203_394_653, 8: 204_234_461, 16: 205_914_077}
                assert facts["weights"] == wanted[frames]
    assert {t: round(x, 3) for t, x in ratios.items()} == {4: 0.617, 8: 0.477, 16: 0.338}


def test_long_cases_run_by_name_only() -> None:
    named = [x.name for x in svitt_step.cases("cpu") if x.named and not x.quick]
    assert named and all("t16" in name for name in named)
    assert not any(x.named for x in svitt_step.cases("cuda") if not x.quick)


def test_the_bias_of_a_pair_is_where_the_op_has_it() -> None:
    codes = svitt_ops.position_codes((2, 3, 3))
    rows = 3 * 5 * 5 + 3
    index = dense_attention.pair_index(codes, rows)
    assert torch.equal(index, _bias_index(torch.zeros(rows, 1), codes, 1)[0])


def test_flop_of_sdpa_on_cpus_are_counted() -> None:
    query = torch.randn(1, 2, 16, 8, requires_grad=True)
    counter = FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS)
    with counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    assert math.isclose(counter.get_total_flops(), 7 * 2 * 2 * 16 * 16 * 8)


def test_without_transformers_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "bench.cases.svitt_step")
    monkeypatch.setitem(sys.modules, "svitt_ops.models", None)
    assert __main__.main(["--list", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert "n785-fp32" in shown.out and "svitt_step left out: " in shown.err
    assert __main__.main(["--list", "--device", "cpu", "--op", "svitt_step"]) == 2

"""The benchmark: no time without its proof, one format, tables made from data."""

import copy
import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import svitt_ops

REPOSITORY = Path(__file__).parent.parent
sys.path.append(str(REPOSITORY))  # bench is not installed
pytest.importorskip("tqdm")

from bench import (  # noqa: E402
    __main__,
    compare,
    environment,
    floors,
    harness,
    report,
    results,
    timing,
    token_pruning,
)
from bench import block_sparse_attention as op  # noqa: E402

SMALL = ["--quick", "--op", op.OP, "--case", "small", "--provider", "gather", "--device", "cpu"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The op's benchmark with a case that costs nothing."""
    case = op.shrunk(op.cases("cpu")[0])
    monkeypatch.setattr(op, "cases", lambda device: [dataclasses.replace(case, name="small")])
    return op


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    path = folder / "result.json"
    status = __main__.main([*SMALL, *arguments, "--out", str(path)])
    return status, json.loads(path.read_text())


def rows(document: dict[str, Any], provider: str) -> list[dict[str, Any]]:
    return [r for x in document["results"] for r in x["providers"] if r["provider"] == provider]


def test_a_run_is_recorded(
    small: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, document = run(tmp_path)
    assert status == 0
    results.validate(document)
    assert [x["direction"] for x in document["results"]] == list(harness.DIRECTIONS)
    assert not document["complete"]
    for row in rows(document, "svitt_ops") + rows(document, "gather_sdpa"):
        assert row["status"] == "ok" and 0 < row["p20"] <= row["ms"] <= row["p80"]
    assert set(rows(document, "svitt_ops")[1]["gate"]) == {
        "out",
        "grad_query",
        "grad_key",
        "grad_value",
    }
    assert str(REPOSITORY) not in json.dumps({k: document[k] for k in ("command", "results")})
    assert "svitt_ops" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises", "gradient"])
def test_a_broken_kernel_gets_no_time(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    right = svitt_ops.block_sparse_attention

    def broken(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = right(query, *args, **kwargs)
        assert isinstance(out, Tensor)
        if fault == "raises":
            raise RuntimeError("no such kernel")
        if fault == "gradient":
            return out + (query - query.detach())
        return out * (float("nan") if fault == "nan" else 1.01)

    monkeypatch.setattr(svitt_ops, "block_sparse_attention", broken)
    status, document = run(tmp_path)
    assert status == 1
    ours = rows(document, "svitt_ops")
    for row in ours[1:] if fault == "gradient" else ours:
        assert row["status"] == "failed" and row["reason"]
        assert "ms" not in row and "gflops" not in row
    assert all(row["status"] == "ok" for row in rows(document, "gather_sdpa"))


def test_a_kernel_that_breaks_while_timed_gets_no_time(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = svitt_ops.block_sparse_attention, []

    def decaying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        out = right(*args, **kwargs)
        return out if len(calls) == 1 else out * 2

    monkeypatch.setattr(svitt_ops, "block_sparse_attention", decaying)
    status, document = run(tmp_path, "--direction", "forward")
    (row,) = rows(document, "svitt_ops")
    assert status == 1 and "ms" not in row
    assert row["reason"].startswith("wrong after timing")


def test_an_impossible_time_is_refused(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floors, "least_ms", lambda *_: 1e9)
    status, document = run(tmp_path, "--direction", "forward")
    (row,) = rows(document, "svitt_ops")
    assert status == 1 and row["reason"].startswith("implausible") and "ms" not in row


def test_an_extension_rebuilt_during_the_run_voids_it(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter([{"_C_cpu.abi3.so": "a"}, {"_C_cpu.abi3.so": "b"}])
    monkeypatch.setattr(environment, "extension_digests", lambda: next(digests))
    with pytest.raises(SystemExit, match="rebuilt during the run"):
        run(tmp_path, "--direction", "forward")
    assert not list(tmp_path.iterdir())


def test_a_peer_that_cannot_run_is_named(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(spec: Any) -> Any:
        raise harness.Unavailable("needs something else")

    monkeypatch.setattr(op.peers, "_gather_sdpa", missing)
    status, document = run(tmp_path)
    assert status == 0
    for row in rows(document, "gather_sdpa"):
        assert (row["status"], row["reason"]) == ("absent", "needs something else")


@pytest.mark.parametrize("index", [0, 5, 9])
def test_token_pruning_and_its_peers_pass_their_gates(index: int) -> None:
    case = token_pruning.shrunk(token_pruning.cases("cpu")[index])
    problem = token_pruning.problem(case)
    for provider in (x for x in problem.providers if not x.compiled):
        for direction in harness.DIRECTIONS:
            found = harness.results(provider.build(), problem, direction)
            expected = problem.oracles[provider.oracle]()
            verdict = harness.gate(found, expected, harness.DTYPES[case.dtype], direction)
            assert verdict["passed"], (provider.name, verdict["objection"])


def test_list_names_cases_and_providers(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--list", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for word in ("n3137-bf16", "n550-fp32-pruned", "n1569-fp32-bias", "svitt_eager"):
        assert word in text


def test_no_such_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--case", "no such case", "--device", "cpu"]) == 2


def test_quantiles() -> None:
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert timing.quantiles(values, (0.0, 0.2, 0.5, 0.8, 1.0)) == pytest.approx([1, 1.8, 3, 4.2, 5])
    assert timing.quantiles([7.0], (0.2, 0.5)) == [7.0, 7.0]
    with pytest.raises(ValueError, match="empty"):
        timing.quantiles([], (0.5,))


def test_slow_calls_take_part_in_fewer_rounds() -> None:
    effort = timing.Effort(budget_s=0.05, min_samples=3, max_samples=20)
    big = torch.randn(700, 700)
    calls = {"slow": lambda: [big @ big for _ in range(8)], "fast": lambda: None}
    samples = timing.interleave(calls, torch.device("cpu"), effort)
    assert 3 <= len(samples["slow"].ms) <= 20
    assert len(samples["fast"].ms) >= len(samples["slow"].ms)


def test_floor() -> None:
    rates = {"copy_gbs": 10.0, "peak_gflops": 100.0}
    assert floors.floor_ms(1e9, 1e6, rates) == (pytest.approx(10.0), "compute")
    assert floors.floor_ms(1e6, 1e9, rates) == (pytest.approx(100.0), "memory")


def test_schema_refuses_a_time_without_a_gate(small: ModuleType, tmp_path: Path) -> None:
    _, document = run(tmp_path, "--direction", "forward")
    row = document["results"][0]["providers"][0]
    for change in ({"status": "failed"}, {"status": "fine"}, {"gflops": "fast"}):
        changed = json.loads(json.dumps(document))
        changed["results"][0]["providers"][0] = row | change
        with pytest.raises(results.SchemaError):
            results.validate(changed)
    with pytest.raises(results.SchemaError, match="schema must be"):
        results.validate(document | {"schema": results.SCHEMA + 1})


def test_report(small: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "results"
    run_folder = folder
    run_folder.mkdir()
    run(run_folder)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n<!-- bench:{op.OP} -->\n{report.END}\nafter\n")
    arguments = ["--readme", str(readme), "--results", str(folder)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert f"python -m bench --op {op.OP} --case small" in text and "gather_sdpa" in text
    assert (folder / "result.png").stat().st_size > 0
    readme.write_text(text.replace("Medians", "Averages"))
    assert report.main([*arguments, "--check"]) == 1
    readme.write_text("no markers")
    assert report.main(arguments) == 1


def test_runs_of_the_same_code_compare_as_the_same(small: ModuleType, tmp_path: Path) -> None:
    _, document = run(tmp_path)
    for row in rows(document, "svitt_ops"):
        row |= {"ms": 1.0, "p20": 0.95, "p80": 1.06}
    same, slow = copy.deepcopy(document), copy.deepcopy(document)
    for row in rows(slow, "svitt_ops"):
        row |= {"ms": 1.5, "p20": 1.45, "p80": 1.6}
    assert {x.verdict for x in compare.compare(document, [same])} == {"same"}
    assert {x.verdict for x in compare.compare(document, [slow])} == {"slower"}
    assert {x.verdict for x in compare.compare(slow, [document])} == {"faster"}
    text = compare.render(compare.compare(document, [slow]))
    assert "slower, 1.000 -> 1.500 ms" in text and "0 of 2 rows: no change beyond noise" in text
    slow["environment"]["hardware"] = "another"
    with pytest.raises(ValueError, match="must be of one machine"):
        compare.compare(document, [slow])


def test_a_file_for_several_ops_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["--list", "--out", "some.json"])
    assert "needs --op" in capsys.readouterr().err

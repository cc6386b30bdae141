"""The benchmark: no time without its proof, one format, tables made from data."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

import svitt_ops

pytest.importorskip("tqdm")

from bench import __main__
from bench.cases import block_sparse_attention as op
from bench.measure import environment, floors, harness, results, timing
from bench.report import __main__ as report
from bench.report import compare, figures

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., tuple[int, dict[str, Any]]]
OP = "block_sparse_attention"
SMALL = ["--quick", "--op", OP, "--case", "small", "--provider", "gather", "--device", "cpu"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's benchmark has one case, which costs nothing."""
    case = op.shrunk(op.cases("cpu")[0])
    monkeypatch.setattr(op, "cases", lambda device: [dataclasses.replace(case, name="small")])
    # As `--quick` has them, and without the native probe, which takes seconds.
    ceilings = floors.ceilings
    monkeypatch.setattr(floors, "ceilings", lambda device, dtype, _: ceilings(device, dtype, True))
    monkeypatch.setattr(floors, "machine", lambda _: {})
    # Neighbours may keep a product from its rate longer than a test lasts.
    monkeypatch.setattr(floors, "least_ms", lambda *_: 0.0)


@pytest.fixture
def run(small: None, tmp_path: Path) -> Run:
    """Measures that case; the exit status, and what `result.json` of a folder then holds."""

    def measure(*arguments: str, folder: Path = tmp_path) -> tuple[int, dict[str, Any]]:
        path = folder / "result.json"
        status = __main__.main([*SMALL, *arguments, "--out", str(path)])
        return status, json.loads(path.read_text())

    return measure


def rows(document: dict[str, Any], provider: str) -> list[dict[str, Any]]:
    return [r for x in document["results"] for r in x["providers"] if r["provider"] == provider]


def test_a_run_is_recorded(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = run()
    assert status == 0
    results.validate(document)
    assert [x["direction"] for x in document["results"]] == list(harness.DIRECTIONS)
    assert not document["complete"]
    for row in rows(document, "svitt_ops") + rows(document, "gather_sdpa"):
        assert row["status"] == "ok" and 0 < row["p20"] <= row["ms"] <= row["p80"]
    gate = set(rows(document, "svitt_ops")[1]["gate"])
    assert gate == {"out", "grad_query", "grad_key", "grad_value"}
    told = json.dumps([document["command"], document["results"]])
    assert str(environment.REPOSITORY) not in told
    assert "svitt_ops" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises", "gradient"])
def test_a_broken_kernel_gets_no_time(
    run: Run, monkeypatch: pytest.MonkeyPatch, fault: str
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
    status, document = run()
    assert status == 1
    ours = rows(document, "svitt_ops")
    for row in ours[1:] if fault == "gradient" else ours:
        assert row["status"] == "failed" and row["reason"]
        assert "ms" not in row and "gflops" not in row
    assert all(row["status"] == "ok" for row in rows(document, "gather_sdpa"))


def test_a_kernel_that_breaks_while_timed_gets_no_time(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = svitt_ops.block_sparse_attention, []

    def decaying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        out = right(*args, **kwargs)
        return out if len(calls) == 1 else out * 2

    monkeypatch.setattr(svitt_ops, "block_sparse_attention", decaying)
    status, document = run("--direction", "forward")
    (row,) = rows(document, "svitt_ops")
    assert status == 1 and "ms" not in row
    assert row["reason"].startswith("wrong after timing")


def test_an_impossible_time_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "least_ms", lambda *_: 1e9)
    status, document = run("--direction", "forward")
    (row,) = rows(document, "svitt_ops")
    assert status == 1 and row["reason"].startswith("implausible") and "ms" not in row


def test_an_extension_rebuilt_during_the_run_voids_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter([{"_C_cpu.abi3.so": "a"}, {"_C_cpu.abi3.so": "b"}])
    monkeypatch.setattr(environment, "extension_digests", lambda: next(digests))
    with pytest.raises(SystemExit, match="rebuilt during the run"):
        run("--direction", "forward")
    assert not list(tmp_path.iterdir())


def test_a_killed_run_keeps_what_it_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = harness.CaseRun.run

    def killed(self: harness.CaseRun, direction: harness.Direction) -> dict[str, Any]:
        if direction == "forward_backward":
            raise KeyboardInterrupt
        return measure(self, direction)

    monkeypatch.setattr(harness.CaseRun, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    document = results.load(tmp_path / "result.json")
    assert [x["direction"] for x in document["results"]] == ["forward"]
    assert not document["complete"]


def test_only_a_finished_run_replaces_committed_results(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    monkeypatch.setattr(environment, "_source", lambda: {"commit": None, "dirty": None})
    monkeypatch.setattr(op.peers, "providers", lambda *_: [])
    seen: list[bool] = []
    save = results.save

    def watched(path: Path, document: dict[str, Any]) -> None:
        save(path, document)
        seen.append(path.is_relative_to(environment.RESULTS))

    monkeypatch.setattr(results, "save", watched)
    arguments = ["--op", OP, "--device", "cpu", "--budget", "0.001"]
    assert __main__.main([*arguments, "--quick"]) == 0
    assert seen == [False] * 3
    monkeypatch.setattr(__main__.memory, "fill", lambda *_: None)
    assert __main__.main(arguments) == 0
    assert seen[3:] == [False, False, True]
    (path,) = environment.RESULTS.iterdir()
    assert results.load(path)["complete"]
    assert not list((tmp_path / "build" / "bench").iterdir())


def test_a_peer_that_cannot_run_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(spec: Any) -> Any:
        raise harness.Unavailable("needs something else")

    monkeypatch.setattr(op.peers, "_gather_sdpa", missing)
    status, document = run()
    assert status == 0
    for row in rows(document, "gather_sdpa"):
        assert (row["status"], row["reason"]) == ("absent", "needs something else")


def test_a_peer_may_round_otherwise_and_ours_may_not(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, document = run("--direction", "forward")
    budget = rows(document, "svitt_ops")[0]["gate"]["out"]["budget"]
    peer, right, times = op.peers._gather_sdpa, svitt_ops.block_sparse_attention, 0

    def rounding(spec: Any) -> Any:
        function = peer(spec)
        return lambda *inputs: (function(*inputs)[0] + times * budget,)

    monkeypatch.setattr(op.peers, "_gather_sdpa", rounding)
    for times, verdict in ((5, "ok"), (10, "failed")):
        status, document = run("--direction", "forward")
        (row,) = rows(document, "gather_sdpa")
        assert (status, row["status"]) == (0, verdict)
        assert times - 1 < results.inexactness(row) < times + 1
        shown = capsys.readouterr()
        wanted = "of our error budgets" if verdict == "ok" else ", 8 times budget "
        assert wanted in (shown.out if verdict == "ok" else shown.err)
    monkeypatch.setattr(
        svitt_ops, "block_sparse_attention", lambda *x, **y: right(*x, **y) + 5 * budget
    )
    assert run("--direction", "forward")[0] == 1


def test_list_names_cases_and_providers(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--list", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for word in ("n3137-bf16", "n550-fp32-pruned", "n1569-fp32-bias", "svitt_eager"):
        assert word in text
    for name in svitt_ops.OPS:
        assert f"{name} providers: svitt_ops" in text


def test_no_such_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--case", "no such case", "--device", "cpu"]) == 2


def test_schema_refuses_a_time_without_a_gate(run: Run) -> None:
    _, document = run("--direction", "forward")
    row = document["results"][0]["providers"][0]
    for change in ({"status": "failed"}, {"status": "fine"}, {"gflops": "fast"}):
        changed = json.loads(json.dumps(document))
        changed["results"][0]["providers"][0] = row | change
        with pytest.raises(results.SchemaError):
            results.validate(changed)
    with pytest.raises(results.SchemaError, match="schema must be"):
        results.validate(document | {"schema": results.SCHEMA + 1})


def test_report(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    run(folder=folder)
    short, docs = (tmp_path / "docs" / x for x in ("results.md", "benchmarks.md"))
    short.parent.mkdir()
    marked = "".join(f"<!-- bench:{name} -->\n{report.END}\n" for name in ("standing", OP))
    short.write_text(f"before\n{marked}after\n")
    arguments = ["--short", str(short), "--docs", str(docs), "--results", str(folder)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text, every = short.read_text(), docs.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    for found in (text, every):
        assert f"python -m bench --op {OP} --case small" in found and "gather_sdpa" in found
    ours = rows(json.loads((folder / "result.json").read_text()), "svitt_ops")
    for row in ours:
        assert f"| {row['ms']:.2f} |" in text
        assert f"| {row['ms']:.2f} ({row['p20']:.2f}-{row['p80']:.2f}) |" in every
    assert "retrieval_ranks" in every.rpartition("No results")[2]
    for path, right in ((short, text), (docs, every)):
        path.write_text(right.replace(f"{ours[0]['ms']:.2f}", f"{ours[0]['ms'] + 1:.2f}"))
        assert report.main([*arguments, "--check"]) == 1
        path.write_text(right)
    assert report.main([*arguments, "--check"]) == 0
    short.write_text("no markers")
    assert report.main(arguments) == 1


def test_figure_over_tokens(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, document = run()
    assert not any("tokens" in name for name in figures.names([document]))
    first = document["results"]
    document["results"] = []
    for tokens in (8, 16):
        named = {"case": f"n{tokens}-fp32", "fields": {"tokens": tokens}, "dtype": "fp32"}
        document["results"] += [result | named for result in first]
    points = figures._token_points(document, "svitt_ops", "fp32", "forward")
    assert points == [(x, results.ours(first[0])["ms"]) for x in (8, 16)]  # type: ignore[index]
    drawn = [path.name for path in figures.draw([document], tmp_path)]
    assert sum(name.startswith(f"tokens-{OP}-") for name in drawn) == 2


def test_files_of_one_op_are_joined(run: Run, tmp_path: Path) -> None:
    _, document = run(folder=tmp_path / "run")
    folder = tmp_path / "results"
    for part, name in zip(document["results"], ("t16", "t4"), strict=True):
        command = f"python -m bench --case {name}"
        results.save(folder / f"{name}.json", document | {"results": [part], "command": command})
    (joined,) = results.load_all(folder)
    directions = [x["direction"] for x in joined["results"]]
    assert directions == ["forward_backward", "forward"]  # t4 before t16
    text = report.render([joined])
    assert "`python -m bench --case t4`, `python -m bench --case t16`" in text
    results.save(folder / "again.json", document)
    with pytest.raises(results.SchemaError, match="stands in two files of one machine"):
        results.load_all(folder)
    assert report.main(["--results", str(folder), "--check"]) == 1


def test_runs_of_the_same_code_compare_as_the_same(run: Run) -> None:
    _, document = run()
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


def test_a_slowed_op_is_flagged_and_the_same_one_is_not(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.json"
    arguments = ("--direction", "forward", "--compare", str(old))

    now = 0.0

    def clock() -> float:  # a machine's own would tell of its other load
        nonlocal now
        now += 1e-3
        return now

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))
    assert run("--direction", "forward")[0] == 0
    (tmp_path / "result.json").rename(old)
    assert run(*arguments)[0] == 0
    assert "1 of 1 rows: no change beyond noise" in capsys.readouterr().out
    right = svitt_ops.block_sparse_attention

    def slowed(*args: Any, **kwargs: Any) -> Any:
        nonlocal now
        now += 0.2
        return right(*args, **kwargs)

    monkeypatch.setattr(svitt_ops, "block_sparse_attention", slowed)
    assert run(*arguments)[0] == 1
    assert "small forward svitt_ops: slower" in capsys.readouterr().out


def test_a_run_is_compared_with_what_it_overwrites(run: Run, tmp_path: Path) -> None:
    _, document = run("--direction", "forward")
    path = tmp_path / "result.json"
    for row in rows(document, "svitt_ops"):
        row |= {"ms": 1e-6, "p20": 1e-6, "p80": 1e-6}
    path.write_text(json.dumps(document))
    assert run("--direction", "forward", "--compare", str(path))[0] == 1


def test_a_file_for_several_ops_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["--list", "--out", "some.json"])
    assert "needs --op" in capsys.readouterr().err

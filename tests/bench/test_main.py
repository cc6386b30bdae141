"""The benchmark: no time without its proof, one format, tables made from data."""

import copy
import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import svitt_ops

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY))  # bench is not installed
pytest.importorskip("tqdm")

from bench import __main__  # noqa: E402
from bench.cases import block_sparse_attention as op  # noqa: E402
from bench.cases import cross_attention, token_pruning  # noqa: E402
from bench.measure import environment, floors, harness, results, timing  # noqa: E402
from bench.peers import library  # noqa: E402
from bench.report import __main__ as report  # noqa: E402
from bench.report import compare, figures  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--quick", "--op", op.OP, "--case", "small", "--provider", "gather", "--device", "cpu"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The op's benchmark with a case that costs nothing."""
    case = op.shrunk(op.cases("cpu")[0])
    monkeypatch.setattr(op, "cases", lambda device: [dataclasses.replace(case, name="small")])
    # As `--quick` has them, and without the native probe, which takes seconds.
    ceilings = floors.ceilings
    monkeypatch.setattr(floors, "ceilings", lambda device, dtype, _: ceilings(device, dtype, True))
    monkeypatch.setattr(floors, "machine", lambda _: {})
    # Neighbours may keep a product from its rate longer than a test lasts.
    monkeypatch.setattr(floors, "least_ms", lambda *_: 0.0)
    return op


def test_the_native_probe_measures_or_says_why_not() -> None:
    found = floors.machine(torch.device("cpu"))
    if "reason" not in found:
        for rates in (found["fma_gflops"], found["copy_gbs"]):
            assert str(torch.get_num_threads()) in rates and min(rates.values()) > 0
    assert floors.machine(torch.device("cuda")) == {}


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


def test_a_killed_run_keeps_what_it_measured(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = harness.CaseRun.run

    def killed(self: harness.CaseRun, direction: harness.Direction) -> dict[str, Any]:
        if direction == "forward_backward":
            raise KeyboardInterrupt
        return measure(self, direction)

    monkeypatch.setattr(harness.CaseRun, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    document = results.load(tmp_path / "result.json")
    assert [x["direction"] for x in document["results"]] == ["forward"]
    assert not document["complete"]


def test_only_a_finished_run_replaces_committed_results(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    arguments = ["--op", op.OP, "--device", "cpu", "--budget", "0.001"]
    assert __main__.main([*arguments, "--quick"]) == 0
    assert seen == [False] * 3
    monkeypatch.setattr(__main__.memory, "fill", lambda *_: None)
    assert __main__.main(arguments) == 0
    assert seen[3:] == [False, False, True]
    (path,) = environment.RESULTS.iterdir()
    assert results.load(path)["complete"]
    assert not list((tmp_path / "build" / "bench").iterdir())


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


def test_packages_are_found_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for module, package in (("liger_kernel.transformers", "liger-kernel"), ("inf_cl", "inf-cl")):
        with pytest.raises(harness.Unavailable, match=f"{package} needs a GPU"):
            library.load(module, package, torch.device("cpu"))
        monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
        with pytest.raises(harness.Unavailable, match=f"{package} is not installed"):
            library.load(module, package, gpu)


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
@pytest.mark.parametrize("masked", [False, True])
def test_adapters_of_attention_packages(
    name: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias)
        return out.transpose(1, 2)

    module = SimpleNamespace(flash_attn_func=stand_in, memory_efficient_attention=stand_in)
    monkeypatch.setattr(library, "load", lambda *_: module)
    index = next(
        i
        for i, case in enumerate(cross_attention.cases("cpu"))
        if case.dtype == "fp32" and bool(case.fields["masked"]) == masked
    )
    case = cross_attention.shrunk(cross_attention.cases("cpu")[index])
    problem = cross_attention.problem(case)
    provider = next(x for x in problem.providers if x.name == name)
    if masked and name == "flash_attn":
        with pytest.raises(harness.Unavailable, match="no padding mask"):
            provider.build()
        return
    for direction in harness.DIRECTIONS:
        found = harness.results(provider.build(), problem, direction)
        verdict = harness.gate(found, problem.oracles["op"](), torch.float32, direction)
        assert verdict["passed"], verdict["objection"]


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


@pytest.mark.parametrize("name", ["queue_info_nce", "sample_hard_negatives", "retrieval_ranks"])
@pytest.mark.parametrize("index", [0, -1])
def test_gates_of_the_contrastive_ops(
    name: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"bench.cases.{name}")
    case = module.cases("cpu")[index]
    few = {"rows": 40, "queue": 300, "dim": 64}
    fields = {key: few.get(key, value) for key, value in case.fields.items()}
    problem = module.problem(dataclasses.replace(case, fields=fields))

    def objection(provider: harness.Provider, direction: harness.Direction) -> str:
        found = harness.results(provider.build(), problem, direction)
        expected = problem.oracles[provider.oracle]()
        return harness.gate(found, expected, harness.DTYPES[case.dtype], direction)["objection"]

    for provider in (x for x in problem.providers if not x.compiled and x.name != "liger"):
        for direction in case.directions:
            assert not objection(provider, direction), (provider.name, direction)
    right = getattr(svitt_ops, name)
    changes = [lambda x: x + 0.5] if name == "queue_info_nce" else []
    if name == "sample_hard_negatives":
        changes = [lambda x: (x + 1) % 40, lambda x: torch.arange(40), lambda x: x - 40]
    if name == "retrieval_ranks":
        changes = [lambda x: x + (torch.arange(40) == 7), lambda x: x * 0]
    for change in changes:
        monkeypatch.setattr(svitt_ops, name, lambda *a, f=change, **k: f(right(*a, **k)))
        assert objection(problem.providers[0], "forward"), "a broken op passed"


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
    calls = {"slow": lambda: time.sleep(0.01), "fast": lambda: None}
    samples = timing.interleave(calls, torch.device("cpu"), effort)
    assert 3 <= len(samples["slow"].ms) <= 20
    assert len(samples["fast"].ms) >= len(samples["slow"].ms)


def test_very_slow_calls_are_timed_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SLOW_MS", 5.0)
    calls = []

    def slow() -> None:
        calls.append(time.sleep(0.01))

    samples = timing.interleave({"slow": slow}, torch.device("cpu"), timing.Effort(budget_s=0.001))
    assert len(calls) == len(samples["slow"].ms) == 3
    assert min(samples["slow"].ms) >= 10


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
    folder = tmp_path / "results"
    folder.mkdir()
    run(folder)
    readme, docs = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    marked = "".join(f"<!-- bench:{name} -->\n{report.END}\n" for name in ("standing", op.OP))
    readme.write_text(f"before\n{marked}after\n")
    arguments = ["--readme", str(readme), "--docs", str(docs), "--results", str(folder)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text, every = readme.read_text(), docs.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    for found in (text, every):
        assert f"python -m bench --op {op.OP} --case small" in found and "gather_sdpa" in found
    ours = rows(json.loads((folder / "result.json").read_text()), "svitt_ops")
    for row in ours:
        assert f"| {row['ms']:.2f} |" in text
        assert f"| {row['ms']:.2f} ({row['p20']:.2f}-{row['p80']:.2f}) |" in every
    assert "retrieval_ranks" in every.rpartition("No results")[2]
    for path, right in ((readme, text), (docs, every)):
        path.write_text(right.replace(f"{ours[0]['ms']:.2f}", f"{ours[0]['ms'] + 1:.2f}"))
        assert report.main([*arguments, "--check"]) == 1
        path.write_text(right)
    assert report.main([*arguments, "--check"]) == 0
    readme.write_text("no markers")
    assert report.main(arguments) == 1


def test_figure_over_tokens(small: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, document = run(tmp_path)
    assert not any("tokens" in name for name in figures.names([document]))
    first = document["results"]
    document["results"] = []
    for tokens in (8, 16):
        named = {"case": f"n{tokens}-fp32", "fields": {"tokens": tokens}, "dtype": "fp32"}
        document["results"] += [result | named for result in first]
    points = figures._token_points(document, "svitt_ops", "fp32", "forward")
    assert points == [(x, results.ours(first[0])["ms"]) for x in (8, 16)]  # type: ignore[index]
    drawn = [path.name for path in figures.draw([document], tmp_path)]
    assert sum(name.startswith(f"tokens-{op.OP}-") for name in drawn) == 2


def test_files_of_one_op_are_joined(small: ModuleType, tmp_path: Path) -> None:
    _, document = run(tmp_path / "run")
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


def test_a_slowed_op_is_flagged_and_the_same_one_is_not(
    small: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = tmp_path / "old.json"
    arguments = ("--direction", "forward", "--compare", str(old))

    now = 0.0

    def clock() -> float:  # a machine's own would tell of its other load
        nonlocal now
        now += 1e-3
        return now

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))
    assert run(tmp_path, "--direction", "forward")[0] == 0
    (tmp_path / "result.json").rename(old)
    assert run(tmp_path, *arguments)[0] == 0
    assert "1 of 1 rows: no change beyond noise" in capsys.readouterr().out
    right = svitt_ops.block_sparse_attention

    def slowed(*args: Any, **kwargs: Any) -> Any:
        nonlocal now
        now += 0.2
        return right(*args, **kwargs)

    monkeypatch.setattr(svitt_ops, "block_sparse_attention", slowed)
    assert run(tmp_path, *arguments)[0] == 1
    assert "small forward svitt_ops: slower" in capsys.readouterr().out


def test_a_run_is_compared_with_what_it_overwrites(small: ModuleType, tmp_path: Path) -> None:
    _, document = run(tmp_path, "--direction", "forward")
    path = tmp_path / "result.json"
    for row in rows(document, "svitt_ops"):
        row |= {"ms": 1e-6, "p20": 1e-6, "p80": 1e-6}
    path.write_text(json.dumps(document))
    assert run(tmp_path, "--direction", "forward", "--compare", str(path))[0] == 1


def test_a_file_for_several_ops_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["--list", "--out", "some.json"])
    assert "needs --op" in capsys.readouterr().err

"""The tuner: it times what is right, survives what is not, and launchers take what it wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import cases
from bench.tune import __main__ as program
from bench.tune import child, parent, plan, table
from svitt_ops import retrieval_ranks
from svitt_ops.kernels import tile_table, tiles
from svitt_ops.testing import route_to
from svitt_ops.training import cli

ROOT = Path(__file__).parents[2]
CANDIDATE = plan.Candidate(op="an_op", case="n1-bf16", direction="forward", which="ranks")
TILED = replace(CANDIDATE, tile={"rows": 64})


def test_the_plan_has_todays_tile_and_others_for_the_benchmarks_cases() -> None:
    groups: dict[str, list[plan.Candidate]] = {}
    for candidate in plan.plan():
        groups.setdefault(candidate.group, []).append(candidate)
    for rows in groups.values():
        assert rows[0].tile == {} and len({x.label for x in rows}) == len(rows) > 4
    ops = {x.op: cases.load(x.op) for x in plan.plan()}
    known = {op: {x.name for x in module.cases("cuda")} for op, module in ops.items() if module}
    assert all(x.case in known[x.op] for x in plan.plan())


def test_the_plan_leaves_no_table_out_and_has_legal_tiles() -> None:
    made: dict[str, tuple[Any, str]] = {
        "block_sparse_attention": (
            tiles.attention_tile("forward", 64, 56, 1, torch.bfloat16, False, 90),
            "attention",
        ),
        "cross_attention": (tiles.cross_tile("forward", 32, 64, torch.bfloat16, 90), "cross"),
    }
    contrast = (tiles.contrast_tile("forward", 256, 4096, torch.bfloat16, 90), "contrast")
    tried = set()
    for candidate in plan.plan(processors=108):
        today, name = made.get(candidate.op, contrast)
        tile, form = replace(today, **candidate.tile), tile_table.FORMS[name]
        dtype = "float32" if "fp32" in candidate.case else "bfloat16"
        entry = {"table": name, "pass": candidate.which, "dtype": dtype, "case": "", "ms": 1.0}
        entry |= {"shape": dict.fromkeys(form.shape, 1), "today_ms": 1.0}
        tile_table.check_entry(entry | {"tile": {x: getattr(tile, x) for x in form.tile}})
        assert candidate.tile.get("programs", 0) % 108 == 0
        tried.add((name, candidate.which))
    known = {(name, which) for name, form in tile_table.FORMS.items() for which in form.passes}
    # The first is a small share of its op's time; no case of the benchmark has weights.
    assert known - tried == {("contrast", "combine"), ("contrast", "backward_ids")}


def test_a_tile_stands_in_for_its_pass_alone() -> None:
    given = (256, 4096, torch.bfloat16, 90)
    today, other = (tiles.contrast_tile(x, *given) for x in ("ranks", "sample"))
    override = child.Override(replace(CANDIDATE, tile={"columns": 128}))
    with override:
        assert tiles.contrast_tile("ranks", *given) == replace(today, columns=128)
        assert tiles.contrast_tile("sample", *given) == other
    assert tiles.contrast_tile("ranks", *given) == today
    (entry,) = override.entries.values()
    assert (entry["pass"], entry["tile"]["columns"]) == ("ranks", 128)
    assert entry["shape"] == {"dim": 256, "rows": 2048}


CHILD = """
import json, os, sys, time
mode, work, report = sys.argv[1:]
with open(report, "a", buffering=1) as lines:
    say = lambda **x: lines.write(json.dumps(x) + "\\n")
    say(event="hello")
    for given in json.loads(open(work).read()):
        say(event="start", id=given["id"])
        plant = given["candidate"]["plant"]
        if plant == "exit":
            print("an illegal memory access", flush=True)
            os._exit(3)
        if plant == "hang":
            time.sleep(600)
        if plant == "half":
            os.write(lines.fileno(), b'{"event": "done", "id"')
            os._exit(-9)
        if plant == "memory" and mode == "warm":
            say(event="done", id=given["id"], status="failed", reason="CUDA error: out of memory")
            continue
        say(event="done", id=given["id"], status="ok", ms=1.0, alone=given["alone"])
"""


def drive(folder: Path, chosen: Sequence[plan.Candidate], **limits: Any) -> list[dict[str, Any]]:
    """What a run of fake children makes of candidates."""
    script, known = folder / "child.py", list[int]()
    script.write_text(CHILD)
    given = parent.Limits(**{"seconds": 60, "quiet": 2.0, **limits})
    command = [sys.executable, str(script)]
    rows = parent.run(chosen, command, given, folder / "log", lambda x: known.append(len(x)))
    assert known and set(known) == {len(chosen)}
    return rows


def test_failures_cost_no_more_than_themselves(tmp_path: Path) -> None:
    plants = ["", "exit", "hang", "half", ""]
    chosen = [replace(TILED, plant=x, case=f"n{i}") for i, x in enumerate(plants)]
    rows = drive(tmp_path, chosen)
    assert [x["status"] for x in rows] == ["ok", "failed", "failed", "failed", "ok"]
    assert rows[1]["reason"] == "crashed: exit status 3"
    assert rows[2]["reason"].startswith("hung: nothing for ")
    assert "an illegal memory access" in (tmp_path / "log").read_text()


def test_what_fails_while_it_is_compiled_is_not_timed(tmp_path: Path) -> None:
    chosen = [replace(CANDIDATE, plant="exit"), TILED]
    chosen += [replace(TILED, plant="exit"), replace(TILED, plant="memory")]
    rows = drive(tmp_path, chosen, jobs=2)
    assert [x["status"] for x in rows] == ["failed", "ok", "failed", "ok"]
    assert rows[1]["alone"] is True  # not beside today's tile


def test_the_limit_ends_what_hangs(tmp_path: Path) -> None:
    begin = time.monotonic()
    rows = drive(tmp_path, [replace(TILED, plant="hang"), TILED], seconds=4.0, quiet=600.0)
    assert time.monotonic() - begin < 60 and not any("status" in x for x in rows)
    assert "2 not reached" in table.summary(rows)


def test_a_signal_ends_a_run(tmp_path: Path) -> None:
    ended: list[int] = []
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    chosen = [TILED, replace(TILED, plant="hang", case="n2")]
    limits = parent.Limits(seconds=600, jobs=0, quiet=600)
    command = [sys.executable, str(script)]
    rows = parent.run(
        chosen, command, limits, tmp_path / "log", lambda rows: ended.append(15), ended
    )
    assert rows[0]["status"] == "ok" and "status" not in rows[1]


def row(
    ms: float, today: float | None = 1.0, rows: int = 64, case: str = "n1-bf16", **more: Any
) -> dict[str, Any]:
    """As a child says it, of a tile that takes `ms`."""
    tile = {"rows": rows, "columns": 64, "num_warps": 4, "num_stages": 2, "max_registers": 255}
    tile |= {"chunk": 64, "slice": 64, "programs": 132}
    entry = {"table": "contrast", "pass": "ranks", "dtype": "bfloat16", "tile": tile}
    entry["shape"] = {"dim": 256, "rows": 512}
    candidate = replace(CANDIDATE, tile={"rows": rows}, case=case)
    times = None if today is None else {"ms": today, "p20": 0.99 * today, "p80": 1.01 * today}
    found = {"group": candidate.group, "label": candidate.label, **vars(candidate)}
    found |= {"status": "ok", "ms": ms, "p20": 0.99 * ms, "p80": 1.01 * ms}
    found |= {"today": times, "today_fails": "" if times else "out of resources"}
    return found | {"entry": entry} | more


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([row(0.9), row(0.8, rows=128)], 128),
        ([row(0.985)], None),  # apart, but not by more than noise
        ([row(0.9, p80=1.2)], None),
        ([row(1.1)], None),
        ([row(0.9), row(1.0, case="n2-bf16")], 64),
        ([row(0.8), row(1.1, case="n2-bf16"), row(0.9, rows=128)], 128),
        ([row(0.8), row(0.1, case="n2-bf16", status="refused"), row(0.9, rows=128)], 128),
        ([row(0.8), row(0.1, case="n2-bf16", status="failed"), row(1.9, rows=128)], None),
        ([row(0.8), row(0.7, case="n2-bf16"), row(0.77, rows=128)], 64),
        ([row(9.0, None), row(8.0, None, rows=128)], 128),  # today's cannot run
        ([row(9.0, None, today_fails=""), row(8.0, None, today_fails="", rows=128)], None),
        ([row(0.1, status="refused")], None),
        ([], None),
    ],
)
def test_only_what_is_right_and_faster_gets_in(
    rows: list[dict[str, Any]], wanted: int | None
) -> None:
    made = table.document(rows, 90, {"device": "a GPU", "versions": {}}, [])
    assert [x["tile"]["rows"] for x in made["entries"]] == ([wanted] if wanted else [])


def test_a_second_run_keeps_what_it_did_not_try(tmp_path: Path) -> None:
    where, path = {"device": "a GPU", "versions": {"triton": "3"}}, tmp_path / "sm_90.json"
    other = row(0.5)
    other["entry"] = other["entry"] | {"pass": "sample"}
    other |= {"which": "sample", "group": "another"}
    first = table.document([row(0.5), other], 90, where, table.kept(path, 90, where))
    table.write_whole(path, table.render(first))
    assert len(tile_table.read(path, 90)) == 2
    assert [x.name for x in tmp_path.iterdir()] == ["sm_90.json"]
    old = table.kept(path, 90, where)

    def passes(*rows: dict[str, Any]) -> list[str]:
        return [x["pass"] for x in table.document(rows, 90, where, old)["entries"]]

    assert passes(row(1.5)) == ["sample"]
    assert passes(row(0.9)) == ["ranks", "sample"]
    unreached = {k: v for k, v in row(1.5, rows=128).items() if k not in ("status", "entry")}
    assert passes(row(1.5), unreached) == ["ranks", "sample"]
    assert table.kept(path, 90, where | {"device": "another"}) == []
    assert table.kept(path, 80, where) == []
    path.write_text("{")
    assert table.kept(path, 90, where) == []


def test_the_interpreter_takes_what_was_tuned_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [x for x in plan.toys() if x.plant in ("", "wrong")]
    monkeypatch.setattr(plan, "toys", lambda: kept)
    out, wrong = tmp_path / "tiles", next(x for x in kept if x.plant)
    words = ["--toy", "--only", "retrieval_ranks,block_sparse", "--out", str(out)]
    assert program.main([*words, "--record", str(tmp_path), "--budget", "0.01"]) == 0
    assert "2 tiles in" in capsys.readouterr().out
    found = json.loads((tmp_path / "tune.json").read_text())["results"]
    (refused,) = [x for x in found if x["status"] == "refused"]
    assert refused["plant"] == "wrong" and "budget" in refused["reason"]
    assert "refused" in (tmp_path / "tune.txt").read_text()

    ranks = ("ranks", 32, 128, torch.float32, 0)
    attention = ("forward", 16, 100, 1, torch.float32, False, 0)
    assert tiles.contrast_tile(*ranks).rows != 128
    query, key = torch.randn(2, 128, 32)
    with route_to("triton"):
        expected = retrieval_ranks(query, key)
    monkeypatch.setenv("SVITT_TILES", str(out / "interpreter.json"))
    tile_table.in_use.cache_clear()
    try:
        tile = tiles.contrast_tile(*ranks)
        assert (tile.rows, tile.columns) == (128, 128) != (128, wrong.tile["columns"])
        assert tiles.attention_tile(*attention).rows == 128
        with route_to("triton"):
            assert torch.equal(retrieval_ranks(query, key), expected)
    finally:
        tile_table.in_use.cache_clear()


def test_a_signal_ends_a_run_that_says_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(chosen: list[plan.Candidate], *_: Any, **given: Any) -> list[dict[str, Any]]:
        known, ended = given["known"], given["ended"]
        rows = [row(0.5, case="n1"), *({"label": "", **vars(x), "group": ""} for x in chosen)]
        known(rows)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [signal.SIGTERM]
        return rows

    monkeypatch.setattr(parent, "run", run)
    before, out = signal.getsignal(signal.SIGTERM), tmp_path / "x.json"
    words = ["--toy", "--only", "ranks", "--out", str(out), "--record", str(tmp_path)]
    out.write_text("another's")
    assert program.main(words) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert "1 tile in" in capsys.readouterr().out and len(tile_table.read(out, 0)) == 1


def test_a_process_does_not_outlive_who_watches_it(tmp_path: Path) -> None:
    work, report = tmp_path / "work", tmp_path / "report"
    hang = [{"id": 0, "candidate": vars(replace(TILED, plant="hang")), "alone": False}]
    work.write_text(json.dumps(hang))
    words = ["-m", "bench.tune", "--toy", "--child", "time", str(work), str(report)]
    code = f"import subprocess, sys; subprocess.run([sys.executable, *{words}])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (report.exists() and "start" in report.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    (started,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    while lives(started):  # a test that hangs has failed
        time.sleep(0.05)


def lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_command_plans_and_refuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "bench.tune.__main__")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nobody's own
    assert cli.main(["tune", "--dry-run", "--only", "ranks n1000", "--jobs", "16"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 14 and last.startswith("14 candidates, 14 to compile by 16 processes: ")
    for words, reason in (
        (["--only", "nothing"], "--only: no group has 'nothing'"),
        (["--minutes", "0"], "--minutes: must be positive, got 0.0"),
        (["--warm-share", "1"], "--warm-share: must be between 0 and 1"),
        ([], "there is no GPU here; --toy rehearses, --dry-run plans"),
        (["--toy", "--record", "/dev/null"], "--record: must be a folder to write to"),
    ):
        if words or not torch.cuda.is_available():
            with pytest.raises(SystemExit) as stop:
                cli.main(["tune", *words])
            assert stop.value.code == 2 and reason in capsys.readouterr().err

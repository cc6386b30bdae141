"""Whose bits change from run to run: what is measured, and what is said of it."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
from bench import determinism
from bench.measure import environment
from bench.report import determinism as report

FIRST = {"result": "a", "gradient of table": "b"}
OTHER = {"result": "a", "gradient of table": "c"}
ROWS: list[dict[str, Any]] = [
    {"name": "steady", "digests": {"1": [FIRST, FIRST], "2": [FIRST, FIRST]}},
    {"name": "racing", "digests": {"1": [FIRST, FIRST], "2": [OTHER, FIRST]}},
]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_patterns_are_counted() -> None:
    assert report.patterns(ROWS[1]) == {"1": [0, 0], "2": [1, 0]}
    assert report.changing(ROWS[0]) == [] and report.changing(ROWS[1]) == ["gradient of table"]
    text = report.table({"results": ROWS})
    assert "| steady | nothing | 1 | 1 | 1 |" in text
    assert "| racing | gradient of table | 1 | 2 | 2 |" in text


def test_a_small_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(determinism, "THREADS", (1,))  # more wait for each other on a busy machine
    out = tmp_path / "bits.json"
    assert determinism.main(["--small", "--runs", "2", "--out", str(out)]) == 0
    assert "| svitt_ops: block_sparse_attention | nothing | 1 | 1 |" in capsys.readouterr().out
    document = json.loads(out.read_text())
    parts = document["results"][0]["digests"]["1"][0]
    assert "result" in parts and "gradient of table" in parts
    assert determinism.main(["--draw", str(out), "--figures", str(tmp_path)]) == 0
    written = report.render(tmp_path, "figures")
    assert written.count("<picture>") == 1
    assert all((tmp_path / Path(x).name).is_file() for x in re.findall(r"[\w./-]+\.png", written))
    assert report.render(tmp_path / "nothing", "figures") == ""


def test_bits_that_change_are_seen_and_wrong_results_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(determinism, "THREADS", (1,))
    inputs = {"x": torch.tensor(1.0)}
    steps = itertools.count(1)
    same = determinism.Way(name="same", call=lambda x: x * 2)
    drifts = determinism.Way(name="drifts", call=lambda x: x * (2 + 1e-6 * next(steps)))
    steady, changing = determinism.measure([(inputs, (same, drifts))], 3)
    assert not report.changing(steady) and len(set(report.patterns(changing)["1"])) == 3
    wrong = determinism.Way(name="wrong", call=lambda x: x * 3)
    with pytest.raises(ValueError, match=r"wrong: result differs by 5\.0e-01"):
        determinism.measure([(inputs, (same, wrong))], 3)


def test_ours_did_not_change_where_it_was_measured() -> None:
    paths = [*(environment.RESULTS / "determinism").glob("*.json")]
    assert paths
    for path in paths:
        document = json.loads(path.read_text())
        ours = [x for x in document["results"] if x["name"].startswith("svitt_ops")]
        assert len(ours) == 2 and not any(map(report.changing, ours))


def test_the_guide_says_what_was_measured() -> None:
    page = (environment.REPOSITORY / "docs" / "deterministic.md").read_text()
    shown = re.findall(r"determinism-[\w.-]+?(?=-light\.png)", page)
    (path,) = (environment.RESULTS / "determinism").glob("*.json")
    document = json.loads(path.read_text())
    assert shown == [report.name(document)]
    found = {row["name"]: row for row in document["results"]}
    tables = [
        run["gradient of table"]
        for runs in found["torch: einsum, table[index], heads last"]["digests"].values()
        for run in runs
    ]
    words = f"{len(set(tables))} different gradients of the table in {len(tables)} runs"
    assert words in " ".join(page.split())
    assert not report.changing(found["einsum, deterministic algorithms on"])
    assert not report.changing(found["torch: cross_entropy of q @ k.T"])
    sdpa = report.patterns(found["torch: SDPA, table[index]"])
    assert all(len(set(runs)) == 1 for runs in sdpa.values()) and sdpa["1"] != sdpa["2"]

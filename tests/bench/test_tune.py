"""The tuner, on the interpreter: it times what is right and survives what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench import tune


def test_the_plan_begins_with_todays_tile() -> None:
    groups: dict[str, list[tune.Candidate]] = {}
    for candidate in tune.plan():
        groups.setdefault(candidate.group, []).append(candidate)
    assert len(groups) > 20
    for rows in groups.values():
        assert rows[0].tile == {} and len({x.label for x in rows}) == len(rows) > 5


def test_a_tile_stands_in_for_its_passes_alone() -> None:
    from svitt_ops.kernels import info_nce

    given = (256, 4096, torch.bfloat16, 90)
    today = info_nce.contrast_tile("forward", *given)
    candidate = next(x for x in tune.plan() if x.op == "info_nce" and x.tile)
    with tune.tile_of(candidate):
        tile = info_nce.contrast_tile("forward", *given)
        assert {name: getattr(tile, name) for name in candidate.tile} == candidate.tile
        assert info_nce.contrast_tile("backward", *given).slice == 256
    assert info_nce.contrast_tile("forward", *given) == today


def test_failures_cost_no_more_than_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = ["--toy", "--only", "retrieval_ranks n1000-fp32", "--out", str(tmp_path)]
    assert tune.main([*arguments, "--limit", "240", "--jobs", "1", "--quiet", "30"]) == 0
    found = json.loads((tmp_path / "tune.json").read_text())
    assert found["complete"]
    told = {row["label"]: row for row in found["results"]}
    assert told["today exit"]["reason"] == "crashed: exit status 3"
    assert told["today hang"]["reason"].startswith("hung")
    assert told["today wrong"]["status"] == "refused"
    good = [row for row in found["results"] if row["status"] == "ok"]
    assert len(good) == 2 and all(row["ms"] > 0 and row["checks"] for row in good)
    assert "today hang" in (tmp_path / "tune.txt").read_text()

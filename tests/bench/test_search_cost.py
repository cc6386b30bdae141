"""The cost of searching N x N, by two streams and by one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
from bench import search_cost
from bench.peers.one_stream import OneStream
from bench.report import search_cost as report
from svitt_ops.models import COOKIEConfig, COOKIEModel

KINDS = ("two_stream", "one_stream")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost.json"
    words = ["--small", "--sizes", "2", "12", "--pairs", "8", "--batch", "4", "--tokens", "6"]
    assert search_cost.main([*words, "--out", str(out)]) == 0
    document: dict[str, Any] = json.loads(out.read_text())
    small, large = document["results"]
    per = document["one_stream"]
    assert (small["n"], large["n"]) == (2, 12)
    assert (small["one_stream"]["extrapolated"], large["one_stream"]["extrapolated"]) == (
        False,
        True,
    )
    wanted = 12 * per["seconds_per_image"] + 144 * per["seconds_per_pair"]
    assert large["one_stream"]["seconds"] == pytest.approx(wanted)
    assert all(row[kind]["seconds"] > 0 for row in (small, large) for kind in KINDS)
    assert document["environment"]["commit"] and document["features"] == 16
    assert "(extrapolated)" in capsys.readouterr().out
    assert search_cost.main(["--draw", str(out), "--figures", str(tmp_path)]) == 0
    written = report.render(out.parent, "figures")
    assert written.count("<picture>") == 1 and "| N | two streams, s |" in written
    assert all((tmp_path / Path(x).name).is_file() for x in re.findall(r"[\w./-]+\.png", written))
    assert report.render(tmp_path / "nothing", "figures") == ""
    drawn = capsys.readouterr().out.split()
    assert [Path(path).suffix for path in drawn] == [".png", ".png"]
    assert all(Path(path).stat().st_size > 10_000 for path in drawn)


def test_wrong_scores_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = COOKIEConfig(**search_cost.SMALL)
    models = COOKIEModel(config).eval(), OneStream(config).eval()
    with torch.no_grad():
        assert search_cost.gate(*models, tokens=5) == ""
    real = search_cost.search_two

    def wrong(model: Any, images: Any, texts: Any) -> Any:
        return real(model, images, texts) + 0.1 * (len(images[0]) > 1)

    monkeypatch.setattr(search_cost, "search_two", wrong)
    monkeypatch.setattr(search_cost, "measure", lambda *_: pytest.fail("timed"))
    assert search_cost.main(["--small"]) == 1
    assert "not timed: two streams: scores of a batch" in capsys.readouterr().out

"""The comparison of PyAV and torchcodec, on tiny films."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("av")
from bench import decoding

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "FRAMES", 30)


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decoding.json"
    assert decoding.main(["--small", "--rounds", "1", "--out", str(out)]) == 0
    document: dict[str, Any] = json.loads(out.read_text())
    assert document["command"] == "python -m bench.decoding --rounds 1 --small"
    assert [(row["keys"], row["short_side"]) for row in document["results"]] == [
        *((250, None), (250, 34), (12, None), (12, 34))
    ]
    for row in document["results"]:
        assert {"pyav, first", "pyav, again"} <= row["seconds"].keys()
        assert all(seconds > 0 for seconds in row["seconds"].values())
    said = capsys.readouterr().out
    assert "key frame every 12, shorter side 34: pyav, first " in said
    loaded = "torchcodec, exact" in document["results"][0]["seconds"]
    assert loaded == (document["torchcodec"] is not None)
    assert loaded != ("torchcodec cannot be loaded here: " in said)


def test_other_frames_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = decoding.readers

    def wrong(*given: Any, **more: Any) -> dict[str, Any]:
        found = real(*given, **more)
        read = found["pyav, again"]
        return {**found, "pyav, again": lambda path: torch.flip(read(path), (0,))}

    monkeypatch.setattr(decoding, "readers", wrong)
    assert decoding.main(["--small", "--rounds", "1"]) == 1
    assert "not timed: pyav, again: frames are " in capsys.readouterr().out

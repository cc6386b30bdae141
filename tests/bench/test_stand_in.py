"""The stand-in for VDPBF16PS: what it refuses, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import cases
from bench.predict import stand_in

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def denormals(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What was asked for; other tests keep the denormal numbers that they have."""
    asked: list[bool] = []
    monkeypatch.setattr(torch, "set_flush_denormal", asked.append)
    return asked


def test_an_extension_that_multiplies_as_it_should_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stand_in, "TIER", "sse9")
    with pytest.raises(SystemExit):
        stand_in.main(["--threads", "1"])
    assert "SVITT_CPU_CAPABILITY must be sse9" in capsys.readouterr().err
    monkeypatch.setattr(stand_in, "TIER", torch.ops.svitt_ops.cpu_capability())
    with pytest.raises(SystemExit):
        stand_in.main(["--threads", "1"])
    assert "must be built with -DSVITT_STAND_IN" in capsys.readouterr().err


def test_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    denormals: list[bool],
) -> None:
    monkeypatch.setattr(stand_in, "refusal", str)
    monkeypatch.setattr(stand_in, "QUICK", True)
    out = tmp_path / "rows.json"
    chosen = ["--op", "info_nce", "--case", "b32-d256", "--budget", "0.01", "--threads", "1"]
    stand_in.main([*chosen, "--out", str(out)])
    assert denormals == [True]
    document = json.loads(out.read_text())
    assert document["environment"]["versions"]["torch"] == torch.__version__
    assert [(x["case"], x["direction"]) for x in document["rows"]] == [
        ("b32-d256-bf16", "forward"),
        ("b32-d256-bf16", "forward_backward"),
    ]
    for row in document["rows"]:
        assert row["ms"] > 0 and 0 < row["of_product"] < 1 and row["fp32_ratio"] > 0
    assert capsys.readouterr().out.count("b32-d256-bf16") == 2
    with pytest.raises(SystemExit):
        stand_in.main(["--op", "info_nce", "--case", "b33", "--threads", "1"])
    assert "--case: no bf16 case of info_nce contains 'b33'" in capsys.readouterr().err


def test_every_case_has_its_twin_in_fp32() -> None:
    for op in stand_in.OPS:
        module = cases.load(op)
        assert module is not None
        names = {case.name for case in module.cases("cpu")}
        assert {name.replace("bf16", "fp32") for name in names} <= names, op

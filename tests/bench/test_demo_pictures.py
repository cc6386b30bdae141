"""Tables of demos on pictures, and the runs that they compare."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import ablations
from bench.report import demo, demo_pictures

WAYS = {way: {"R1": 61.0} for way in ("text_to_video", "video_to_text")}
TASKS: dict[str, Any] = {
    "retrieval": {"score": 61.0, "chance": 1.0, "contrastive": 58.0, **WAYS},
    "qa": {"score": 55.5, "chance": 20.0, "by_type": {"color": {"accuracy": 70.0}}},
    "grounding": {"score": 44.0, "chance": 5.7, "untrained": 33.0, "box": 20.0},
}


def facts(seed: int = 0, system: str = "softmask", **more: Any) -> dict[str, Any]:
    return {
        "system": system,
        "tasks": TASKS,
        "parameters": 1000,
        "seed": seed,
        "corpus": {"train_pictures": 1600, "test_pictures": 100},
        "overrides": [],
        "seconds": {"total": 300.0},
        "core_seconds": 540.0,
        "resumed": False,
        "load": 1.5,
        **more,
    }


def keep(folder: Path, *found: dict[str, Any]) -> None:
    for number, one in enumerate(found):
        path = folder / f"{number}.json"
        path.write_text(json.dumps(one))
        assert demo.main([str(path), "--out", str(folder / "kept")]) == 0


def test_tables(tmp_path: Path) -> None:
    unmasked = list(demo_pictures.VARIANTS["softmask"]["unmasked"])
    keep(tmp_path, facts(1), facts(0), facts(0, overrides=unmasked), facts(2, system="albef"))
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    names = ("softmask-seed-1", "softmask-seed-0", "softmask-unmasked-seed-0", "albef-seed-2")
    assert kept == {f"{name}.json" for name in names}
    assert demo.load(tmp_path / "kept") == []
    text = demo_pictures.render(demo.load_pictures(tmp_path / "kept"))
    albef, softmask = text.split("`svitt demo --system softmask --seed N`")
    assert "`svitt demo --system albef --seed N`" in albef and "| seed 2 |" in albef
    for row in (
        "| softmask | chance | seed 0 | seed 1 |",
        "| retrieval: R@1, text to picture | 1.0 % | 61.0 % | 61.0 % |",
        "| qa: questions answered rightly | 20.0 % | 55.5 % | 55.5 % |",
        "| of color |  | 70.0 % | 70.0 % |",
        "| grounding: points into the named box | 5.7 % | 44.0 % | 44.0 % |",
        "| the same of an untrained model |  | 33.0 % | 33.0 % |",
        "| minutes |  | 5.0 | 5.0 |",
        "| minutes of one core |  | 9.0 | 9.0 |",
        "| without soft masks | 0 | 61.0 | 55.5 | 44.0 |",
        "| with soft masks | 0, 1 | 61.0 / 61.0 | 55.5 / 55.5 | 44.0 / 44.0 |",
    ):
        assert row in softmask
    assert "soft masks" not in albef


def test_only_what_is_named_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        keep(tmp_path, facts(overrides=["optimizer.steps=9"]))
    assert "those of a variant, got optimizer.steps=9" in capsys.readouterr().err


def test_losses_are_added_one_by_one() -> None:
    seen = []
    for overrides in [*demo_pictures.VARIANTS["simla"].values()][:-1]:
        weights = next(x for x in overrides if x.startswith("match.model.loss_weights="))
        seen.append([x.partition(":")[0] for x in weights.split("{")[1].split(", ") if ": 1" in x])
    assert seen == [["vtm"], ["vtm", "vtc"], ["vtm", "vtc", "mlm"], ["vtm", "vtc", "mlm", "mim"]]


def test_what_is_kept_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path, facts())
    runs = []

    def run_demo(output: Path, **given: Any) -> None:
        runs.append(given)
        output.mkdir()
        content = facts(given["seed"], overrides=list(given["overrides"]))
        (output / "demo.json").write_text(json.dumps(content))

    monkeypatch.setattr(ablations, "run_demo", run_demo)
    for _ in range(2):
        assert ablations.main(["softmask", "--out", str(tmp_path / "kept")]) == 0
    (one,) = runs
    assert one["without"] == ("assignment", "reasoning", "entailment")
    assert (one["system"], one["overrides"]) == ("softmask", ("model.mask_source=none",))
    assert (tmp_path / "kept" / "softmask-unmasked-seed-0.json").is_file()


def test_cookie_s_table(tmp_path: Path) -> None:
    found = {
        "retrieval": {"score": 61.0, "chance": 1.0, "contrastive": 61.0, **WAYS},
        "text_similarity": {"score": 52.0, "chance": 0.0},
        "hashing": {"score": 48.0, "chance": 24.0, "top_k": 1600},
    }
    variants = demo_pictures.VARIANTS["cookie"]
    keep(
        tmp_path,
        *(facts(system="cookie", tasks=found, overrides=list(x)) for x in variants.values()),
    )
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {f"cookie{name}-seed-0.json" for name in ("", "-unshared", "-ccl")}
    text = demo_pictures.render(demo.load_pictures(tmp_path / "kept"))
    for row in (
        "| text_similarity: correlation | 0.0 % | 52.0 % |",
        "| hashing: MAP@1600 | 24.0 % | 48.0 % |",
        "| CCL alone, shared weights | 0 | 61.0 | 52.0 | 48.0 |",
        "| all losses, shared weights | 0 | 61.0 | 52.0 | 48.0 |",
    ):
        assert row in text

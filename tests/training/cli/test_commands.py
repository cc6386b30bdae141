"""The `svitt` command as a user meets it, and a demo that is over in seconds."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from svitt_ops.training import cli
from svitt_ops.training.cli import demo
from svitt_ops.training.cli.stages import prepare
from svitt_ops.training.corpora.shapes import CorpusSpec, build_corpus, plan
from svitt_ops.training.data.video import read_frames


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in (
        "demo",
        "pretrain",
        "evaluate",
        "visualize",
        "sparsity",
        "bench",
        "tune",
        "info",
    ):
        assert command in text
    for command in (["demo"], ["pretrain"], ["evaluate", "retrieval"], ["visualize"], ["sparsity"]):
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        assert "usage: svitt" in capsys.readouterr().out


def test_the_command_is_light_and_names_a_missing_extra() -> None:
    code = """
import sys
from svitt_ops.training import cli
print([name for name in ("transformers", "av", "kornia", "omegaconf") if name in sys.modules])
sys.modules["omegaconf"] = None
print(cli.main(["pretrain", "--config", "pretrain-4f", "--show"]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split("\n")[:2] == ["[]", "2"]
    assert "needs omegaconf, of the extra `train`: in a checkout" in run.stderr


def test_pretrain_shows_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--config", "pretrain-8f", "--show", "optimizer.lr=1e-3"]) == 0
    assert "lr: 0.001" in capsys.readouterr().out
    assert cli.main(["pretrain", "--config", "pretrain-8f", "optimizer.lrr=1e-3"]) == 2
    assert "optimizer.lrr" in capsys.readouterr().err
    assert cli.main(["evaluate", "retrieval", "no-such-run", "--annotations", "x.json"]) == 2
    assert "no-such-run" in capsys.readouterr().err


def test_bench_is_the_checkout_s_program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: svitt bench") and "svitt bench --quick" in text
    assert cli.main(["bench", "--list", "--op", "info_nce", "--device", "cpu"]) == 0
    assert "b4096-d256-fp32" in capsys.readouterr().out
    assert cli.main(["bench", "--case", "no such case", "--device", "cpu", "--list"]) == 2
    assert "`svitt bench --list`" in capsys.readouterr().err


def test_bench_without_a_checkout_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("svitt_ops.__file__", str(tmp_path / "svitt_ops" / "__init__.py"))
    assert cli.main(["bench", "--quick"]) == 2
    assert "make bench BENCH_ARGS=--quick" in capsys.readouterr().err
    assert cli.main(["tune", "--dry-run"]) == 2
    assert "svitt tune: runs from a checkout" in capsys.readouterr().err


def test_unknown_arguments_are_refused_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sparsity", "--quick"])
    assert "unrecognized arguments: --quick" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    assert "versions" in json.loads(capsys.readouterr().out)


def test_sparsity_is_the_paper_s_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sparsity", "--frames", "4", "8", "16"]) == 0
    text = capsys.readouterr().out
    for number in ("1.475694", "2.603084", "4.612768", "0.801950", "0.912218", "0.961013"):
        assert number in text
    for schedule in ("784/549/385/270", "1568/941/565/339", "3136/1568/784/392"):
        assert schedule in text


def test_splits_share_no_scene_and_pairs_share_their_frames(tmp_path: Path) -> None:
    for motion in (False, True):
        films = plan(demo.demo_corpus(motion))
        scenes = {
            split: {f.events for f in films if f.split == split}
            for split in ("train", "validation", "test")
        }
        assert len(scenes["test"]) == (20 if motion else 50)
        assert not scenes["train"] & scenes["test"]
        assert not scenes["train"] & scenes["validation"]
        assert not scenes["validation"] & scenes["test"]
        shapes = {event[:2] for events in scenes["test"] for event in events}
        assert shapes <= {event[:2] for events in scenes["train"] for event in events}
    spec = CorpusSpec()
    film = plan(spec)[0]
    first, second = film.shoot(spec).values()
    assert sorted(p.tobytes() for p in first) == sorted(p.tobytes() for p in second)
    assert [p.tobytes() for p in first] != [p.tobytes() for p in second]
    assert film.caption((0, 1)) != film.caption((1, 0))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of few scenes, and few steps timed."""
    everything = plan

    def few(spec: CorpusSpec) -> list[Any]:
        films = everything(spec)
        return [
            film
            for split, count in (("train", 12), ("validation", 1), ("test", 4))
            for film in [film for film in films if film.split == split][:count]
        ]

    monkeypatch.setattr("svitt_ops.training.corpora.shapes.plan", few)
    monkeypatch.setattr(demo, "SHUFFLES", 2)
    monkeypatch.setattr(demo, "step_times", partial(demo.step_times, batch=4, turns=1))


@pytest.mark.usefixtures("small")
def test_corpus_files_are_h264(tmp_path: Path) -> None:
    import av

    paths = build_corpus(tmp_path, CorpusSpec(train_films=1))
    entries = json.loads(paths["test"].read_text())
    assert len(entries) == 8
    assert set(entries[0]) == {"video", "caption", "scene"}
    with av.open(str(tmp_path / entries[0]["video"])) as container:
        assert container.streams.video[0].codec_context.name == "h264"
    assert read_frames(tmp_path / entries[0]["video"]).shape == (16, 3, 32, 32)


@pytest.mark.usefixtures("small")
def test_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "demo"
    overrides = ["optimizer.steps=2", "optimizer.batch_size=8", "run.tensorboard=false"]
    assert cli.main(["demo", "--output", str(folder), "--seed", "1", *overrides]) == 0
    out, err = capsys.readouterr()
    for words in ("R@1", "temporal pairs", "visual tokens", "multimodal tokens", "edges", "dense"):
        assert words in out
    assert str(folder / "survivors.png") in out
    assert (folder / "survivors.png").stat().st_size > 1000
    for phase in ("film corpus", "pretrain 4f", "pretrain 8f", "fine-tune qa", "evaluate"):
        assert phase in err
    facts = json.loads((folder / "demo.json").read_text())
    assert facts["frames"] == 8
    assert facts["seed"] == 1
    assert facts["retrieval"]["videos"] == 8
    assert facts["load"] >= 0
    assert {"corpus", *demo.STAGES, "evaluation", "total"} == set(facts["seconds"])
    answers = facts["tasks"]["qa"]
    for name in ("score", "chance", "majority", "order", "order_shuffled"):
        assert 0 <= answers[name] <= 100
    assert {"order", "colour", "count"} == set(answers["by_type"])
    searched = facts["tasks"]["retrieval"]
    assert searched["score"] == facts["retrieval"]["text_to_video"]["R1"]
    assert searched["chance"] == 100 / 8
    for name, random in (("visual", 0.1), ("multimodal", 0.05)):
        share = facts["survivors"][name]
        assert random < share["random"] < 0.4 and 0 <= share["share"] <= 1
    assert facts["survivors"]["visual"]["random"] > facts["survivors"]["multimodal"]["random"]
    assert demo.render_demo(facts) in out
    videos = sorted(str(path) for path in (folder / "corpus" / "videos").glob("test-*.mp4"))[:2]
    table = ["--annotations", str(folder / "corpus" / "test.json"), "--workers", "0"]
    assert cli.main(["evaluate", "retrieval", str(folder / "8f"), *table, "--cpu"]) == 0
    assert "text to video" in capsys.readouterr().out
    figure = ["--caption", "a red square", "--output", str(tmp_path / "figure.png")]
    assert cli.main(["visualize", str(folder / "8f"), videos[0], *figure]) == 0
    assert (tmp_path / "figure.png").exists()
    assert cli.main(["visualize", str(folder / "8f"), *videos, *figure]) == 2
    assert "one for each of the 2 videos" in capsys.readouterr().err
    goes_on_where_it_was_killed(folder, overrides, capsys, caplog)
    removes_its_own_files_alone(folder)


def goes_on_where_it_was_killed(
    folder: Path,
    overrides: list[str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A demo that ended as if by a kill in its last stage."""
    again = ["demo", "--output", str(folder), "--seed", "1", "--resume", *overrides]
    before = json.loads((folder / "demo.json").read_text())
    (folder / "demo.json").write_text(json.dumps({"corpus": before["corpus"]}))
    for path in folder.glob("qa/*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert cli.main([*again, "--motion"]) == 2
    assert "--resume: must be the demo's corpus" in capsys.readouterr().err
    assert cli.main(again) == 0
    assert "film corpus" not in capsys.readouterr().err
    assert caplog.text.count("already trained 2 of 2 steps") == len(demo.STAGES) - 1
    after = json.loads((folder / "demo.json").read_text())
    for name in ("tasks", "retrieval", "survivors", "pair_accuracy"):
        assert after[name] == before[name]


def removes_its_own_files_alone(folder: Path) -> None:
    """Of a folder with a demo, and files of the user's."""
    mine = [
        "thesis.tex",
        "notes/a.txt",
        "corpus/mine.json",
        "corpus/videos/holiday.mp4",
        "8f/b.txt",
    ]
    assert (folder / "qa" / "final").is_dir()
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    everything = sorted(folder.rglob("*"))
    assert cli.main(["demo", "--output", str(folder), "optimizer.lr=-1"]) == 2
    assert sorted(folder.rglob("*")) == everything  # nothing is removed for nothing
    prepare(folder, resume=False)
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert left == sorted([*mine, "demo.json"])
    assert not any((folder / name).exists() for name in ("4f", "qa", "corpus/tokenizer"))
    assert all((folder / name).read_text() == name for name in mine)


def test_demo_refuses_folders_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert cli.main(["demo", "--output", str(tmp_path)]) == 2
    assert "holds something that is no demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()

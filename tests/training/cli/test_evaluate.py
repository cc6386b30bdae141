"""`svitt evaluate retrieval` and `svitt visualize`: what training chose, said and refused."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import svitt_ops
from svitt_ops.training import cli
from svitt_ops.training.data.text import save_tokenizer
from svitt_ops.training.engine.settings import RunSettings, run_settings

Capture = pytest.CaptureFixture[str]
RECIPE = "data: {text_length: 7, short_side: null, resize: official, flip: false}\n"


@pytest.fixture(scope="module")
def run(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, as training leaves it."""
    model, tokenizer, _ = trained
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "final")
    save_tokenizer(tokenizer, folder / "final")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def evaluate(run: Path, annotations: Path, *options: str) -> int:
    table = ["--annotations", str(annotations), "--workers", "0", "--cpu"]
    return cli.main(["evaluate", "retrieval", str(run), *table, *options])


def test_training_chose_the_text_length(
    run: Path, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "found.json"
    assert evaluate(run, corpus / "test.json", "--json", str(target)) == 0
    facts = json.loads(target.read_text())
    stored = {
        "task": "retrieval",
        "model": str(run / "final"),
        "annotations": [str(corpus / "test.json")],
        "root": None,
        "kind": "video",
        "paragraph": False,
        "frames": 4,
        "text_length": 7,
        "short_side": None,
        "resize": "official",
        "clips": 1,
        "strided": False,
        "merge": "logsumexp",
        "top_k": 128,
        "probe": False,
        "bf16": False,
        "protocol": None,
        "overridden": {},
        "entries": 8,
        "version": svitt_ops.__version__,
    }
    assert facts["settings"].items() >= stored.items()
    content = (corpus / "test.json").read_bytes()
    found = {str(corpus / "test.json"): hashlib.sha256(content).hexdigest()}
    assert facts["settings"]["files"] == found
    weights = facts["settings"]["weights"]["model.safetensors"]
    content = (run / "final" / "model.safetensors").read_bytes()
    assert weights == hashlib.sha256(content).hexdigest()
    assert facts["left_out"] == []
    assert facts["texts_cut"] == 8  # [CLS] a red circle then a blue square [SEP]
    words = "8 of 8 texts are longer than the text length, and cut"
    assert capsys.readouterr().out.count(words) == 1
    assert evaluate(run, corpus / "test.json", "--text-length", "9", "--json", str(target)) == 0
    facts = json.loads(target.read_text())
    assert (facts["settings"]["text_length"], facts["texts_cut"]) == (9, 0)
    assert "cut" not in capsys.readouterr().out


@pytest.mark.parametrize("frames", [2, 8])
def test_other_frames_than_the_model_s(
    run: Path, corpus: Path, tmp_path: Path, frames: int, capsys: Capture
) -> None:
    target = tmp_path / "found.json"
    options = ["--frames", str(frames), "--probe", "--top-k", "2", "--json", str(target)]
    assert evaluate(run, corpus / "test.json", *options) == 0
    facts = json.loads(target.read_text())
    assert facts["settings"]["frames"] == frames
    assert facts["reversed"]["videos"] == 8
    assert capsys.readouterr().out.count("texts are longer") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "0"], "--frames: must be at least 1, got 0"),
        (["--clips", "0"], "--clips: must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
        (["--workers", "-1"], "--workers: must be at least 0, got -1"),
        (["--top-k", "-1"], "--top-k: must be at least 0, got -1"),
        (["--text-length", "0"], "--text-length: must be at least 1, got 0"),
        (["--text-length", "2"], "--text-length: must be 3 to 32 tokens"),
        (["--text-length", "33"], "--text-length: must be 3 to 32 tokens"),
        (["--kind", "image", "--probe"], "--probe: needs videos, got --kind image"),
        (["--kind", "image", "--clips", "2"], "--clips: needs videos, got --kind image"),
    ],
)
def test_options_that_cannot_be(
    run: Path, corpus: Path, options: list[str], message: str, capsys: Capture
) -> None:
    assert evaluate(run, corpus / "test.json", *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"svitt evaluate: {message}")
    assert err.count("\n") == 1


def test_more_clips_than_frames(run: Path, corpus: Path) -> None:
    assert evaluate(run, corpus / "test.json", "--clips", "5", "--strided", "--top-k", "2") == 0


def test_a_diverged_model_gets_an_error(
    trained: Any, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, tokenizer, _ = trained
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["video_projection.weight"][0, 0] = math.nan
    weights["temperature"].fill_(math.inf)
    model.save_pretrained(tmp_path, state_dict=weights)
    save_tokenizer(tokenizer, tmp_path)
    capsys.readouterr()
    assert evaluate(tmp_path, corpus / "test.json", "--json", str(tmp_path / "x.json")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "temperature must be finite, got NaN or infinity" in err
    assert not (tmp_path / "x.json").exists()
    clip = str(corpus / json.loads((corpus / "test.json").read_text())[0]["video"])
    figure = tmp_path / "figure.png"
    assert cli.main(["visualize", str(tmp_path), clip, "--caption", "a", "--output", str(figure)])
    assert "temperature must be finite" in capsys.readouterr().err
    assert not figure.exists()


def test_pictures(run: Path, tmp_path: Path, capsys: Capture) -> None:
    image = pytest.importorskip("PIL.Image")
    entries = []
    for number in range(5):
        size = (20 + number, 30)  # of different sizes
        image.new("RGB", size, (40 * number, 0, 9)).save(tmp_path / f"{number}.png")
        entries.append({"image": f"{number}.png", "caption": f"shade {number}"})
    entries[4]["image"] = "missing.png"
    (tmp_path / "test.json").write_text(json.dumps(entries))
    assert evaluate(run, tmp_path / "test.json", "--kind", "image") == 0
    out = capsys.readouterr().out
    assert "4 texts, 4 videos" in out
    assert "1 unusable video skipped" in out


@pytest.mark.parametrize("options", [[], ["--probe"]])
def test_nothing_to_search(run: Path, tmp_path: Path, options: list[str], capsys: Capture) -> None:
    entries = [{"video": f"{k}.mp4", "caption": "gone"} for k in range(3)]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    assert evaluate(run, tmp_path / "test.json", *options) == 2
    assert "--root: must be the folder of the files, none of its files" in capsys.readouterr().err
    for entry in entries:
        (tmp_path / entry["video"]).write_text("no film")
    assert evaluate(run, tmp_path / "test.json", *options) == 2
    assert "retrieval: no video could be read; the first:" in capsys.readouterr().err


def test_visualize_reads_as_training_did(
    run: Path, corpus: Path, tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    clip = str(corpus / json.loads((corpus / "test.json").read_text())[0]["video"])
    figure = tmp_path / "figure.png"
    command = ["visualize", str(run), clip, "--output", str(figure), "--caption"]
    assert cli.main([*command, "a red circle then a blue square", "--frames", "8"]) == 0
    assert "--caption: 1 of 1 longer than 7 tokens, and cut" in caplog.text
    assert figure.exists()
    figure.unlink()
    listed = ["visualize", str(run), "--annotations", str(tmp_path / "test.json"), *command[3:5]]
    rows = [{"video": clip, "caption": "a"}, {"video": "gone.mp4", "caption": "b"}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    assert cli.main(listed) == 0 and figure.exists()
    assert "gone.mp4" in caplog.text
    (tmp_path / "test.json").write_text(json.dumps(rows[1:]))
    capsys.readouterr()
    assert cli.main(listed) == 2
    assert "visualize: no video could be read; the first: " in capsys.readouterr().err
    assert cli.main([*command, "a", "--layer", "1"]) == 2
    assert "--layer: needs a model of pictures, got svitt" in capsys.readouterr().err
    for option in ("--frames", "--text-length"):
        assert cli.main([*command, "a", option, "0"]) == 2
        assert f"{option}: must be at least 1, got 0" in capsys.readouterr().err


def test_where_settings_come_from(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = RunSettings(text_length=7, short_side=None, resize="official")
    assert run_settings(run / "final") == found
    assert run_settings(run) == found
    (run / "checkpoint-40").mkdir()
    assert run_settings(run / "checkpoint-40") == found
    # A folder that is no part of a run has no claim to what lies beside it.
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "mine").mkdir()
    assert run_settings(tmp_path / "mine") == RunSettings()
    assert RunSettings() == RunSettings(text_length=32, short_side=256, resize="antialias")
    own = tmp_path / "final" / "recipe.yaml"
    own.parent.mkdir()
    own.write_text("data: {text_length: 9}")
    assert run_settings(own.parent) == RunSettings(text_length=9)
    own.write_text("seed: 1")
    assert run_settings(own.parent) == RunSettings()
    assert caplog.text == ""
    for content in (b"data: [", b"\xff\xfe\xfa", b"- 1", b"data: 3"):
        caplog.clear()
        own.write_bytes(content)
        assert run_settings(own.parent) == RunSettings()
        assert "recipe.yaml" in caplog.text
    for value in ("long", "-1", "true", "null"):
        caplog.clear()
        own.write_text(f"data: {{text_length: {value}, short_side: 100}}")
        assert run_settings(own.parent) == RunSettings(short_side=100)
        assert "data.text_length is" in caplog.text


def test_the_text_length_of_a_model_without_a_recipe_fits_it(
    trained: Any, corpus: Path, tmp_path: Path
) -> None:
    from svitt_ops.training.engine.loading import load_for_use

    model, tokenizer, _ = trained
    model.save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    _, _, settings, folder = load_for_use(tmp_path)
    assert settings == RunSettings(text_length=32)
    assert folder == tmp_path
    longer, _, _, _ = load_for_use(tmp_path, frames=6)
    assert longer.config.num_frames == 6
    with torch.inference_mode():
        longer.encode_video(torch.zeros(1, 6, 3, 16, 16))

"""`svitt visualize` of models of pictures: maps of words, soft masks, pseudo-labels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")
from PIL import Image
from running import DENSE, OF_PICTURES

from svitt_ops.models import SIMLAForPreTraining, SoftMaskForPreTraining
from svitt_ops.models.systems import load_system
from svitt_ops.training import cli
from svitt_ops.training.cli.maps import Group, Panel, PictureMaps, draw_maps, find_maps
from svitt_ops.training.data.text import save_tokenizer, train_tokenizer
from svitt_ops.training.engine.build import build_model
from svitt_ops.training.engine.loading import load_for_use

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "the small red circle left of a blue square"
SMALL: dict[str, Any] = {
    **DENSE,
    "num_frames": 1,
    "queue_size": 4,
    "image_size": 32,
    "initializer_range": 0.3,
    "text_num_hidden_layers": 4,
}
SMALL_SCL = {name: value for name, value in SMALL.items() if name != "queue_size"}
Capture = pytest.CaptureFixture[str]
Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def folders(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """`folders(system, head="pretraining", **model)`: a model with its tokenizer, untrained."""
    tokenizer = train_tokenizer([TEXT] * 9, 100)

    def make(system: str, head: str = "pretraining", **model: Any) -> Path:
        fields = {**SMALL, **OF_PICTURES[system]} if system in OF_PICTURES else SMALL_SCL
        folder = tmp_path_factory.mktemp(system)
        torch.manual_seed(0)
        recipe = make_recipe(folder, f"system={system}", **{**fields, **model})
        model_class = load_system(system).models[head]
        model_class(build_model(recipe, tokenizer).config).save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def models(folders: Folders) -> dict[str, Path]:
    return {system: folders(system) for system in (*OF_PICTURES, "scl")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of noise that is smooth, as photos are, of sizes and modes that occur."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)

    def photo(mode: str, width: int, height: int) -> Image.Image:
        depth = len(Image.new(mode, (1, 1)).getbands())
        coarse = noise.integers(0, 256, (5, 7, depth), dtype=np.uint8)
        small = Image.fromarray(coarse[..., 0] if depth == 1 else coarse, mode)
        return small.resize((width, height), Image.Resampling.BICUBIC)

    photo("RGB", 53, 37).save(folder / "odd.jpg")
    photo("L", 40, 64).save(folder / "grey.jpg")
    photo("CMYK", 48, 48).save(folder / "print.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo("RGB", 90, 30).save(folder / "turned.jpg", exif=exif)
    photo("RGB", 900, 3).save(folder / "thin.jpg")
    photo("RGB", 1, 1).save(folder / "dot.jpg")
    return folder


def picture(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("system", [*OF_PICTURES, "scl"])
def test_every_picture_of_a_file_gets_a_figure(
    system: str,
    models: dict[str, Path],
    photos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: Capture,
) -> None:
    names = sorted(path.name for path in photos.iterdir())
    rows: list[dict[str, Any]] = [{"image": name, "caption": TEXT} for name in names]
    rows[1] = {
        "image": names[1],
        "text": "A blue $q_{u}are, and an unknown öne",
        "box": [0, 0, 1, 1],
    }
    rows[2]["caption"] = [TEXT, "a second text"]
    rows += [{"image": "gone.jpg", "caption": "a"}, {"image": names[0], "caption": "..."}]
    (photos.parent / "test.json").write_text(json.dumps(rows))
    words = ["visualize", str(models[system]), "--annotations", str(photos.parent / "test.json")]
    words += ["--root", str(photos), "--output", str(tmp_path / "maps")]
    assert cli.main(words) == 0
    figures = sorted((tmp_path / "maps").iterdir())
    assert [x.stem for x in figures] == [f"{k:03}-{Path(n).stem}" for k, n in enumerate(names)]
    assert capsys.readouterr().out.split() == [str(path) for path in figures]
    assert "gone.jpg: " in caplog.text and "entry 7: field 'caption' has no words" in caplog.text
    for path in figures:
        ink = (np.array(Image.open(path).convert("RGB")) < 250).any(-1)
        assert ink.any() and not (ink[:4].any() or ink[-4:].any())
        assert not (ink[:, :4].any() or ink[:, -4:].any())
    caplog.clear()
    assert cli.main([*words, "--count", "2", "--layer", "1"]) == 0
    assert "--count: the first 2 of 7 entries are drawn" in caplog.text
    assert len(capsys.readouterr().out.split()) == 2


def test_maps_are_those_of_the_models(models: dict[str, Path], photos: Path) -> None:
    shown = picture(photos / "odd.jpg")
    for system, kinds in (
        ("albef", ["words"]),
        ("simla", ["words", "pseudo-labels"]),
        ("softmask", ["words", "soft masks"]),
    ):
        model, tokenizer, _, _ = load_for_use(models[system])
        found = find_maps(model, tokenizer, shown, TEXT)
        assert [group.name.partition(",")[0] for group in found.groups] == kinds
        grounding = found.groups[0]
        pieces = [x for x in tokenizer.tokenize(TEXT) if x not in tokenizer.all_special_tokens]
        assert [panel.label for panel in grounding.panels[1:]] == ["whole text", *pieces]
        maps = [panel.values for panel in grounding.panels[1:]]
        assert all(x is not None and x.shape == (4, 4) and (x >= 0).all() for x in maps)
        assert all(x is not None and x.any() for x in maps)
        last = find_maps(model, tokenizer, shown, TEXT, layer=3).groups[0].panels[2:]
        assert [panel.label for panel in last] == [f"{piece} (0)" for piece in pieces]
        if system == "softmask":
            assert isinstance(model, SoftMaskForPreTraining) and found.groups[1].keeps
            kept = torch.stack([panel.values for panel in found.groups[1].panels])  # type: ignore[misc]
            assert len(kept) == len(pieces) and kept.min() >= 0 and kept.max() <= 1
            torch.testing.assert_close(kept.sum((1, 2)), torch.full((len(kept),), 8.0))
            whole = find_maps(model, tokenizer, shown, TEXT).groups[1].panels[0].values
            model.config.mask_keeps = True
            rest = find_maps(model, tokenizer, shown, TEXT).groups[1].panels[0].values
            torch.testing.assert_close(whole + rest, torch.ones(4, 4))
            model.config.mask_source = "random"
            assert len(find_maps(model, tokenizer, shown, TEXT).groups) == 1
        if system == "simla":
            assert isinstance(model, SIMLAForPreTraining)
            labels = [panel.label.split()[0] for panel in found.groups[1].panels]
            assert 1 <= len(labels) <= 5 and set(labels) <= set(pieces)


def test_attention_of_the_text_with_another_model_beside(
    models: dict[str, Path], folders: Folders, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Of every fusion layer; what is drawn of it goes to the patches, not to their [CLS]."""
    shown = picture(photos / "odd.jpg")
    model, tokenizer, _, _ = load_for_use(models["scl"])
    (group,) = find_maps(model, tokenizer, shown, TEXT).groups
    assert [panel.label for panel in group.panels[1:]] == ["layer 1", "layer 2", "layer 3"]
    maps = torch.stack([panel.values for panel in group.panels[1:]])  # type: ignore[misc]
    assert maps.shape == (3, 4, 4) and (maps > 0).all() and (maps.sum((1, 2)) < 1).all()
    (one,) = find_maps(model, tokenizer, shown, TEXT, layer=2).groups
    assert torch.equal(one.panels[1].values, maps[1])  # type: ignore[arg-type]
    other = folders("scl", "retrieval")
    words = ["visualize", str(models["scl"]), str(photos / "odd.jpg"), "--caption", TEXT]
    heights = []
    for more in ([], ["--beside", str(other)], ["--beside", str(models["albef"])]):
        assert cli.main([*words, *more, "--output", str(tmp_path / "maps")]) == 0
        heights.append(Image.open(capsys.readouterr().out.strip()).height)
    assert heights[0] < heights[1] <= heights[2]
    assert cli.main([*words, "--layer", "0", "--output", str(tmp_path / "maps")]) == 2
    assert "SCLForPreTraining: layer must be a fusion layer, 1 to 3" in capsys.readouterr().err
    assert cli.main([*words, "--beside", str(tmp_path)]) == 2
    assert "--beside: must be the folder of a model or of a run" in capsys.readouterr().err


def test_errors(
    models: dict[str, Path],
    folders: Folders,
    photos: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    photo, albef = str(photos / "odd.jpg"), str(models["albef"])
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (tmp_path / "file").touch()
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    asking = str(folders("albef", "question_answering"))
    for words, message in (
        ([albef], "video: must be named, or --annotations, got neither"),
        ([albef, photo], "--caption: must be one for each of the 1 videos, got 0"),
        ([albef, photo, "--caption", "?!"], "--caption: must have words, got '?!'"),
        ([albef, "no.jpg", "--caption", "a"], "video: must be a file, got 'no.jpg'"),
        ([albef, photo, "--caption", "a", "--count", "2"], "--count: needs --annotations"),
        ([albef, photo, "--caption", "a", "--root", "/"], "--root: needs --annotations"),
        ([albef, photo, "--annotations", str(empty)], "--annotations: has the files"),
        ([albef, "--annotations", "none.json"], "--annotations: must be a file, got 'none.json'"),
        ([albef, "--annotations", str(empty)], f"annotations {empty}: no usable entry"),
        ([albef, photo, "--caption", "a", "--layer", "0"], "layer must be a fusion layer, 1 to 3"),
        ([albef, photo, "--caption", "a", "--layer", "-1"], "--layer: must be at least 0, got -1"),
        (
            [albef, photo, "--caption", "a", "--frames", "2"],
            "--frames: needs a model of videos, got albef",
        ),
        (
            [albef, str(tmp_path / "broken.jpg"), "--caption", "a"],
            "visualize: no picture could be read; the first: ",
        ),
        (
            [asking, photo, "--caption", "a"],
            "model: must be for pretraining or retrieval to have maps of words, got"
            " ALBEFForQuestionAnswering",
        ),
        ([albef, photo, "--caption", "a", "--output", str(tmp_path / "file")], "--output: must be"),
    ):
        output = [] if "--output" in words else ["--output", str(tmp_path / "maps")]
        assert cli.main(["visualize", *words, *output]) == 2, message
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") >= 1
        assert message in err.splitlines()[-1], err


def test_numbers_that_are_not_finite(models: dict[str, Path], photos: Path) -> None:
    model, tokenizer, _, _ = load_for_use(models["albef"])
    torch.nn.init.constant_(model.match_head.bias, torch.nan)
    torch.nn.init.constant_(model.fusion.layers[1].cross_attention.query.weight, torch.nan)
    with pytest.raises(ValueError, match=r"visualize: words, layer 2: .* not finite, the first"):
        find_maps(model, tokenizer, picture(photos / "odd.jpg"), TEXT)
    with pytest.raises(ValueError, match="visualize: a text must have words, got ' '"):
        find_maps(model, tokenizer, picture(photos / "odd.jpg"), " ")


def test_the_colours_are_where_the_map_is(tmp_path: Path) -> None:
    """A map's greatest patch is hot; a soft mask fades what it takes away."""
    grey = torch.full((3, 40, 80), 128, dtype=torch.uint8)
    values = torch.zeros(4, 4)
    values[1, 2] = 1e-12
    kept = torch.ones(4, 4)
    kept[1, 2] = 0
    blank = Group(name="none here", panels=())
    for group, colour in (
        (Group(name="words", panels=(Panel(label="W" * 50, values=values),)), "hot"),
        (Group(name="masks", panels=(Panel(label="b", values=kept),), keeps=True), "white"),
    ):
        sample = PictureMaps(picture=grey, caption="$ a", groups=(group, blank))
        drawn = np.array(Image.open(draw_maps(sample, tmp_path / "one.png")).convert("RGB"))
        red, blue = (drawn[..., k].astype(int) for k in (0, 2))
        patch = red - blue > 40 if colour == "hot" else None
        if patch is None:
            inside = (drawn == 128).all(-1)
            rows, columns = np.nonzero(inside)
            patch = np.zeros_like(inside)
            box = slice(rows.min(), rows.max()), slice(columns.min(), columns.max())
            patch[box] = (drawn[box] == 255).all(-1)
        rows, columns = np.nonzero(patch)
        assert rows.size and columns.max() - columns.min() > 1.5 * (rows.max() - rows.min())
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert rows.size > 0.9 * area

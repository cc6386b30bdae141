"""Grounding: files, broken boxes, detections, and what the maps of a model are worth."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from picturing import FORMS, in_form, read
from PIL import Image
from torch import Tensor, nn

from svitt_ops.training.corpora.pictures import build_pictures
from svitt_ops.training.corpora.scenes import PictureSpec
from svitt_ops.training.corpora.shapes import COLORS
from svitt_ops.training.data.annotations import read_annotations
from svitt_ops.training.data.text import train_tokenizer
from svitt_ops.training.engine.recipes import Corpus, load_recipe
from svitt_ops.training.engine.settings import RunSettings
from svitt_ops.training.engine.task import Evaluable, Trainable, Validated, load_task
from svitt_ops.training.tasks import grounding
from svitt_ops.training.tasks.grounding import Evaluation, ground, render
from svitt_ops.training.tasks.parts.evaluation import Reading
from svitt_ops.training.tasks.parts.references import (
    REFERENCES,
    TRAINING,
    read_detections,
    with_detections,
)

GOOD = {"image": "a.png", "text": "The red one.", "box": [1, 2, 3.5, 4]}
SPEC = PictureSpec(train_pictures=20, validation_pictures=10, test_pictures=20)
SIZE, PATCH = 64, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    build_pictures(folder, SPEC)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    entries = read_annotations(folder / "test-grounding.json", form=REFERENCES).entries
    return train_tokenizer([entry.captions[0] for entry in entries], 100)


class Eye(nn.Module):
    """Sees what is bright, by a gradient; or nothing, where it is blind."""

    def __init__(self, *, blind: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=SIZE)
        self.gain = nn.Parameter(torch.zeros(1) if blind else torch.ones(1))
        self.layers: list[int | None] = []

    def ground(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, *, layer: int | None
    ) -> Tensor:
        assert pixel_values.shape[1:] == (1, 3, SIZE, SIZE)
        assert len(pixel_values) == len(input_ids) == len(attention_mask)
        self.layers.append(layer)
        pixels = (pixel_values[:, 0] + 1).requires_grad_()
        (gradient,) = torch.autograd.grad((self.gain * pixels.pow(3)).sum(), pixels)
        patches = gradient.amax(1).unflatten(1, (-1, PATCH)).unflatten(3, (-1, PATCH))
        return patches.mean((2, 4))


@pytest.mark.parametrize("form", FORMS)
def test_every_form(tmp_path: Path, form: str) -> None:
    pytest.importorskip("pyarrow")
    row = {**GOOD, "detections": [[0, 0, 1, 1], [1, 2, 3, 4]], "width": 9, "height": 8}
    (found,) = read(tmp_path, in_form(tmp_path, row, form), REFERENCES, root="/r").entries
    assert (found.media, found.captions, found.kind) == (("/r/a.png",), ("the red one",), "image")
    assert found.box == (1, 2, 3.5, 4)
    assert found.detections == ((0, 0, 1, 1), (1, 2, 3, 4))


def test_broken_references_are_left_out_with_a_reason(tmp_path: Path) -> None:
    sized = {**GOOD, "width": 10, "height": 10}
    bad = {
        "has no field 'box'": {"image": "a.png", "text": "x"},
        "has no field 'text'": {"image": "a.png", "box": [1, 2, 3, 4]},
        "field 'text' has no words": {**GOOD, "text": "..."},
        "field 'box' must be 4 numbers": {**GOOD, "box": [1, 2, 3]},
        "field 'box' must be 4 numbers: left, top, width, height, got None": {**GOOD, "box": None},
        "field 'box' must be a list, got '[1, 2'": {**GOOD, "box": "[1, 2"},
        "field 'box' must have an area, got [1, 2, 0, 4]": {**GOOD, "box": [1, 2, 0, 4]},
        "field 'box' is outside of the picture of 10 x 10": {**sized, "box": [10, 2, 3, 4]},
        "field 'box' is outside of the picture": {**sized, "box": [1, -4, 3, 4]},
        "field 'width' must be a positive number, got 'wide'": {**sized, "width": "wide"},
        "field 'height' must be a positive number, got 0": {**sized, "height": 0},
        "field 'height' must be a positive number, got True": {**sized, "height": True},
        "field 'height' must be a positive number, got 1000": {**sized, "height": 10**400},
        "field 'detections' must be a list of boxes, got int": {**GOOD, "detections": 3},
        "field 'detections': box 1 must have an area": {
            **GOOD,
            "detections": [[1, 2, 3, 4], [1, 2, 3, -4]],
        },
        "must name one file, got 2": {**GOOD, "image": ["a.png", "b.png"]},
    }
    found = read(tmp_path, [*bad.values(), GOOD, sized], REFERENCES)
    assert len(found.entries) == 2
    for number, (reason, problem) in enumerate(zip(bad, found.problems, strict=True)):
        assert f"entry {number}: {reason}" in problem
    # Training asks for no box.
    (entry,) = read(tmp_path, [{"image": "a.png", "text": "A dog"}], TRAINING).entries
    assert (entry.box, entry.captions) == (None, ("a dog",))


def test_detections_of_another_file(tmp_path: Path) -> None:
    path = tmp_path / "dets.json"
    boxes = {"7": [[0, 0, 1, 1]], "b": [[0, 0, 2, 2]], "581857": [[0, 0, 3, 3]]}
    path.write_text(json.dumps(boxes))
    rows = [
        {**GOOD, "image_id": 7},
        {**GOOD, "image": "b.png"},
        {**GOOD, "image": "COCO_train2014_000000581857.jpg"},
        GOOD,
        {**GOOD, "image_id": 7, "detections": [[0, 0, 9, 9]]},
    ]
    references = read(tmp_path, rows, REFERENCES).entries
    found = with_detections(references, read_detections(path))
    wanted = [((0, 0, k, k),) for k in (1, 2, 3)]
    assert [ref.detections for ref in found] == [*wanted, (), ((0, 0, 9, 9),)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "must be an object of lists of boxes, got list"),
        (b"{", "must be JSON, but"),
        (b"\xff", "must be JSON, but"),
        (b'{"7": 3}', "image '7' must be a list of boxes, got int"),
        (b'{"7": [[1, 2, 3, 4], [1, 2]]}', "image '7': box 1 must be 4 numbers"),
    ],
)
def test_detections_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "dets").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^--detections: .*dets: {message}"):
        read_detections(tmp_path / "dets", "--detections")
    with pytest.raises(ValueError, match="cannot be read"):
        read_detections(tmp_path / "none")


def alone(folder: Path, size: tuple[int, int] = (SIZE, SIZE)) -> list[dict[str, Any]]:
    """A bright square in pictures of some width and height, with its box in their pixels."""
    rows = []
    for number, (x, y) in enumerate(((8, 8), (40, 16), (24, 40))):
        scale = (size[0] // SIZE, size[1] // SIZE)
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        box = [x * scale[0], y * scale[1], 16 * scale[0], 16 * scale[1]]
        pixels[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = COLORS["red"]
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": "the red square", "box": box})
    return rows


@pytest.mark.parametrize("size", [(SIZE, SIZE), (4 * SIZE, 6 * SIZE)])
def test_what_a_model_sees(tmp_path: Path, tokenizer: Any, size: tuple[int, int]) -> None:
    rows = alone(tmp_path, size)
    references = read(tmp_path, rows, REFERENCES).entries
    model = Eye().train()
    found = ground(model, tokenizer, references, reading=Reading(short_side=32))
    assert (found["accuracy"], found["pointing"]) == (100, 100)
    assert found["chance"] == 0  # the whole picture is too large
    assert found["pointing_chance"] == pytest.approx(100 / 16)
    assert (found["references"], found["with_detections"]) == (3, 0)
    assert model.training
    chosen = [{**row, "detections": [[0, 0, 9, 9], row["box"], [50, 50, 9, 9]]} for row in rows[:2]]
    references = read(tmp_path, [*chosen, rows[2]], REFERENCES).entries
    found = ground(model, tokenizer, references, settings=Evaluation(batch_size=2, layer=8))
    assert (found["accuracy"], found["with_detections"]) == (100, 2)
    assert found["chance"] == pytest.approx(100 * (1 / 3 + 1 / 3 + 0) / 3)
    assert model.layers[-2:] == [8, 8]
    assert "chosen among detections for 2, of the map for 1" in render(found)


def test_a_blind_model_finds_nothing(tmp_path: Path, tokenizer: Any) -> None:
    references = read(tmp_path, alone(tmp_path), REFERENCES).entries
    found = ground(Eye(blind=True), tokenizer, references)
    assert (found["accuracy"], found["pointing"]) == (0, 0)


def test_what_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = alone(tmp_path)
    outside = {**rows[0], "box": [SIZE, 0, 5, 5]}
    references = read(tmp_path, [*rows, outside, {**GOOD, "image": "gone.png"}], REFERENCES).entries
    found = ground(Eye(), tokenizer, references)
    assert found["references"] == 3
    assert len(found["left_out"]) == 2
    assert any("entry 3: box is outside" in reason for reason in found["left_out"])
    assert any("gone.png" in reason for reason in found["left_out"])
    assert len(found["skipped"]) == 1
    with pytest.raises(ValueError, match="grounding: no box is in its picture; the first: "):
        ground(Eye(), tokenizer, references[3:4])
    model = Eye()
    nn.init.constant_(model.gain, torch.nan)
    with pytest.raises(ValueError, match="grounding: maps: 3 of 3 not finite"):
        ground(model, tokenizer, references[:3])
    model.ground = lambda **_: torch.zeros(3, 4)  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match=r"maps must have shape \(3, rows, columns\), got \(3, 4\)"
    ):
        ground(model, tokenizer, references[:3])


def test_models_without_maps(tmp_path: Path, tokenizer: Any) -> None:
    references = read(tmp_path, [GOOD], REFERENCES).entries
    with pytest.raises(ValueError, match=r"grounding: model must have saliency maps .* Linear has"):
        ground(nn.Linear(1, 1), tokenizer, references)
    with pytest.raises(ValueError, match="recipe: system: svitt must have saliency maps of texts"):
        load_recipe(None, ["system=svitt", "task=grounding"])


def test_the_corpus(folder: Path, tokenizer: Any) -> None:
    task: Any = load_task("grounding", Evaluable)
    assert isinstance(load_task("grounding", Trainable), Validated)
    references = read_annotations(folder / "test-grounding.json", form=task.FORM).entries
    named = str(folder / "detections.json")
    options: Any = SimpleNamespace(
        detections=named, layer=None, batch_size=7, bf16=False, workers=0
    )
    found = grounding.evaluate(Eye(), tokenizer, references, RunSettings(), options)
    assert found["references"] == found["with_detections"] == len(references)
    assert 33 < found["chance"] < 50  # of two or three things that do not overlap
    assert 3 < found["pointing_chance"] < 9
    recipe: Any = grounding.Recipe()
    recipe.data.train = recipe.data.validation = [
        Corpus(annotations=str(folder / "test-grounding.json"))
    ]
    recipe.data.detections, recipe.data.workers = named, 0
    recipe.optimizer.batch_size = 4
    examples = grounding.read_validation(recipe)
    validated = grounding.validate(recipe, Eye(), tokenizer, examples)
    assert validated["score"] == validated["accuracy"] == found["accuracy"]
    assert all(example.box is None for example in grounding.read_examples(recipe))
    recipe.data.detections = None
    assert not any(example.detections for example in grounding.read_validation(recipe))

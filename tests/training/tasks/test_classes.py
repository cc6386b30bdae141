"""Reasoning and entailment: files, broken ones, batches, and what counts as right."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from picturing import FORMS, in_form, read
from PIL import Image
from torch import Tensor, nn

from svitt_ops.training.corpora.pictures import build_pictures
from svitt_ops.training.corpora.scenes import PictureSpec
from svitt_ops.training.data.annotations import read_annotations
from svitt_ops.training.data.augment import Augmentation
from svitt_ops.training.data.collate import encode_texts
from svitt_ops.training.data.datasets import ClipSpec
from svitt_ops.training.data.text import train_tokenizer
from svitt_ops.training.data.video import read_frames
from svitt_ops.training.engine.recipes import Corpus, load_recipe
from svitt_ops.training.engine.settings import RunSettings
from svitt_ops.training.engine.task import Evaluable, Trainable, Validated, load_task
from svitt_ops.training.tasks import entailment, reasoning
from svitt_ops.training.tasks.parts.evaluation import Reading
from svitt_ops.training.tasks.parts.labelled import (
    LabelledCollator,
    LabelledDataset,
    accuracies,
    render,
)
from svitt_ops.training.tasks.parts.pictures import PictureEvaluation

PAIR = {"images": ["a.png", "b.png"], "sentence": "A dog!", "label": "True"}
CLAIM = {"image": "a.jpg", "sentence": "A dog.", "label": "neutral"}
COLORS = [(200, 20, 20), (20, 200, 20), (20, 20, 200)]
SPEC = PictureSpec(train_pictures=30, validation_pictures=10, test_pictures=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    build_pictures(folder, SPEC)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["one is red", "there is a red square and a blue circle"], 60)


class Judge(nn.Module):
    """Judges by colours: of one picture the class of its channel, of two if the first is redder."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.config = SimpleNamespace(image_size=8)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert pixel_values.shape[2:] == (3, 8, 8)
        assert len(pixel_values) == len(input_ids) == len(attention_mask)
        assert not self.training
        channels = pixel_values.mean((3, 4))
        logits = channels[:, 0, : self.classes]
        if self.classes == 2:
            first, second = channels[..., 0].unbind(1)
            logits = torch.stack([second, first], 1)
        return SimpleNamespace(logits=logits + self.bias)


def paint(folder: Path, name: str, color: int, size: tuple[int, int] = (8, 8)) -> str:
    Image.new("RGB", size, COLORS[color]).save(folder / name)
    return name


@pytest.mark.parametrize("form", FORMS)
def test_every_form(tmp_path: Path, form: str) -> None:
    pytest.importorskip("pyarrow")
    (found,) = read(tmp_path, in_form(tmp_path, PAIR, form), reasoning.FORM, root="/r").entries
    assert (found.media, found.captions) == (("/r/a.png", "/r/b.png"), ("a dog",))
    assert (found.label, found.kind) == (1, "image")
    (found,) = read(tmp_path, in_form(tmp_path, CLAIM, form), entailment.FORM, root="/r").entries
    assert (found.media, found.label) == (("/r/a.jpg",), 1)


def test_names_of_classes(tmp_path: Path) -> None:
    rows = [{**PAIR, "label": label} for label in (True, "false", " TRUE ", False)]
    assert [e.label for e in read(tmp_path, rows, reasoning.FORM).entries] == [1, 0, 1, 0]
    rows = [{**CLAIM, "label": label} for label in ("contradiction", "neutral", "Entailment")]
    assert [e.label for e in read(tmp_path, rows, entailment.FORM).entries] == [0, 1, 2]
    old = {"image": "7", "hypothesis": "a dog", "gold_label": "entailment"}
    (tmp_path / "7.jpg").touch()
    (found,) = read(tmp_path, [old], entailment.FORM).entries
    assert (found.media, found.label) == ((str(tmp_path / "7.jpg"),), 2)


def test_broken_pairs_are_left_out_with_a_reason(tmp_path: Path) -> None:
    bad = {
        "field 'images' must name two pictures, got 1": {**PAIR, "images": ["a.png"]},
        "field 'images' must name two pictures, got 3": {**PAIR, "images": ["a", "b", "c"]},
        "field 'images' must be text, got NoneType": {**PAIR, "images": ["a.png", None]},
        "field 'images' is empty": {**PAIR, "images": ["a.png", ""]},
        "has no field 'images'": {**CLAIM, "label": "True"},
        "has no field 'label'": {"images": ["a", "b"], "sentence": "x"},
        "field 'label' must be one of False, True, got 'maybe'": {**PAIR, "label": "maybe"},
        "field 'label' must be one of False, True, got None": {**PAIR, "label": None},
        "field 'label' must be one of False, True, got 1": {**PAIR, "label": 1},
        "has no field 'sentence'": {"images": ["a", "b"], "label": "True"},
        "field 'sentence' has no words": {**PAIR, "sentence": "?"},
        "field 'sentence' must be one text, got 2": {**PAIR, "sentence": ["a", "b"]},
    }
    found = read(tmp_path, [*bad.values(), PAIR], reasoning.FORM)
    assert len(found.entries) == 1
    for number, (reason, problem) in enumerate(zip(bad, found.problems, strict=True)):
        assert f"entry {number}: {reason}" in problem


def test_broken_claims_are_left_out_with_a_reason(tmp_path: Path) -> None:
    bad = {
        "field 'label' must be one of contradiction, neutral, entailment, got '-'": {
            **CLAIM,
            "label": "-",
        },
        "has no field 'label'": {"image": "a.jpg", "sentence": "x"},
        "must name one file, got 2": {**CLAIM, "image": ["a.jpg", "b.jpg"]},
        "field 'image' is empty": {**CLAIM, "image": ""},
    }
    found = read(tmp_path, [*bad.values(), CLAIM], entailment.FORM)
    for number, (reason, problem) in enumerate(zip(bad, found.problems, strict=True)):
        assert f"entry {number}: {reason}" in problem


@pytest.mark.parametrize("name", ["reasoning", "entailment"])
def test_the_corpus_is_read_whole(folder: Path, name: str) -> None:
    task: Any = load_task(name, Evaluable)
    assert isinstance(load_task(name, Trainable), Validated)
    found = read_annotations(folder / f"test-{name}.json", form=task.FORM)
    assert found.problems == ()
    assert len(found.entries) == (200 if name == "reasoning" else 60)
    counts = Counter(entry.label for entry in found.entries)
    assert len(set(counts.values())) == 1
    assert all(Path(path).is_file() for entry in found.entries for path in entry.media)


@pytest.mark.parametrize(("task", "pictures"), [(reasoning, 2), (entailment, 1)])
def test_a_batch_has_the_pictures_of_its_examples(
    folder: Path, tokenizer: Any, task: Any, pictures: int
) -> None:
    name = task.TASK.name
    recipe = task.Recipe()
    recipe.data.train = [Corpus(annotations=str(folder / f"train-{name}.json"))]
    recipe.data.crop_scale, recipe.data.flip, recipe.data.text_length = (1.0, 1.0), False, 9
    recipe.optimizer.batch_size = 4
    examples = task.read_examples(recipe)
    config: Any = SimpleNamespace(num_frames=1, image_size=64, given_features=None)
    dataset = task.build_dataset(recipe, examples, config)
    assert len(dataset) == len(dataset.items) == len(examples)
    batch = task.build_collator(recipe, tokenizer, config)([dataset[k, 0] for k in range(5)])
    inputs = task.model_inputs(recipe, config, batch)
    assert inputs.keys() == {"pixel_values", "input_ids", "attention_mask", "labels"}
    assert inputs["pixel_values"].shape == (5, pictures, 3, 64, 64)
    assert inputs["labels"].tolist() == [example.label for example in examples[:5]]
    for row, example in zip(inputs["pixel_values"], examples, strict=False):
        for found, path in zip(row, example.media, strict=True):
            assert torch.equal(found, read_frames(path)[0].float() / 255 * 2 - 1)
    texts = [example.captions[0] for example in examples[:5]]
    wanted = encode_texts(tokenizer, texts, 9, "longest")
    assert torch.equal(inputs["input_ids"], wanted["input_ids"])


def test_pictures_of_a_pair_are_augmented_apart(folder: Path, tokenizer: Any) -> None:
    examples = read_annotations(folder / "train-reasoning.json", form=reasoning.FORM).entries
    dataset = LabelledDataset(examples, ClipSpec(num_frames=1), seed=3)
    collate = LabelledCollator(
        tokenizer=tokenizer, augmentation=Augmentation(crop_scale=(0.3, 1.0), flip=True)
    )
    batch = collate([dataset[k, 0] for k in range(20)])
    assert all(
        one != other for one, other in zip(batch["boxes"][::2], batch["boxes"][1::2], strict=True)
    )
    # A statement about the left image is not true of mirrored ones.
    sided = [k for k in range(20) if "left" in examples[k].captions[0]]
    assert not any(batch["flips"][2 * k] or batch["flips"][2 * k + 1] for k in sided)
    assert any(batch["flips"])


@pytest.mark.parametrize("task", [reasoning, entailment])
def test_texts_share_their_pictures(folder: Path, tokenizer: Any, task: Any) -> None:
    name, pictures = (("reasoning", 2), ("entailment", 1))[task is entailment]
    examples = read_annotations(folder / f"train-{name}.json", form=task.FORM).entries
    crop = Augmentation(crop_scale=(0.3, 1.0), flip=True)
    dataset = LabelledDataset(examples, ClipSpec(num_frames=1), seed=3, share_clips=True)
    collate = LabelledCollator(tokenizer=tokenizer, augmentation=crop, share_clips=True)
    numbers = list(range(40)) * 2  # so that each picture is shared
    batch, again = (collate([dataset[k, epoch] for k in numbers]) for epoch in (0, 1))
    places = batch["clip_numbers"]
    assert places.shape == ((80, 2) if pictures == 2 else (80,))
    files = [path for k in numbers for path in examples[k].media]
    assert len(batch["clips"]) == len(batch["boxes"]) == len(batch["flips"]) == len(set(files))
    for path, place in zip(files, places.flatten().tolist(), strict=True):
        assert torch.equal(batch["clips"][place], read_frames(path))
    assert len(set(batch["boxes"])) > 1 and batch["boxes"] != again["boxes"]
    # What is drawn for a picture does not depend on the rest of the batch.
    few = collate([dataset[k, 0] for k in numbers[20:30]])
    both = zip(few["clip_numbers"].flatten(), places[20:30].flatten(), strict=True)
    assert all(few["boxes"][one] == batch["boxes"][other] for one, other in both)
    for k, mine in zip(numbers, places.view(80, -1).tolist(), strict=True):
        if "left" in examples[k].captions[0]:
            assert not any(batch["flips"][place] for place in mine)
    recipe = load_recipe(f"demo-pictures-{name}", ["data.share_clips=true"])
    inputs = task.model_inputs(recipe, SimpleNamespace(image_size=8, given_features=None), batch)
    assert inputs["pixel_values"].shape == (len(set(files)), 3, 8, 8)
    assert torch.equal(inputs["clip_numbers"], places)


def test_a_pair_that_lacks_a_picture_is_replaced(folder: Path, tmp_path: Path) -> None:
    rows = json.loads((folder / "train-reasoning.json").read_text())[:4]
    for row in rows:
        row["images"] = [str(folder / image) for image in row["images"]]
    rows[0]["images"][1] = str(tmp_path / "gone.png")
    dataset = LabelledDataset(read(tmp_path, rows, reasoning.FORM).entries, ClipSpec(num_frames=1))
    for epoch in range(4):
        clip = dataset[0, epoch]
        assert len(clip.skipped) >= 1
        assert "gone.png" in clip.skipped[0][1]
        labels = {row["sentence"] + row["label"] for row in rows[1:]}
        assert len(clip.others) == 1
        assert any(clip.label == (name.endswith("True")) for name in labels)


def test_what_counts_as_right(tmp_path: Path, tokenizer: Any) -> None:
    names = [paint(tmp_path, f"{k}.png", k, (8 + k, 16)) for k in range(3)]
    rows = [
        {"images": [names[a], names[b]], "sentence": "one is red", "label": str(label)}
        for a, b, label in ((0, 1, True), (1, 0, True), (1, 0, False), (1, 2, True), (0, 2, True))
    ]
    gone = {"images": [names[0], "gone.png"], "sentence": "one is red", "label": "True"}
    broken = {"images": ["none.png", names[0]], "sentence": "one is red", "label": "False"}
    examples = read(tmp_path, [*rows, gone, broken], reasoning.FORM).entries
    model = Judge(2).train()
    found = [
        reasoning.TASK.classify(
            model, tokenizer, examples, settings=PictureEvaluation(batch_size=size)
        )
        for size in (1, 3, 32)
    ]
    assert found[0] == found[1] == found[2]
    assert model.training
    # Right are the first, the third and the last; the fourth is a tie.
    assert found[0]["accuracy"] == pytest.approx(60)
    assert found[0]["chance"] == pytest.approx(80)
    assert found[0]["by_class"] == {
        "False": {"accuracy": 100, "examples": 1},
        "True": {"accuracy": 50, "examples": 4},
    }
    assert len(found[0]["left_out"]) == len(found[0]["skipped"]) == 2
    assert "entry 5: " in found[0]["left_out"][0]
    assert "gone.png" in found[0]["left_out"][0]
    text = render(found[0])
    assert "always the commonest class" in text
    assert "2 unusable" in text


def test_entailment_in_three_classes(tmp_path: Path, tokenizer: Any) -> None:
    names = [paint(tmp_path, f"{k}.jpg", k) for k in range(3)]
    labels = ["contradiction", "neutral", "entailment", "entailment"]
    rows = [
        {"image": name.removesuffix(".jpg"), "sentence": "one is red", "label": label}
        for name, label in zip([*names, names[0]], labels, strict=True)
    ]
    options = SimpleNamespace(batch_size=3, bf16=False, workers=0)
    examples = read(tmp_path, rows, entailment.FORM).entries
    found = entailment.evaluate(Judge(3), tokenizer, examples, RunSettings(), options)  # type: ignore[arg-type]
    assert (found["accuracy"], found["chance"]) == (75, 50)
    recipe: Any = SimpleNamespace(
        data=RunSettings(), run=SimpleNamespace(precision="fp32"), evaluation=PictureEvaluation()
    )
    recipe.data = SimpleNamespace(**vars(recipe.data), workers=0)
    validated = entailment.validate(recipe, Judge(3), tokenizer, examples)
    assert validated == {"score": 75, "accuracy": 75}


def test_models_that_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    name = paint(tmp_path, "a.png", 0)
    examples = read(tmp_path, [{**CLAIM, "image": name}], entailment.FORM).entries
    with pytest.raises(ValueError, match=r"entailment: .* logits must have shape \(1, 3\), got"):
        entailment.TASK.classify(Judge(1), tokenizer, examples)
    model = Judge(3)
    nn.init.constant_(model.bias, torch.nan)
    with pytest.raises(ValueError, match=r"entailment: logits: 1 of 1 not finite"):
        entailment.TASK.classify(model, tokenizer, examples)
    gone = read(tmp_path, [{**CLAIM, "image": "gone.png"}], entailment.FORM).entries
    with pytest.raises(
        ValueError, match=r"entailment: no picture could be read; the first: .*gone"
    ):
        entailment.TASK.classify(Judge(3), tokenizer, gone, reading=Reading(workers=1))


def test_a_constant_answer_is_chance() -> None:
    labels = [0, 0, 0, 1, 2]
    found = accuracies([label == 0 for label in labels], labels, ("a", "b", "c"))
    assert found["accuracy"] == found["chance"] == 60
    assert found["by_class"]["c"] == {"accuracy": 0, "examples": 1}
    with pytest.raises(ValueError, match="must be of at least one example, got none"):
        accuracies([], [], ())
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        PictureEvaluation(batch_size=0)

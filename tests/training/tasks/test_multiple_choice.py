"""Choices: files, broken ones, and which choices are right."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from svitt_ops.training.data.annotations import Annotations, read_annotations
from svitt_ops.training.engine.build import build_model
from svitt_ops.training.tasks.multiple_choice import FORM, Choice, Choices, choose, render
from svitt_ops.training.tasks.parts.evaluation import ClipEvaluation

TEXTS = ["A dog.", "a cat", "a man", "a bird", "a fish"]
GOOD = {"video": "a.mp4", "caption": TEXTS, "answer": 2}


def read(folder: Path, content: Any) -> Annotations[Choice]:
    path = folder / "anno.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_annotations(path, form=FORM)


def test_forms(tmp_path: Path) -> None:
    cell = json.dumps(TEXTS).replace('"', '""')
    table = f'video,caption,answer\na.mp4,"{cell}",2\n'.encode()
    for content in ([GOOD], json.dumps(GOOD).encode(), table):
        (found,) = read(tmp_path, content).entries
        assert found.options == ("a dog", "a cat", "a man", "a bird", "a fish")
        assert (found.answer, found.captions) == (2, ("a man",))


def test_broken_choices_are_left_out_with_a_reason(tmp_path: Path) -> None:
    bad = {
        "field 'answer' must be 0 to 4, got 5": {**GOOD, "answer": 5},
        "field 'answer' must be 0 to 4, got -1": {**GOOD, "answer": -1},
        "has no field 'answer'": {"video": "a.mp4", "caption": TEXTS},
        "field 'answer' must be the number of a text, got 'two'": {**GOOD, "answer": "two"},
        "field 'answer' must be the number of a text, got 1.5": {**GOOD, "answer": 1.5},
        "field 'answer' must be the number of a text, got True": {**GOOD, "answer": True},
        "field 'caption' must be several texts, got 1": {**GOOD, "caption": "a dog"},
        "field 'caption' has no words": {**GOOD, "caption": ["a", "?"]},
        "must name one file, got 2": {**GOOD, "video": ["a.mp4", "b.mp4"]},
    }
    found = read(tmp_path, [*bad.values(), GOOD])
    assert len(found.entries) == 1
    for number, (reason, problem) in enumerate(zip(bad, found.problems, strict=True)):
        assert f"entry {number}: {reason}" in problem


def test_choices_among_another_number_of_texts(tmp_path: Path, caplog: Any) -> None:
    short = {**GOOD, "caption": TEXTS[:3]}
    found = Choices.of(read(tmp_path, [GOOD, short, GOOD]).entries)
    assert (len(found.choices), found.options) == (2, 5)
    (reason,) = found.left_out
    assert reason.endswith("entry 1: has 3 texts where 2 have 5")
    assert "multiple_choice: 1 of 3 entries left out" in caplog.text


@pytest.fixture(scope="module")
def choosing(make_recipe: Any, trained: Any, corpus: Path) -> tuple[Any, Any, Choices]:
    _, tokenizer, _ = trained
    torch.manual_seed(0)
    model = build_model(make_recipe(Path("unused")), tokenizer, "multiple_choice").eval()
    choices = read_annotations(corpus / "test_multiple_choice.json", form=FORM).entries
    return model, tokenizer, Choices.of(choices)


def test_choices(choosing: Any, monkeypatch: Any) -> None:
    model, tokenizer, examples = choosing
    found = choose(model, tokenizer, examples, settings=ClipEvaluation(clips=2, batch_size=3))
    again = choose(model, tokenizer, examples, settings=ClipEvaluation(clips=2))
    assert found == again
    assert (found["questions"], found["options"], found["chance"]) == (8, 5, 20.0)
    assert "8 choices among 5 texts, 8 videos" in render(found)
    monkeypatch.setattr(model, "match_logits", lambda text, *_: torch.zeros(len(text), 2))
    assert choose(model, tokenizer, examples)["accuracy"] == 0  # ties
    broken = torch.tensor([[0, torch.nan]])
    monkeypatch.setattr(model, "match_logits", lambda text, *_: broken.expand(len(text), 2))
    with pytest.raises(ValueError, match=r"multiple_choice: match scores: .* not finite"):
        choose(model, tokenizer, examples)


def test_a_match_head_that_was_not_trained(choosing: Any) -> None:
    model, tokenizer, examples = choosing
    weights = model.config.loss_weights
    model.config.loss_weights = {"vtc": 1, "vtm": 0, "mlm": 0}
    try:
        with pytest.raises(ValueError, match="multiple_choice: the model's match head"):
            choose(model, tokenizer, examples)
    finally:
        model.config.loss_weights = weights

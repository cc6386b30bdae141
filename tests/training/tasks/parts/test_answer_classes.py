"""Answers as classes: soft scores, their batches, and the choice from a list."""

from pathlib import Path
from typing import Any

import pytest
import torch

from svitt_ops.training.data.annotations import read_annotations
from svitt_ops.training.data.datasets import ClipSpec
from svitt_ops.training.data.text import train_tokenizer
from svitt_ops.training.tasks.parts.answer_classes import AnswerClassCollator, Choices
from svitt_ops.training.tasks.parts.questions import (
    QUESTIONS,
    Question,
    QuestionDataset,
    soft_scores,
)


def question(**counts: int) -> Question:
    people = sum(counts.values())
    fields: dict[str, Any] = {"media": ("a",), "captions": ("what",), "kind": "image"}
    fields |= {"together": None, "type": "other", "place": "entry 0"}
    weights = tuple(count / people for count in counts.values())
    return Question(**fields, answers=tuple(counts), counts=tuple(counts.values()), weights=weights)


def test_scores_by_the_people_who_gave_an_answer() -> None:
    assert soft_scores(question(a=1, b=2, c=3, d=4)) == pytest.approx((0.3, 0.6, 0.9, 1))
    assert soft_scores(question(a=10)) == (1,)
    assert soft_scores(question(a=1)) == (1,)  # of one person
    assert soft_scores(question(a=1, b=2)) == pytest.approx((1 / 3, 2 / 3))


def test_batches_of_scores(corpus: Path) -> None:
    entries = read_annotations(corpus / "train_qa.json", form=QUESTIONS).entries[:3]
    asked = [
        Question(**{**vars(entry), "answers": ("b", "none"), "counts": (2, 8)}) for entry in entries
    ]
    dataset = QuestionDataset(asked, ClipSpec(num_frames=1), soft=True, share_clips=True)
    collate = AnswerClassCollator(
        tokenizer=train_tokenizer(["what"], 30), classes={"a": 0, "b": 1}, share_clips=True
    )
    batch = collate([dataset[number, 0] for number in range(3)])
    torch.testing.assert_close(batch["targets"], torch.tensor([[0, 0.6]]).expand(3, 2))
    assert "answer_ids" not in batch and len(batch["clip_numbers"]) == 3


def test_choices_are_those_of_the_list(caplog: pytest.LogCaptureFixture) -> None:
    choices = Choices.of(["x", "blue", "red"], ["red", "green", "blue"])
    assert "1 of 3 answers to choose from are no classes of the model" in caplog.text
    scores = torch.tensor([[1.0, 9, 2], [3, 9, 2], [5, 0, 5]])
    assert choices.best(scores).tolist() == [1, 2, 1]  # green is not to be chosen; a tie: the first
    with pytest.raises(ValueError, match="none of 1 is one; the first: 'x', the model's: 'red'"):
        Choices.of(["x"], ["red"])

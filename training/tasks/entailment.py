"""Visual entailment (SNLI-VE): does a picture entail a text, contradict it, or neither?"""

from __future__ import annotations

from dataclasses import dataclass

from svitt_ops.training.data.annotations import Form, Record
from svitt_ops.training.tasks.parts.labelled import (
    TEXTS,
    ClassTask,
    Labelled,
    LabelledRecipe,
    labelled,
    render,
)

__all__ = ["render"]  # and those that are written here
HEAD = "visual_entailment"
OPTIONS: dict[str, object] = {}
CLASSES = ("contradiction", "neutral", "entailment")


@dataclass
class Recipe(LabelledRecipe):
    """Fine-tuning on texts that pictures entail, or don't."""

    task: str = "entailment"


def _hypothesis(record: Record) -> Labelled:
    media = record.media
    if len(media) != 1:
        raise ValueError(f"must name one file, got {len(media)}")
    return labelled(record, media, CLASSES)


FORM = Form(texts=TEXTS, parse=_hypothesis)
TASK = ClassTask(name="entailment", classes=CLASSES, form=FORM)
read_examples = TASK.read_examples
build_dataset = TASK.build_dataset
build_collator = TASK.build_collator
model_inputs = TASK.model_inputs
read_validation = TASK.read_validation
validate = TASK.validate
evaluate = TASK.evaluate

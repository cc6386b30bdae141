"""Visual reasoning (NLVR2): is a statement true of a pair of pictures?"""

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
HEAD = "visual_reasoning"
OPTIONS: dict[str, object] = {}
CLASSES = ("False", "True")
IMAGES = "images"


@dataclass
class Recipe(LabelledRecipe):
    """Fine-tuning on statements about pairs of pictures."""

    task: str = "reasoning"


def _statement(record: Record) -> Labelled:
    media = record.paths(record.options(record.field(IMAGES)), IMAGES)
    if len(media) != 2:
        raise ValueError(f"field {IMAGES!r} must name two pictures, got {len(media)}")
    return labelled(record, media, CLASSES)


FORM = Form(texts=TEXTS, parse=_statement, media=(IMAGES,))
TASK = ClassTask(name="reasoning", classes=CLASSES, form=FORM)
read_examples = TASK.read_examples
build_dataset = TASK.build_dataset
build_collator = TASK.build_collator
model_inputs = TASK.model_inputs
read_validation = TASK.read_validation
validate = TASK.validate
evaluate = TASK.evaluate

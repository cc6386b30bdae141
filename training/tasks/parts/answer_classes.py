"""Questions whose answers are classes: batches to learn from, and the choice among a list.

Source: METER (CVPR 2022) and SCL (CVPR 2023).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from svitt_ops.training.data.collate import Collator
from svitt_ops.training.data.transport import Batch
from svitt_ops.training.tasks.parts.questions import Question
from svitt_ops.training.tasks.parts.sharing import share_clips

log = logging.getLogger(__name__)


def report_without_class(questions: Sequence[Question], classes: Sequence[str]) -> None:
    """Say how many questions teach only that every class is wrong."""
    known = set(classes)
    count = sum(not known & set(question.answers) for question in questions)
    if count:
        log.warning(
            "%d of %d questions have no answer in the list of answers", count, len(questions)
        )


@dataclass(frozen=True, kw_only=True)
class AnswerClassCollator(Collator):
    """Makes a batch of questions; their answers are scores of classes."""

    classes: Mapping[str, int] = field(default_factory=dict)
    """Their numbers."""
    share_clips: bool = False
    """Whether questions about a video have the same clip, which the batch then holds once."""

    def __call__(self, clips: Sequence[Any]) -> Batch:
        batch = super().__call__(clips)
        if self.share_clips:
            share_clips(batch, [(clip.pair_id, clip.seed) for clip in clips])
        targets = torch.zeros(len(clips), len(self.classes))
        for row, clip in zip(targets, clips, strict=True):
            for answer, score in zip(clip.answers, clip.weights, strict=True):
                if answer in self.classes:
                    row[self.classes[answer]] = score
        return batch | {"targets": targets}


@dataclass(frozen=True)
class Choices:
    """The answers of a closed list that a model has classes for."""

    places: Tensor  # int64 (k,), in the list
    classes: Tensor  # int64 (k,)

    @classmethod
    def of(cls, answers: Sequence[str], classes: Sequence[str]) -> Choices:
        """Those of a list, of which others can not be chosen; a ValueError if there are none."""
        numbers = {answer: number for number, answer in enumerate(classes)}
        known = [(place, numbers[x]) for place, x in enumerate(answers) if x in numbers]
        if not known:
            raise ValueError(
                f"qa: the list of answers must hold classes of the model, none of {len(answers)} is"
                f" one; the first: {answers[0]!r}, the model's: {classes[0]!r}"
            )
        if len(known) < len(answers):
            log.warning(
                "qa: %d of %d answers to choose from are no classes of the model, and never chosen",
                len(answers) - len(known),
                len(answers),
            )
        places, those = zip(*known, strict=True)
        return cls(torch.tensor(places), torch.tensor(those))

    def best(self, scores: Tensor) -> Tensor:
        """Places of the best answers by scores ``(questions, classes)``; of ties the first."""
        ranked = scores.cpu()[:, self.classes].sort(dim=1, descending=True, stable=True)
        return self.places[ranked.indices[:, 0]]

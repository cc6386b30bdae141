"""Questions about videos, and closed lists of answers: as files, as tokens and as batches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.data.annotations import Entry, Form, Record
from svitt_ops.training.data.collate import Collator
from svitt_ops.training.data.columns import Strings
from svitt_ops.training.data.datasets import Clip, PairDataset
from svitt_ops.training.data.paths import expand
from svitt_ops.training.data.transport import Batch
from svitt_ops.training.tasks.parts.sharing import share_clips
from svitt_ops.training.tasks.parts.vqa import LEAST

TYPE = ("question_type", "type")
"""Fields of what kind of question it is; without them its first word says it."""
FIRST_WORDS = ("what", "who", "how", "when", "where", "why", "which", "is", "are", "do", "does")
OTHER = "other"
VISUAL_GENOME, ITS_WEIGHT = "vg", 0.5
"""Value of the field `dataset` of questions that ALBEF trains on besides VQA's; their weight."""
SCORE = 0.3
"""Of an answer, for each of the people who gave it, up to 1."""


@dataclass(frozen=True, kw_only=True)
class Question(Entry):
    """A question about one video; its `captions` are the clean question."""

    answers: tuple[str, ...]
    """Each once, as `clean_answer` has it."""
    weights: tuple[float, ...]
    """Of each answer, its share of those that were given; half of it for those of Visual Genome."""
    counts: tuple[int, ...]
    """Of each answer, how many people gave it."""
    type: str
    place: str
    """Where it stands."""


def _question(record: Record) -> Question:
    media = record.media
    if len(media) != 1:
        raise ValueError(f"must name one file, got {len(media)}")
    field = record.field("question")
    asked = record.clean([record.whole(text, field) for text in record.texts(field)], field)
    if len(asked) != 1:
        raise ValueError(f"field 'question' must be one text, got {len(asked)}")
    answers = [clean_answer(text) for text in record.options(record.field("answer"))]
    if not all(answers):
        raise ValueError("field 'answer' has no words")
    counts = Counter(answers)
    weight = ITS_WEIGHT if record.content.get("dataset") == VISUAL_GENOME else 1.0
    return Question(
        media=media,
        captions=asked,
        kind=record.kind,
        together=record.together,
        answers=tuple(counts),
        weights=tuple(weight * count / len(answers) for count in counts.values()),
        counts=tuple(counts.values()),
        type=_type_of(record, asked[0]),
        place=record.place,
    )


QUESTIONS = Form(texts=("question",), parse=_question)


def clean_answer(text: str) -> str:
    """An answer as it is compared: lower-case, without spaces that do not count."""
    return " ".join(text.lower().split())


def read_answers(path: str | Path, name: str = "answers") -> list[str]:
    """A closed list of answers, each once: a JSON list of texts, or one answer a line.

    Args:
        path: the file.
        name: of the key or the option, which errors begin with.

    Raises:
        ValueError: the file cannot be read, or holds no such list, or an empty one.
    """
    file = expand(path, name)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{name}: {file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {file}: must be UTF-8 ({error.reason})") from error
    content: object = text.splitlines()
    if text.lstrip()[:1] in ("[", "{"):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: {file}: must be JSON, but {error}") from None
    if not isinstance(content, list):
        raise ValueError(f"{name}: {file}: must be a list of texts, got {type(content).__name__}")
    for number, answer in enumerate(content):
        if not isinstance(answer, str):
            kind = type(answer).__name__
            raise ValueError(f"{name}: {file}: answer {number} must be text, got {kind}")
    answers = [*dict.fromkeys(filter(None, map(clean_answer, content)))]
    if not answers:
        raise ValueError(f"{name}: {file}: must hold at least one answer, got none")
    return answers


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, answers: Sequence[str], length: int
) -> tuple[Tensor, Tensor]:
    """Answers as [CLS], pieces, [SEP], and their mask: int64 ``(answers, tokens)``.

    Longer ones than `length` tokens are cut, [SEP] first, as the released SViTT does. They do not
    depend on whether the tokenizer's other texts end with [SEP].
    """
    end = tokenizer.sep_token
    pieces = tokenizer([f"{text} {end}" for text in answers], add_special_tokens=False)["input_ids"]
    rows = [[tokenizer.cls_token_id, *row][:length] for row in pieces]
    ids = torch.full((len(rows), max(map(len, rows))), int(tokenizer.pad_token_id))
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask


def soft_scores(question: Question) -> tuple[float, ...]:
    """How right each answer is: 0.3, 0.6, 0.9 or 1 by the people who gave it.

    Of fewer than four people, who cannot make an answer wholly right, it is their share.
    """
    people = sum(question.counts)
    if people < LEAST:
        return tuple(count / people for count in question.counts)
    return tuple(min(1.0, SCORE * count) for count in question.counts)


@dataclass
class QuestionClip(Clip):
    """A question with its clip and its answers."""

    answers: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.caption, *self.answers)


class QuestionDataset(PairDataset):
    """Questions to train on.

    Args:
        share_clips: give all questions about a video the same clip in an epoch.
        soft: weigh answers by `soft_scores`, not by their share.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        *given: Any,
        share_clips: bool = False,
        soft: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(questions, *given, **more)
        self.share_clips = share_clips
        counts = [len(question.answers) for question in questions]
        self._first: NDArray[np.int64] = np.cumsum([0, *counts])
        self._answers = Strings(text for question in questions for text in question.answers)
        weights = [
            weight
            for question in questions
            for weight in (soft_scores(question) if soft else question.weights)
        ]
        self._weights = np.array(weights, dtype=np.float32)

    def draws_as(self, number: int) -> int:
        return int(self._ids[number]) if self.share_clips else number

    def read(self, number: int, seed: int, skipped: list[tuple[str, str]]) -> QuestionClip:
        clip = super().read(number, seed, skipped)
        mine = slice(*self._first[number : number + 2].tolist())
        weights = tuple(self._weights[mine].tolist())
        return QuestionClip(**vars(clip), answers=self._answers[mine], weights=weights)


@dataclass(frozen=True, kw_only=True)
class QuestionCollator(Collator):
    """Makes a batch of questions."""

    answer_length: int = 5
    """Longest answer, in tokens."""
    share_clips: bool = False
    """Whether questions about a video have the same clip, which the batch then holds once."""

    def __call__(self, clips: Sequence[Any]) -> Batch:
        batch = super().__call__(clips)
        if self.share_clips:
            share_clips(batch, [(clip.pair_id, clip.seed) for clip in clips])
        answers = [answer for clip in clips for answer in clip.answers]
        ids, mask = encode_answers(self.tokenizer, answers, self.answer_length)
        return batch | {
            "answer_ids": ids,
            "answer_mask": mask,
            "answers_per_question": torch.tensor([len(clip.answers) for clip in clips]),
            "answer_weights": torch.tensor([w for clip in clips for w in clip.weights]),
        }


def _type_of(record: Record, question: str) -> str:
    for name in TYPE:
        if record.content.get(name) is not None:
            return str(record.content[name])
    first = question.split()[0]
    return first if first in FIRST_WORDS else OTHER

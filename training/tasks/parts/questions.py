"""Questions about videos, and closed lists of answers: as files and as tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.data.annotations import Entry, Form, Record
from svitt_ops.training.data.paths import expand

TYPE = ("question_type", "type")
"""Fields of what kind of question it is; without them its first word says it."""
FIRST_WORDS = ("what", "who", "how", "when", "where", "why", "which", "is", "are", "do", "does")
OTHER = "other"
VISUAL_GENOME, ITS_WEIGHT = "vg", 0.5
"""Value of the field `dataset` of questions that ALBEF trains on besides VQA's; their weight."""


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


def _type_of(record: Record, question: str) -> str:
    for name in TYPE:
        if record.content.get(name) is not None:
            return str(record.content[name])
    first = question.split()[0]
    return first if first in FIRST_WORDS else OTHER

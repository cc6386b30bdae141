"""Multiple choice: which of several texts is that of a video; trained as retrieval is, on pairs."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.data.annotations import CAPTION, Entry, Form, Record
from svitt_ops.training.data.collate import count_cut, encode_texts
from svitt_ops.training.engine import recipes
from svitt_ops.training.engine.build import read_corpora, report_left_out
from svitt_ops.training.engine.gate import check_batches
from svitt_ops.training.engine.settings import RunSettings
from svitt_ops.training.tasks.parts.asking import Asking, those_without
from svitt_ops.training.tasks.parts.checks import check_finite
from svitt_ops.training.tasks.parts.evaluation import ClipEvaluation, Reading, evaluating
from svitt_ops.training.tasks.parts.probing import by_order, delta_lines, under_options
from svitt_ops.training.tasks.parts.ranks import are_first
from svitt_ops.training.tasks.parts.table import format_rows, left_out_lines
from svitt_ops.training.tasks.pretrain import build_dataset, model_inputs
from svitt_ops.training.tasks.retrieval import build_collator

__all__ = ["build_collator", "build_dataset", "model_inputs"]  # and those that are written here
HEAD = "multiple_choice"
OPTIONS = {"clips": 1, "strided": False, "merge": "logsumexp", "probe": False}


@dataclass(frozen=True, kw_only=True)
class Choice(Entry):
    """Texts of which one is that of a video: the only one of its `captions`."""

    options: tuple[str, ...]
    """Clean, the right one among them."""
    answer: int
    """Number of the right one."""
    place: str
    """Where it stands."""


def _choice(record: Record) -> Choice:
    media = record.media
    if len(media) != 1:
        raise ValueError(f"must name one file, got {len(media)}")
    name = record.field(*CAPTION)
    options = [record.clean([text], name)[0] for text in record.options(name)]
    if len(options) < 2:
        raise ValueError(f"field {name!r} must be several texts, got {len(options)}")
    answer = _number(record)
    if not 0 <= answer < len(options):
        raise ValueError(f"field 'answer' must be 0 to {len(options) - 1}, got {answer}")
    return Choice(
        media=media,
        captions=(options[answer],),
        kind=record.kind,
        together=record.together,
        options=tuple(options),
        answer=answer,
        place=record.place,
    )


def _number(record: Record) -> int:
    value = record.content[record.field("answer")]
    if isinstance(value, str) and value.strip().isdecimal():  # of a table
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"field 'answer' must be the number of a text, got {value!r}")
    return value


FORM = Form(texts=CAPTION, parse=_choice)


@dataclass
class Recipe(recipes.Recipe):
    """Fine-tuning on the right texts, by the contrastive and the matching loss."""

    task: str = "multiple_choice"
    evaluation: ClipEvaluation = field(default_factory=ClipEvaluation)
    """How the texts of `data.validation` are chosen, and those of a test by default."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Choices among as many texts each."""

    choices: list[Choice]
    left_out: list[str]
    """Why the others cannot be used."""
    options: int
    """Texts of each."""

    @classmethod
    def of(cls, choices: Sequence[Choice]) -> Choices:
        """Those that have as many texts as most."""
        counts = Counter(len(choice.options) for choice in choices)
        wanted, count = counts.most_common(1)[0]
        left_out = [
            f"{choice.place}: has {len(choice.options)} texts where {count} have {wanted}"
            for choice in choices
            if len(choice.options) != wanted
        ]
        report_left_out(left_out, len(choices), "multiple_choice")
        kept = [choice for choice in choices if len(choice.options) == wanted]
        return cls(choices=kept, left_out=left_out, options=wanted)


def read_examples(recipe: recipes.Recipe) -> list[Choice]:
    """The choices of all training corpora."""
    found = Choices.of(read_corpora(recipe.data.train, recipe.data, "train", FORM)).choices
    check_batches(found, recipe.optimizer.batch_size // recipe.optimizer.accumulation)
    return found


def read_validation(recipe: recipes.Recipe) -> Choices:
    """The choices."""
    return Choices.of(read_corpora(recipe.data.validation, recipe.data, "validation", FORM))


def validate(
    recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerBase, examples: Choices
) -> dict[str, float]:
    """The accuracy."""
    settings, reading = recipe.evaluation, Reading.of_recipe(recipe)
    found = choose(model, tokenizer, examples, settings=settings, reading=reading)
    return {"score": found["accuracy"], "accuracy": found["accuracy"]}


def choose(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Choices,
    *,
    settings: ClipEvaluation | None = None,
    reading: Reading | None = None,
    order: str = "normal",
    without: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Choose by the match head: the share of right choices; a tie is a wrong one.

    Args:
        model: in whatever mode; evaluated in eval mode.
        tokenizer: the model's.
        examples: what to choose among.
        settings: clips, and their merging.
        reading: of clips and texts.
        order: of the frames, see `sampling.reorder`.
        without: files to leave out.

    Returns:
        `accuracy` and `chance` in percent; numbers of `questions`, `videos` and `options`;
        `skipped` and `left_out`, with reasons; `texts_cut`, those longer than may be.

    Raises:
        ValueError: the match head was not trained; no video can be read; scores are not finite.
    """
    settings, reading = settings or ClipEvaluation(), reading or Reading()
    if not model.config.weights["vtm"]:
        raise ValueError(
            "multiple_choice: the model's match head must be trained, its loss has weight 0"
        )
    choices = those_without(examples.choices, without or {})
    asking = Asking("multiple_choice", choices, settings, reading)
    right: list[bool] = []
    with evaluating(model, bf16=reading.bf16):
        for numbers, states in asking(model, order, examples.options):
            some = [choices[k] for k in numbers]
            scores = _scores(model, tokenizer, some, states, settings, reading)
            right += _are_right(scores, some).tolist()
    texts = [text for choice in choices for text in choice.options]
    return {
        "accuracy": 100 * sum(right) / len(right),
        "chance": 100 / examples.options,
        "questions": len(right),
        "options": examples.options,
        **asking.facts(),
        "texts_cut": count_cut(tokenizer, texts, reading.text_length),
        "left_out": examples.left_out,
    }


def _scores(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    choices: list[Choice],
    states: Tensor,
    settings: ClipEvaluation,
    reading: Reading,
) -> Tensor:
    texts = [text for choice in choices for text in choice.options]
    inputs = encode_texts(tokenizer, texts, reading.text_length, "longest")
    ids, mask = (t.to(states.device).unflatten(0, (len(choices), -1)) for t in inputs.values())
    scores: Tensor = model.choose(states, ids, mask, merge=settings.merge).scores
    what = "multiple_choice: match scores"
    check_finite(scores, what, lambda k: f"those of {choices[k].place}")
    return scores


def _are_right(scores: Tensor, choices: Sequence[Choice]) -> Tensor:
    answers = torch.tensor([choice.answer for choice in choices], device=scores.device)
    return are_first(scores, answers)


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Choice],
    reading: RunSettings,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What `choose` finds, under `--probe` in every frame order."""
    found = Choices.of(examples)

    def run(order: str, without: Mapping[str, str]) -> dict[str, Any]:
        return choose(
            model,
            tokenizer,
            found,
            settings=ClipEvaluation.of(options),
            reading=Reading.of(reading, options),
            order=order,
            without=without,
        )

    return under_options(run, options)


def render(facts: dict[str, Any]) -> str:
    """The accuracy, under `--probe` of every frame order."""
    orders = by_order(facts)
    first = next(iter(orders.values()))
    rows = [("", "accuracy"), *((k, f"{v['accuracy']:.1f}") for k, v in orders.items())]
    rows.append(("chance", f"{first['chance']:.1f}"))
    counts = f"{first['questions']} choices among {first['options']} texts"
    lines = [f"{counts}, {first['videos']} videos", *format_rows(rows), *delta_lines(facts)]
    if cut := first["texts_cut"]:
        lines.append(f"{cut} texts are longer than the text length, and cut")
    return "\n".join([*lines, *left_out_lines(first["skipped"])])

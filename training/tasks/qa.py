"""Questions about videos, whose answers a decoder writes, or which are classes of the model."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.models.parts.clips import join_clips
from svitt_ops.models.parts.configuration import VideoConfig
from svitt_ops.models.systems import load_system
from svitt_ops.training.data.collate import Collator, count_cut, encode_texts
from svitt_ops.training.engine import recipes
from svitt_ops.training.engine.build import read_corpora, report_left_out
from svitt_ops.training.engine.gate import check_batches
from svitt_ops.training.engine.settings import RunSettings
from svitt_ops.training.tasks import pretrain
from svitt_ops.training.tasks.parts.answer_classes import (
    AnswerClassCollator,
    Choices,
    report_without_class,
)
from svitt_ops.training.tasks.parts.asking import Asking, those_without
from svitt_ops.training.tasks.parts.checks import check_finite
from svitt_ops.training.tasks.parts.evaluation import Evaluation, Reading, evaluating
from svitt_ops.training.tasks.parts.probing import by_order, delta_lines, under_options
from svitt_ops.training.tasks.parts.questions import (
    QUESTIONS,
    Question,
    QuestionCollator,
    QuestionDataset,
    encode_answers,
    read_answers,
)
from svitt_ops.training.tasks.parts.table import format_rows, left_out_lines
from svitt_ops.training.tasks.parts.training import clip_spec, collator
from svitt_ops.training.tasks.parts.vqa import LEAST, best_constant, vqa_accuracy

HEAD = "question_answering"
FORM = QUESTIONS
OPTIONS = {
    **{"clips": 1, "strided": False, "merge": "logsumexp", "top_k": 128, "probe": False},
    **{"answers": None, "answer_length": 5, "metric": "exact"},
}
INPUTS = (
    *("input_ids", "attention_mask", "answer_ids", "answer_mask"),
    *("answers_per_question", "answer_weights", "clip_numbers", "targets"),
)
METRICS = ("exact", "vqa")
SHORTEST_ANSWER = 2  # [CLS], one piece


@dataclass
class Data(recipes.Data):
    """What is read; `text_length` is that of the questions."""

    answers: str | None = field(default=None, metadata=recipes.PATH)
    """The closed list that answers are ranked in: a JSON list, or one a line; not for training,
    but where they are the model's classes."""
    text_length: int = 25
    answer_length: int = 5
    """Tokens of the longest answer, [CLS] and [SEP] among them; longer ones are cut."""
    share_clips: bool = False
    """Encode one clip for all questions of a batch about a video, such as `keep_together` makes
    meet; otherwise each question has a clip of its own, of other frames."""


@dataclass(kw_only=True)
class QuestionEvaluation(Evaluation):
    """The same, and what counts as right."""

    metric: str = "exact"
    """"exact": an answer that anybody gave, or "vqa": the more people gave it, VQA's accuracy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in METRICS:
            known = ", ".join(METRICS)
            raise ValueError(f"evaluation: metric must be one of {known}, got {self.metric!r}")


@dataclass
class Recipe(recipes.Recipe):
    """Fine-tuning for questions."""

    task: str = "qa"
    data: Data = field(default_factory=Data)
    evaluation: QuestionEvaluation = field(default_factory=QuestionEvaluation)
    """How the questions of `data.validation` are answered, and those of a test by default."""


def check(recipe: Recipe) -> None:
    """Refuse answers without room for a word, and what needs a list of answers without one."""
    data = recipe.data
    if data.answer_length < SHORTEST_ANSWER:
        raise ValueError(
            f"recipe: data.answer_length must be at least {SHORTEST_ANSWER},"
            f" got {data.answer_length}"
        )
    if data.validation and data.answers is None:
        raise ValueError(
            "recipe: data.answers must be a file of the answers that data.validation is asked for,"
            " got null"
        )
    if _chooses(recipe) and data.answers is None:
        raise ValueError(
            f"recipe: data.answers must be a file of the answers that are {recipe.system}'s"
            " classes, got null"
        )


def _chooses(recipe: Recipe) -> bool:
    """Whether answers are classes of the system's model."""
    return hasattr(load_system(recipe.system).models[HEAD], "answer_scores")


def model_fields(recipe: Recipe) -> dict[str, Any]:
    """The answers of a model that has them as classes."""
    if not _chooses(recipe):
        return {}
    assert recipe.data.answers is not None
    return {"answers": read_answers(recipe.data.answers, "recipe: data.answers")}


def read_examples(recipe: Recipe) -> list[Question]:
    """The questions of all training corpora."""
    questions = read_corpora(recipe.data.train, recipe.data, "train", QUESTIONS)
    if answers := model_fields(recipe).get("answers"):
        report_without_class(questions, answers)
    check_batches(questions, recipe.optimizer.batch_size // recipe.optimizer.accumulation)
    return questions


def build_dataset(
    recipe: Recipe, examples: Sequence[Question], config: VideoConfig
) -> QuestionDataset:
    """The training questions."""
    return QuestionDataset(
        examples,
        clip_spec(recipe, config),
        seed=recipe.seed,
        share_clips=recipe.data.share_clips,
        soft=_classes(config) is not None,
    )


def _classes(config: Any) -> list[str] | None:
    """The answers that are a model's classes."""
    return getattr(config, "answers", None)


def build_collator(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any) -> Collator:
    """The collator."""
    data, classes = recipe.data, _classes(config)
    if classes is not None:
        numbers = {answer: number for number, answer in enumerate(classes)}
        of_classes = {"classes": numbers, "share_clips": data.share_clips}
        return collator(AnswerClassCollator, recipe, tokenizer, **of_classes)
    more = {"answer_length": data.answer_length, "share_clips": data.share_clips}
    return collator(QuestionCollator, recipe, tokenizer, **more)


def model_inputs(recipe: Recipe, config: VideoConfig, batch: dict[str, Any]) -> dict[str, Any]:
    """Pictures of the model's size, questions and answers."""
    return pretrain.model_inputs(recipe, config, batch, INPUTS)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Questions that can be answered from a closed list."""

    questions: list[Question]
    answers: list[str]
    left_out: list[str]
    """Why the others cannot."""

    @classmethod
    def of(cls, questions: Sequence[Question], answers: list[str]) -> Asked:
        """Those of the questions whose answer is in the list."""
        known = set(answers)
        kept = [question for question in questions if known & set(question.answers)]
        left_out = [
            f"{question.place}: answer {question.answers[0]!r} is not in the list of answers"
            for question in questions
            if not known & set(question.answers)
        ]
        report_left_out(left_out, len(questions), "qa")
        if not kept:
            raise ValueError(f"qa: no question has an answer in the list; the first: {left_out[0]}")
        return cls(questions=kept, answers=answers, left_out=left_out)


def read_validation(recipe: Recipe) -> Asked:
    """The questions, and the answers to choose from."""
    data = recipe.data
    assert data.answers is not None
    questions = read_corpora(data.validation, data, "validation", QUESTIONS)
    return Asked.of(questions, read_answers(data.answers, "recipe: data.answers"))


def validate(
    recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerBase, examples: Asked
) -> dict[str, float]:
    """Accuracies; the score is that of all questions."""
    found = answer_questions(
        model,
        tokenizer,
        examples,
        settings=recipe.evaluation,
        reading=Reading.of_recipe(recipe),
        answer_length=recipe.data.answer_length,
        metric=recipe.evaluation.metric,
    )
    of_types = {f"accuracy_{name}": row["accuracy"] for name, row in found["by_type"].items()}
    return {"score": found["accuracy"], "accuracy": found["accuracy"], **of_types}


def answer_questions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    *,
    settings: Evaluation | None = None,
    reading: Reading | None = None,
    answer_length: int = 5,
    metric: str = "exact",
    order: str = "normal",
    seed: int = 0,
    without: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Answer questions from a closed list: the share of right first answers.

    Args:
        model: in whatever mode; evaluated in eval mode.
        tokenizer: the model's.
        asked: questions and answers.
        settings: clips, their merging, and `top_k`, the answers that are decoded whole; 0: all.
        reading: of clips and questions.
        answer_length: longest answer, in tokens.
        metric: what counts as right, see `QuestionEvaluation`.
        order: of the frames, see `sampling.reorder`.
        seed: of shuffled orders.
        without: files to leave out.

    Returns:
        `accuracy` in percent, also counting questions whose answer is not in the list as wrong
        (`accuracy_all`); `by_type`, with the number of `questions`; `chance`, of the best constant
        answer; numbers of `questions`, `videos`, `answers`; `skipped` and `left_out`, with reasons;
        `texts_cut` and `answers_cut`, those longer than may be.

    Raises:
        ValueError: no video can be read; scores are not finite.
    """
    settings, reading = settings or Evaluation(), reading or Reading()
    questions = those_without(asked.questions, without or {})
    _check_people(questions, metric)
    asking = Asking("qa", questions, settings, reading)
    chosen = torch.full((len(questions),), -1)
    classes = _classes(model.config)
    with evaluating(model, bf16=reading.bf16) as device:
        answers: Any
        if classes is None:
            ids, mask = encode_answers(tokenizer, asked.answers, answer_length)
            answers = (ids.to(device), mask.to(device))
        else:
            answers = Choices.of(asked.answers, classes)
        for numbers, states in asking(model, order, seed=seed):
            texts = [questions[k].captions[0] for k in numbers]
            found = _rank(model, tokenizer, texts, states, answers, settings, reading)
            chosen[numbers] = found.cpu()
    texts = [question.captions[0] for question in questions]
    cut = 0
    if classes is None:
        cut = int((_full_lengths(tokenizer, asked.answers) > answer_length).sum())
    return {
        **_facts(questions, chosen, asked, metric),
        **asking.facts(),
        "texts_cut": count_cut(tokenizer, texts, reading.text_length),
        "answers_cut": cut,
        "left_out": asked.left_out,
    }


def _rank(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    states: Tensor,
    answers: Choices | tuple[Tensor, Tensor],
    settings: Evaluation,
    reading: Reading,
) -> Tensor:
    """The number of the best answer to each question."""
    inputs = encode_texts(tokenizer, questions, reading.text_length, "longest")
    ids, attended = (t.to(states.device) for t in inputs.values())
    clips = join_clips(states, settings.merge)
    if isinstance(answers, Choices):
        scores = model.answer_scores(ids, attended, clips, merge=settings.merge)
        check_finite(scores, "qa: scores of answers", lambda k: f"those of {questions[k]!r}")
        return answers.best(scores)
    read = model.encode_questions(ids, attended, clips)
    ranking = model.rank_answers(
        read,
        attended,
        *answers,
        k=settings.top_k or len(answers[0]),
        merge=settings.merge,
    )
    check_finite(ranking.scores, "qa: scores of answers", lambda k: f"those of {questions[k]!r}")
    best: Tensor = ranking.answers[:, 0]
    return best


def _full_lengths(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> Tensor:
    """Tokens of answers, [CLS] and [SEP] among them."""
    return encode_answers(tokenizer, answers, 10**6)[1].sum(1)


def _facts(
    questions: Sequence[Question], chosen: Tensor, asked: Asked, metric: str
) -> dict[str, Any]:
    """Accuracies of the questions that were answered."""
    answered = [k for k, number in enumerate(chosen.tolist()) if number >= 0]
    right, chance = _score(
        [questions[k] for k in answered], [asked.answers[int(chosen[k])] for k in answered], metric
    )
    types: dict[str, list[float]] = {}
    for k, score in zip(answered, right, strict=True):
        types.setdefault(questions[k].type, []).append(score)
    total = sum(right)
    return {
        "accuracy": 100 * total / len(answered),
        "accuracy_all": 100 * total / (len(answered) + len(asked.left_out)),
        "by_type": {
            name: {"accuracy": 100 * sum(found) / len(found), "questions": len(found)}
            for name, found in sorted(types.items())
        },
        "chance": 100 * chance,
        "questions": len(answered),
        "answers": len(asked.answers),
    }


def _check_people(questions: Sequence[Question], metric: str) -> None:
    """Refuse a metric that is none, or that asks for more answers to a question than it has."""
    if metric not in METRICS:
        raise ValueError(f"qa: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    few = [question for question in questions if sum(question.counts) < LEAST]
    if metric == "vqa" and few:
        raise ValueError(
            f"qa: the metric vqa needs the answers of at least {LEAST} people to every question,"
            f" got {sum(few[0].counts)} in {few[0].place}"
        )


def _score(
    questions: Sequence[Question], answers: Sequence[str], metric: str
) -> tuple[list[float], float]:
    """How right each answer is, and the best constant answer in the mean, from 0 to 1."""
    if metric == "vqa":
        given = [dict(zip(q.answers, q.counts, strict=True)) for q in questions]
        scores = [vqa_accuracy(*pair) for pair in zip(answers, given, strict=True)]
        return scores, best_constant(given)[1]
    known = Counter(answer for question in questions for answer in question.answers)
    right = [
        float(answer in question.answers)
        for answer, question in zip(answers, questions, strict=True)
    ]
    return right, max(known.values()) / len(questions)


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Question],
    reading: RunSettings,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What `answer_questions` finds, under `--probe` in every frame order."""
    answers = _classes(model.config)
    if options.answers is not None:
        answers = read_answers(options.answers, "--answers")
    if answers is None:
        raise ValueError("--answers: must be a file of the answers to choose from, got none")
    asked = Asked.of(examples, answers)

    def run(order: str, without: Mapping[str, str]) -> dict[str, Any]:
        return answer_questions(
            model,
            tokenizer,
            asked,
            settings=Evaluation.of(options),
            reading=Reading.of(reading, options),
            answer_length=options.answer_length,
            metric=options.metric,
            order=order,
            without=without,
        )

    return under_options(run, options)


def render(facts: dict[str, Any]) -> str:
    """Accuracies by type and of all, or of all in every frame order."""
    orders = by_order(facts)
    first = next(iter(orders.values()))
    lines = [f"{first['questions']} questions about {first['videos']} videos"]
    lines[0] += f", {first['answers']} answers to choose from"
    rows: list[tuple[str, ...]] = [("", "accuracy", "questions")]
    types = first["by_type"] if first is facts else {}
    for name, row in (*types.items(), *orders.items()):
        rows.append((name, f"{row['accuracy']:.1f}", str(row["questions"])))
    rows.append(("always the commonest answer", f"{first['chance']:.1f}", ""))
    lines += [*format_rows(rows), *delta_lines(facts)]
    if first["left_out"]:
        missing = f"{len(first['left_out'])} more have an answer that is not in the list"
        lines.append(f"{missing}; {first['accuracy_all']:.1f} if they count as wrong")
    for key, what in (("texts_cut", "questions"), ("answers_cut", "answers")):
        if first[key]:
            lines.append(f"{first[key]} of {first[what]} {what} are too long, and cut")
    return "\n".join([*lines, *left_out_lines(first["skipped"])])

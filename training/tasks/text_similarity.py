"""Semantic textual similarity (STS): do embeddings of texts agree with people's judgement?

Models are evaluated as they are; nothing is trained for it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.data.annotations import Entry, Form, Record
from svitt_ops.training.data.collate import count_cut
from svitt_ops.training.engine.settings import RunSettings
from svitt_ops.training.tasks.parts.correlation import pearson, spearman
from svitt_ops.training.tasks.parts.encoding import encode_gallery_texts
from svitt_ops.training.tasks.parts.evaluation import evaluating
from svitt_ops.training.tasks.parts.table import format_rows

HEAD = "retrieval"
OPTIONS = {"join": "concatenated"}
JOINS = ("concatenated", "mean")
FIRST = ("sentence1", "text1", "caption1")
SECOND = ("sentence2", "text2", "caption2")
SCORE = ("score", "label", "similarity", "similarity_score", "relatedness_score")
SET = ("set", "genre", "dataset")


@dataclass(frozen=True, kw_only=True)
class ScoredPair(Entry):
    """Two texts, its `captions`, and how similar people find them."""

    score: float
    file: str
    """Path of its file."""
    set: str
    """What it belongs to within the file."""


def _pair(record: Record) -> ScoredPair:
    texts = []
    for names in (FIRST, SECOND):
        name = record.field(*names)
        whole = [record.whole(text, name) for text in record.texts(name)]
        if len(whole) != 1:
            raise ValueError(f"field {name!r} must be one text, got {len(whole)}")
        texts += record.clean(whole, name)
    name = record.field(*SCORE)
    value = record.content[name]
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"field {name!r} must be a number, got {value!r:.80}")
    group = next((record.content[name] for name in SET if name in record.content), "")
    return ScoredPair(
        media=(),
        captions=tuple(texts),
        kind="video",
        score=score,
        file=record.place.rpartition(": ")[0],
        set=str(group),
    )


FORM = Form(texts=FIRST, parse=_pair, media=SECOND)


def similarity_scores(cosine: Tensor, scores: Tensor) -> dict[str, float]:
    """Correlations of similarities with people's scores, in percent; the `score` is their mean."""
    found = {"pearson": 100 * pearson(cosine, scores), "spearman": 100 * spearman(cosine, scores)}
    return {"score": (found["pearson"] + found["spearman"]) / 2, **found}


def text_similarity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[ScoredPair],
    *,
    text_length: int = 32,
    join: str = "concatenated",
    bf16: bool = False,
) -> dict[str, Any]:
    """Correlation of the cosines of texts' embeddings with people's scores.

    Args:
        model: in whatever mode; evaluated in eval mode.
        tokenizer: the model's.
        pairs: of any files and sets.
        text_length: longest text, in tokens.
        join: how the sets of a file become a number: "concatenated", one correlation of all pairs,
            or the "mean" of the sets' own.
        bf16: run the text tower under autocast.

    Returns:
        `score`, the mean of Pearson's and Spearman's correlation in percent, `pearson` and
        `spearman`: means over the files; `by_file`, the same of each, with its number of `pairs`,
        by its name without the suffix, or, where several have that, by its path; `pairs`,
        `texts_cut`, and `chance`, 0.

    Raises:
        ValueError: embeddings are not finite; all scores, or all cosines, of a set are equal.
    """
    if join not in JOINS:
        raise ValueError(f"join must be one of {', '.join(JOINS)}, got {join!r}")
    texts = list(dict.fromkeys(text for pair in pairs for text in pair.captions))
    with evaluating(model, bf16=bf16):
        embeds = encode_gallery_texts(
            model, tokenizer, texts, text_length=text_length, keep_states=False
        ).embeds.double()
    number = {text: k for k, text in enumerate(texts)}
    sides = [embeds[[number[pair.captions[k]] for pair in pairs]] for k in (0, 1)]
    cosine = torch.cosine_similarity(*sides).cpu()
    gold = torch.tensor([pair.score for pair in pairs], dtype=torch.float64)
    by_file = {}
    paths = list(dict.fromkeys(pair.file for pair in pairs))
    stems = [Path(path).stem for path in paths]
    for path, stem in zip(paths, stems, strict=True):
        file = stem if stems.count(stem) == 1 else path
        rows = [k for k, pair in enumerate(pairs) if pair.file == path]
        sets = {file: rows}
        if join == "mean":
            names = dict.fromkeys(pairs[k].set for k in rows)
            sets = {name: [k for k in rows if pairs[k].set == name] for name in names}
        parts = []
        for name, some in sets.items():
            try:
                parts.append(similarity_scores(cosine[some], gold[some]))
            except ValueError as error:
                raise ValueError(f"text-similarity: {file} {name}: {error}") from error
        by_file[file] = {**_mean(parts), "pairs": len(rows)}
    return {
        **_mean(list(by_file.values())),
        "by_file": by_file,
        "chance": 0.0,
        "pairs": len(pairs),
        "texts_cut": count_cut(tokenizer, texts, text_length),
    }


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[ScoredPair],
    reading: RunSettings,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What `text_similarity` finds."""
    return text_similarity(
        model,
        tokenizer,
        examples,
        text_length=reading.text_length,
        join=options.join,
        bf16=options.bf16,
    )


def render(facts: dict[str, Any]) -> str:
    """The correlations, by file and of all."""
    rows: list[tuple[str, ...]] = [("", "score", "Pearson", "Spearman", "pairs")]
    for name, row in (*facts["by_file"].items(), ("mean of files", facts)):
        numbers = (f"{row[key]:.1f}" for key in ("score", "pearson", "spearman"))
        rows.append((name, *numbers, str(row["pairs"])))
    lines = format_rows(rows)
    if cut := facts["texts_cut"]:
        lines.append(f"{cut} texts are longer than the text length, and cut")
    return "\n".join(lines)


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = ("score", "pearson", "spearman")
    return {key: sum(one[key] for one in found) / len(found) for key in keys}

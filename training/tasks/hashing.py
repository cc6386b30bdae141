"""Hashing: images of the same classes get similar binary codes (CSQ), and find each other."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.models.parts.configuration import VideoConfig
from svitt_ops.training.data.annotations import Entry, Form, Record
from svitt_ops.training.data.augment import to_pixel_values
from svitt_ops.training.data.collate import Collator
from svitt_ops.training.data.columns import Strings
from svitt_ops.training.data.datasets import Clip, PairDataset
from svitt_ops.training.data.transport import Batch
from svitt_ops.training.engine import recipes
from svitt_ops.training.engine.build import read_corpora
from svitt_ops.training.engine.gate import check_batches
from svitt_ops.training.engine.settings import RunSettings
from svitt_ops.training.tasks import pretrain
from svitt_ops.training.tasks.parts.average_precision import average_precisions
from svitt_ops.training.tasks.parts.checks import check_finite
from svitt_ops.training.tasks.parts.evaluation import Reading, evaluating
from svitt_ops.training.tasks.parts.pictures import PictureEvaluation, Unread, read_pictures
from svitt_ops.training.tasks.parts.table import format_rows, left_out_lines
from svitt_ops.training.tasks.parts.training import clip_spec, collator

HEAD = "hashing"
OPTIONS = {"database": None, "top_k": 0}
LABELS = ("labels", "classes", "label")
CHANCE_SEED = 0
SEPARATOR = "\0"


@dataclass(frozen=True, kw_only=True)
class ClassedImage(Entry):
    """An image and the names of its classes."""

    labels: tuple[str, ...]
    """In the order of the alphabet; none where only evaluation asked."""
    place: str
    """Where it stands."""


def _classed(record: Record) -> ClassedImage:
    media = record.media
    if len(media) != 1:
        raise ValueError(f"must name one file, got {len(media)}")
    name = record.field(*LABELS)
    value = record.value(name)
    values = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, (str, int)):
            raise ValueError(f"field {name!r} must be names or numbers of classes, got {one!r:.80}")
    if len(values) > 2 and all(one in (0, 1) for one in values):
        raise ValueError(f"field {name!r} must be names or numbers of classes, got {value!r:.80}")
    labels = {record.whole(str(one).strip(), name) for one in values}
    return ClassedImage(
        media=media,
        captions=("",),  # it has no text
        kind="image",
        together=record.together,
        labels=tuple(sorted(labels - {""})),
        place=record.place,
    )


FORM = Form(texts=LABELS, parse=_classed)


@dataclass(kw_only=True)
class Evaluation(PictureEvaluation):
    """How codes are searched."""

    top_k: int = 0
    """Candidates that count, of MAP@k; 0: the whole database."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 0:
            raise ValueError(f"evaluation: top_k must be at least 0, got {self.top_k}")


@dataclass
class Recipe(recipes.Recipe):
    """Learning codes of images with classes; a text plays no part."""

    task: str = "hashing"
    evaluation: Evaluation = field(default_factory=Evaluation)
    """How the images of `data.validation` are looked for among those of `data.train`."""


@dataclass
class ClassedClip(Clip):
    """An image, and 1 at its classes."""

    labels: Tensor = field(default_factory=lambda: torch.zeros(0))


class ClassedDataset(PairDataset):
    """Images to train on; classes are numbered in the order of their names."""

    def __init__(self, examples: Sequence[ClassedImage], classes: int, *given: Any, **more: Any):
        super().__init__(examples, *given, **more)
        names = sorted({name for example in examples for name in example.labels})
        if len(names) > classes:
            raise ValueError(
                f"recipe: model.hash_classes must be at least {len(names)}, the classes of"
                f" data.train, got {classes}"
            )
        self._classes = classes
        self._number = {name: k for k, name in enumerate(names)}
        self._labels = Strings(SEPARATOR.join(example.labels) for example in examples)

    def read(self, number: int, seed: int, skipped: list[tuple[str, str]]) -> ClassedClip:
        clip = super().read(number, seed, skipped)
        labels = torch.zeros(self._classes)
        labels[[self._number[name] for name in self._labels[number].split(SEPARATOR)]] = 1
        return ClassedClip(**vars(clip), labels=labels)


@dataclass(frozen=True, kw_only=True)
class ClassedCollator(Collator):
    """Makes a batch of images with classes."""

    def __call__(self, clips: Sequence[Any]) -> Batch:
        batch = super().__call__(clips)
        return batch | {"labels": torch.stack([clip.labels for clip in clips])}


def read_examples(recipe: recipes.Recipe) -> list[ClassedImage]:
    """The images of all training corpora; those without a class teach nothing."""
    found = read_corpora(recipe.data.train, recipe.data, "train", FORM)
    usable = [example for example in found if example.labels]
    if not usable:
        raise ValueError(
            f"recipe: data.train must have images with classes, got {len(found)} without"
        )
    check_batches(usable, recipe.optimizer.batch_size // recipe.optimizer.accumulation)
    return usable


def build_dataset(
    recipe: recipes.Recipe, examples: Sequence[ClassedImage], config: Any
) -> ClassedDataset:
    """The training images."""
    return ClassedDataset(
        examples, config.hash_classes, clip_spec(recipe, config), seed=recipe.seed
    )


def build_collator(
    recipe: recipes.Recipe, tokenizer: PreTrainedTokenizerBase, config: Any
) -> ClassedCollator:
    """The collator."""
    return collator(ClassedCollator, recipe, tokenizer)


def model_inputs(
    recipe: recipes.Recipe, config: VideoConfig, batch: dict[str, Any]
) -> dict[str, Any]:
    """Pictures of the model's size, and their classes."""
    return pretrain.model_inputs(recipe, config, batch, ("labels",))


def read_validation(recipe: recipes.Recipe) -> tuple[list[ClassedImage], list[ClassedImage]]:
    """The queries, and the database: what is trained on."""
    queries = read_corpora(recipe.data.validation, recipe.data, "validation", FORM)
    return queries, read_corpora(recipe.data.train, recipe.data, "train", FORM)


def validate(
    recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerBase, examples: Any
) -> dict[str, float]:
    """The mean average precision."""
    reading = Reading.of_recipe(recipe)
    found = hashing(model, *examples, settings=recipe.evaluation, reading=reading)
    return {"score": found["map"], "map": found["map"]}


def hashing(
    model: Any,
    queries: Sequence[ClassedImage],
    database: Sequence[ClassedImage],
    *,
    settings: Evaluation | None = None,
    reading: Reading | None = None,
) -> dict[str, Any]:
    """Mean average precision of images that are looked for by their binary codes.

    Args:
        model: in whatever mode; evaluated in eval mode. `encode_video` of it gives codes.
        queries: images; those without a class are not counted.
        database: what they are looked for in.
        settings: how many candidates count, how many images are encoded at a time.
        reading: of pictures.

    Returns:
        `map` in percent, and its `chance`, of random codes; `top_k`; `bits`; numbers of `queries`
        that are counted and of the `database`; `skipped` pictures and `left_out` images, with
        reasons.

    Raises:
        ValueError: no picture can be read, there are fewer images than candidates that count, codes
            are not finite, or no query has a class.
    """
    settings, reading = settings or Evaluation(), reading or Reading()
    unread = Unread()
    with evaluating(model, bf16=reading.bf16):
        sides = [_encode(model, x, settings, reading, unread) for x in (queries, database)]
    names = {name for _, some in sides for example in some for name in example.labels}
    number = {name: k for k, name in enumerate(sorted(names))}
    labels = [_multi_hot([example.labels for example in some], number) for _, some in sides]
    codes = [code for code, _ in sides]
    top_k = settings.top_k or len(codes[1])
    found, _ = average_precisions(codes[0], labels[0], codes[1], labels[1], top_k)
    if not len(found):
        raise ValueError(f"hashing: no query of {len(queries)} has a class")
    generator = torch.Generator().manual_seed(CHANCE_SEED)
    random = [torch.randn(code.shape, generator=generator) for code in codes]
    chance, _ = average_precisions(random[0], labels[0], random[1], labels[1], top_k)
    return {
        "map": 100 * found.mean().item(),
        "chance": 100 * chance.mean().item(),
        "top_k": top_k,
        "bits": codes[0].shape[1],
        "queries": len(found),
        "database": len(codes[1]),
        "skipped": dict(unread.skipped.reasons),
        "left_out": unread.left_out,
    }


def _encode(
    model: Any,
    images: Sequence[ClassedImage],
    settings: Evaluation,
    reading: Reading,
    unread: Unread,
) -> tuple[Tensor, list[ClassedImage]]:
    """Codes on the host, and the images that could be read."""
    device = next(model.parameters()).device
    codes: list[Tensor] = []
    usable: list[ClassedImage] = []
    for numbers, pictures in read_pictures(
        "hashing", images, unread, batch_size=settings.batch_size, reading=reading
    ):
        on_device = [picture.to(device) for picture in pictures]
        with torch.autocast(device.type, enabled=False):  # pictures as in training
            pixels = to_pixel_values(on_device, model.config.image_size, resize=reading.resize)
        codes.append(model.encode_video(pixels).embeds.float().cpu())
        usable += [images[k] for k in numbers]
    found = torch.cat(codes)
    check_finite(found, "hashing: codes", lambda k: f"that of {usable[k].place}")
    return found, usable


def _multi_hot(labels: Sequence[Iterable[str]], number: dict[str, int]) -> Tensor:
    found = torch.zeros(len(labels), len(number))
    for row, names in enumerate(labels):
        found[row, [number[name] for name in names]] = 1
    return found


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[ClassedImage],
    reading: RunSettings,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What `hashing` finds of the annotations in `--database`."""
    if not options.database:
        raise ValueError("--database: must be given, the annotations of what is searched")
    left_out: list[str] = []
    corpora = [
        recipes.Corpus(annotations=path, root=options.root, kind="image")
        for path in options.database
    ]
    database = read_corpora(corpora, recipes.Data(), "test", FORM, left_out)
    settings = Evaluation(batch_size=options.batch_size, top_k=options.top_k)
    how = Reading.of(reading, options)
    found = hashing(model, examples, database, settings=settings, reading=how)
    return found | {"left_out": [*found["left_out"], *left_out]}


def render(facts: dict[str, Any]) -> str:
    """The mean average precision, beside that of random codes."""
    rows = [
        ("", f"MAP@{facts['top_k']}"),
        (f"{facts['bits']} bits", f"{facts['map']:.1f}"),
        ("random codes", f"{facts['chance']:.1f}"),
    ]
    counts = f"{facts['queries']} queries, {facts['database']} images in the database"
    return "\n".join([counts, *format_rows(rows), *left_out_lines(facts["skipped"])])

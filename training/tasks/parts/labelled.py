"""Texts about one picture or several, each of one class: trained on, and classified."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.models.parts.configuration import VideoConfig
from svitt_ops.training.data.annotations import Entry, Form, Record
from svitt_ops.training.data.augment import to_pixel_values
from svitt_ops.training.data.collate import Collator, count_cut, encode_texts
from svitt_ops.training.data.columns import FileNames, Strings
from svitt_ops.training.data.datasets import Clip, Key, PairDataset
from svitt_ops.training.data.transport import Batch
from svitt_ops.training.engine import recipes
from svitt_ops.training.engine.build import read_corpora
from svitt_ops.training.engine.gate import check_batches
from svitt_ops.training.engine.settings import RunSettings
from svitt_ops.training.tasks import pretrain
from svitt_ops.training.tasks.parts.checks import check_finite
from svitt_ops.training.tasks.parts.evaluation import Reading, evaluating
from svitt_ops.training.tasks.parts.pictures import PictureEvaluation, Unread, read_pictures
from svitt_ops.training.tasks.parts.ranks import are_first
from svitt_ops.training.tasks.parts.sharing import share_clips
from svitt_ops.training.tasks.parts.table import format_rows, left_out_lines
from svitt_ops.training.tasks.parts.training import clip_spec, collator

TEXTS = ("sentence", "caption", "hypothesis")
"""Fields of the text."""
INPUTS = ("input_ids", "attention_mask", "labels", "clip_numbers")


@dataclass
class Data(recipes.Data):
    """What is read."""

    share_clips: bool = False
    """Encode a picture once for all texts of a batch about it, such as `keep_together` makes meet;
    otherwise each text has its pictures to itself, cropped in other ways."""


@dataclass
class LabelledRecipe(recipes.Recipe):
    """Fine-tuning on texts of a class each."""

    data: Data = field(default_factory=Data)
    evaluation: PictureEvaluation = field(default_factory=PictureEvaluation)
    """How `data.validation` is evaluated."""


@dataclass(frozen=True, kw_only=True)
class Labelled(Entry):
    """A text about all its pictures; the only one of its `captions`."""

    label: int
    """Number of its class."""
    place: str
    """Where it stands."""


def labelled(record: Record, media: tuple[str, ...], classes: Sequence[str]) -> Labelled:
    """What a record says of some pictures; a ValueError where it has no text or no class."""
    name = record.field(*TEXTS)
    texts = record.clean([record.whole(text, name) for text in record.texts(name)], name)
    if len(texts) != 1:
        raise ValueError(f"field {name!r} must be one text, got {len(texts)}")
    return Labelled(
        media=media,
        captions=texts,
        kind="image",
        together=record.together,
        label=record.label(*classes),
        place=record.place,
    )


def _by_first(examples: Sequence[Labelled]) -> list[Labelled]:
    """The examples with their first picture alone, so that each is one item of a corpus."""
    return [Labelled(**{**vars(example), "media": example.media[:1]}) for example in examples]


@dataclass
class LabelledClip(Clip):
    """The first picture of an example with its text; the others, and its class."""

    others: list[Tensor] = field(default_factory=list)
    label: int = 0
    numbers: list[int] = field(default_factory=list)
    """Which each picture that other texts share is of the corpus."""
    seeds: list[int] = field(default_factory=list)
    """Of the augmentation of each of these."""

    def pictures(self) -> list[Clip]:
        """A clip of each picture, whose augmentation is its own."""
        first = Clip(self.frames, self.caption, self.pair_id, self.seed, self.skipped)
        others = [
            replace(first, frames=frames, seed=self.seed + number, skipped=[])
            for number, frames in enumerate(self.others, start=1)
        ]
        clips = [first, *others]
        if self.seeds:
            clips = [replace(c, seed=seed) for c, seed in zip(clips, self.seeds, strict=True)]
        return clips


class LabelledDataset(PairDataset):
    """Examples to train on; one that lacks a picture is replaced by another.

    Args:
        share_clips: crop a picture alike for all its texts in an epoch.
    """

    def __init__(
        self, examples: Sequence[Labelled], *given: Any, share_clips: bool = False, **more: Any
    ) -> None:
        super().__init__(_by_first(examples), *given, **more)
        self._numbers: NDArray[np.int64] = np.empty(0, np.int64)
        if share_clips:
            name_of, numbers = FileNames(), dict[str, int]()
            names = (name_of(path) for example in examples for path in example.media)
            found = (numbers.setdefault(name, len(numbers)) for name in names)
            self._numbers = np.fromiter(found, np.int64)
        self._labels: NDArray[np.int8] = np.array([e.label for e in examples], dtype=np.int8)
        self._per_example = len(examples[0].media) - 1
        self._others = Strings(path for e in examples for path in e.media[1:])

    def __getitem__(self, key: Key) -> LabelledClip:
        clip = cast(LabelledClip, super().__getitem__(key))
        for number in clip.numbers:
            rng = random.Random(f"{self.seed} {key[1]} picture {number}")
            clip.seeds.append(rng.getrandbits(48))
        return clip

    def read(self, number: int, seed: int, skipped: list[tuple[str, str]]) -> LabelledClip:
        clip = super().read(number, seed, skipped)
        first, count = number * self._per_example, self._per_example + 1
        numbers = self._numbers[number * count : (number + 1) * count].tolist()
        others = [
            self.reader.read(path, "image", lambda times: [0])
            for path in self._others[first : first + self._per_example]
        ]
        more = {"label": int(self._labels[number]), "numbers": numbers}
        return LabelledClip(**vars(clip), others=others, **more)


@dataclass(frozen=True, kw_only=True)
class LabelledCollator(Collator):
    """Makes a batch of examples: the pictures of each follow each other."""

    share_clips: bool = False
    """Whether the batch holds a picture of several texts once."""

    def __call__(self, clips: Sequence[Any]) -> Batch:
        batch = super().__call__([picture for clip in clips for picture in clip.pictures()])
        step = len(batch["pair_ids"]) // len(clips)
        if self.share_clips:
            share_clips(batch, [number for clip in clips for number in clip.numbers])
            if step > 1:
                batch["clip_numbers"] = batch["clip_numbers"].unflatten(0, (-1, step))
        once = ("pair_ids", "input_ids", "attention_mask")
        batch |= {name: batch[name][::step].clone() for name in once}
        return batch | {"labels": torch.tensor([clip.label for clip in clips])}


def by_example(pixels: Tensor, count: int) -> Tensor:
    """Pictures ``(examples pictures, 1, 3, s, s)`` as ``(examples, pictures, 3, s, s)``."""
    return pixels.unflatten(0, (count, -1)).flatten(1, 2)


def accuracies(right: Sequence[bool], labels: Sequence[int], classes: Sequence[str]) -> Any:
    """Accuracies of choices among classes, in percent.

    Args:
        right: whether the choice for each example was right.
        labels: number of the class of each.
        classes: their names.

    Returns:
        `accuracy`; `by_class`, those of the examples of each class and how many `examples` these
        are; `chance`, of the best constant answer; the number of `examples`.
    """
    if not labels:
        raise ValueError("accuracies: must be of at least one example, got none")
    counts = Counter(labels)
    hits = Counter(label for hit, label in zip(right, labels, strict=True) if hit)
    return {
        "accuracy": 100 * hits.total() / len(labels),
        "by_class": {
            classes[k]: {"accuracy": 100 * hits[k] / counts[k], "examples": counts[k]}
            for k in sorted(counts)
        },
        "chance": 100 * max(counts.values()) / len(labels),
        "examples": len(labels),
    }


@dataclass(frozen=True, kw_only=True)
class ClassTask:
    """What a task that chooses classes is made of: its module has these methods as functions."""

    name: str
    classes: tuple[str, ...]
    """In the order of the model's logits."""
    form: Form[Labelled]

    def read_examples(self, recipe: recipes.Recipe) -> list[Labelled]:
        """The examples of all training corpora."""
        found = read_corpora(recipe.data.train, recipe.data, "train", self.form)
        size = recipe.optimizer.batch_size // recipe.optimizer.accumulation
        check_batches(_by_first(found), size)
        return found

    def build_dataset(
        self, recipe: LabelledRecipe, examples: Sequence[Labelled], config: VideoConfig
    ) -> LabelledDataset:
        """The training examples."""
        share = recipe.data.share_clips
        spec = clip_spec(recipe, config)
        return LabelledDataset(examples, spec, seed=recipe.seed, share_clips=share)

    def build_collator(
        self, recipe: LabelledRecipe, tokenizer: PreTrainedTokenizerBase, config: Any
    ) -> LabelledCollator:
        """The collator."""
        return collator(LabelledCollator, recipe, tokenizer, share_clips=recipe.data.share_clips)

    def model_inputs(
        self, recipe: recipes.Recipe, config: VideoConfig, batch: dict[str, Any]
    ) -> dict[str, Any]:
        """Pictures ``(batch, pictures, 3, size, size)``, texts, and labels ``(batch,)``.

        Of shared pictures there are as many as the batch has, ``(pictures, 3, size, size)``, and
        their `clip_numbers`.
        """
        inputs = pretrain.model_inputs(recipe, config, batch, INPUTS)
        pixels = inputs["pixel_values"]
        if "clip_numbers" in inputs:
            return inputs | {"pixel_values": pixels[:, 0]}
        return inputs | {"pixel_values": by_example(pixels, len(inputs["labels"]))}

    def read_validation(self, recipe: recipes.Recipe) -> list[Labelled]:
        """The examples."""
        return read_corpora(recipe.data.validation, recipe.data, "validation", self.form)

    def validate(
        self,
        recipe: Any,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Labelled],
    ) -> dict[str, float]:
        """The accuracy."""
        reading = Reading.of_recipe(recipe)
        found = self.classify(
            model, tokenizer, examples, settings=recipe.evaluation, reading=reading
        )
        return {"score": found["accuracy"], "accuracy": found["accuracy"]}

    def evaluate(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Labelled],
        reading: RunSettings,
        options: argparse.Namespace,
    ) -> dict[str, Any]:
        """What `classify` finds."""
        settings = PictureEvaluation.of(options)
        how = Reading.of(reading, options)
        return self.classify(model, tokenizer, examples, settings=settings, reading=how)

    def classify(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Labelled],
        *,
        settings: PictureEvaluation | None = None,
        reading: Reading | None = None,
    ) -> dict[str, Any]:
        """Classify examples: the share of right classes; a tie is a wrong one.

        Args:
            model: in whatever mode; evaluated in eval mode. Of pixel values
                ``(batch, pictures, 3, size, size)`` and texts, its output has `logits`
                ``(batch, classes)``.
            tokenizer: the model's.
            examples: as many pictures each.
            settings: how many at a time.
            reading: of pictures and texts.

        Returns:
            What `accuracies` does; `skipped` pictures and `left_out` examples, with reasons;
            `texts_cut`, those longer than may be.

        Raises:
            ValueError: no picture can be read; logits are not finite, or of other classes.
        """
        settings, reading = settings or PictureEvaluation(), reading or Reading()
        unread = Unread()
        right: list[bool] = []
        answered: list[Labelled] = []
        with evaluating(model, bf16=reading.bf16) as device:
            for numbers, pictures in read_pictures(
                self.name, examples, unread, batch_size=settings.batch_size, reading=reading
            ):
                some = [examples[k] for k in numbers]
                texts = [example.captions[0] for example in some]
                inputs = encode_texts(tokenizer, texts, reading.text_length, "longest")
                with torch.autocast(device.type, enabled=False):  # pictures as in training
                    pixels = to_pixel_values(
                        [picture.to(device) for picture in pictures],
                        model.config.image_size,
                        resize=reading.resize,
                    )
                on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
                logits = model(pixel_values=by_example(pixels, len(some)), **on_device).logits
                right += self._are_right(logits.float(), some)
                answered += some
        texts = [example.captions[0] for example in answered]
        return {
            **accuracies(right, [example.label for example in answered], self.classes),
            "texts_cut": count_cut(tokenizer, texts, reading.text_length),
            "skipped": dict(unread.skipped.reasons),
            "left_out": unread.left_out,
        }

    def _are_right(self, logits: Tensor, examples: Sequence[Labelled]) -> list[bool]:
        wanted = (len(examples), len(self.classes))
        if logits.shape != wanted:
            raise ValueError(
                f"{self.name}: the model's logits must have shape {wanted}, got"
                f" {tuple(logits.shape)}"
            )
        check_finite(logits, f"{self.name}: logits", lambda k: f"those of {examples[k].place}")
        labels = torch.tensor([example.label for example in examples], device=logits.device)
        found: list[bool] = are_first(logits, labels).tolist()
        return found


def render(facts: dict[str, Any]) -> str:
    """The accuracy, by class and of all."""
    rows: list[tuple[str, ...]] = [("", "accuracy", "examples")]
    for name, row in (*facts["by_class"].items(), ("all", facts)):
        rows.append((name, f"{row['accuracy']:.1f}", str(row["examples"])))
    rows.append(("always the commonest class", f"{facts['chance']:.1f}", ""))
    lines = format_rows(rows)
    if cut := facts["texts_cut"]:
        lines.append(f"{cut} texts are longer than the text length, and cut")
    return "\n".join([*lines, *left_out_lines(facts["skipped"])])

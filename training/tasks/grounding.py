"""Weakly supervised grounding (RefCOCO+): where a picture has what a text means.

Models are trained as for retrieval, on pairs of pictures and texts alone. What their saliency map
means is compared with the true box.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.models.systems import load_system
from svitt_ops.training.data.augment import to_pixel_values
from svitt_ops.training.data.collate import count_cut, encode_texts
from svitt_ops.training.engine import recipes
from svitt_ops.training.engine.build import read_corpora
from svitt_ops.training.engine.gate import check_batches
from svitt_ops.training.engine.settings import RunSettings
from svitt_ops.training.tasks.parts.boxes import (
    check_inside,
    ground_thing,
    grounding_accuracies,
)
from svitt_ops.training.tasks.parts.checks import check_finite
from svitt_ops.training.tasks.parts.evaluation import Reading, evaluating
from svitt_ops.training.tasks.parts.pictures import PictureEvaluation, Unread, read_pictures
from svitt_ops.training.tasks.parts.references import (
    REFERENCES,
    TRAINING,
    Reference,
    read_detections,
    with_detections,
)
from svitt_ops.training.tasks.parts.table import format_rows, left_out_lines
from svitt_ops.training.tasks.retrieval import build_collator, build_dataset, model_inputs

__all__ = ["build_collator", "build_dataset", "model_inputs"]  # and those that are written here
HEAD = "retrieval"
FORM = REFERENCES
OPTIONS = {"detections": None, "layer": None}


@dataclass(kw_only=True)
class Evaluation(PictureEvaluation):
    """How boxes are found."""

    layer: int | None = None
    """Fusion layer whose attention makes the map, from 0; null: the model's own choice."""

    @classmethod
    def of(cls, options: argparse.Namespace) -> Evaluation:
        """What the options of `svitt evaluate` say."""
        return cls(batch_size=options.batch_size, layer=options.layer)


@dataclass
class Data(recipes.Data):
    """What is read."""

    detections: str | None = field(default=None, metadata=recipes.PATH)
    """Boxes to choose from in `data.validation`, by image: an object of lists, as `dets.json`."""


@dataclass
class Recipe(recipes.Recipe):
    """Fine-tuning on texts and their pictures, by the contrastive and the matching loss."""

    task: str = "grounding"
    data: Data = field(default_factory=Data)
    evaluation: Evaluation = field(default_factory=Evaluation)
    """How `data.validation` is evaluated."""


def check(recipe: Recipe) -> None:
    """Refuse a system whose models cannot say what a text means."""
    _check_grounds(load_system(recipe.system).models[HEAD], f"recipe: system: {recipe.system}")


def read_examples(recipe: recipes.Recipe) -> list[Reference]:
    """The texts of all training corpora; boxes are not looked at."""
    found = read_corpora(recipe.data.train, recipe.data, "train", TRAINING)
    check_batches(found, recipe.optimizer.batch_size // recipe.optimizer.accumulation)
    return found


def read_validation(recipe: Recipe) -> list[Reference]:
    """The references, with their boxes."""
    found = read_corpora(recipe.data.validation, recipe.data, "validation", REFERENCES)
    if recipe.data.detections is None:
        return found
    boxes = read_detections(recipe.data.detections, "recipe: data.detections")
    return with_detections(found, boxes)


def validate(
    recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Reference]
) -> dict[str, float]:
    """The accuracies; the score is that of the boxes."""
    settings, reading = recipe.evaluation, Reading.of_recipe(recipe)
    found = ground(model, tokenizer, examples, settings=settings, reading=reading)
    return {
        "score": found["accuracy"],
        "accuracy": found["accuracy"],
        "pointing": found["pointing"],
    }


def ground(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Reference],
    *,
    settings: Evaluation | None = None,
    reading: Reading | None = None,
) -> dict[str, Any]:
    """Find what texts mean: the share of right boxes, and of maxima inside of the true box.

    Args:
        model: in whatever mode; evaluated in eval mode. `ground(pixel_values, input_ids,
            attention_mask, layer=...)` of it is a saliency map for each text, floating
            ``(batch, rows, columns)``, of pixel values ``(batch, 1, 3, size, size)``; it may take
            gradients.
        tokenizer: the model's.
        examples: with their boxes.
        settings: the layer, and how many at a time.
        reading: of pictures and texts.

    Returns:
        `accuracy`: overlap of at least one half, and its `chance`, of a random detection, or of the
        whole picture where there are none; `pointing`, and its `pointing_chance`, the mean share of
        the picture that is in the true box; all in percent. Numbers of `references` and of those
        `with_detections`; `skipped` pictures and `left_out` references, with reasons; `texts_cut`.

    Raises:
        ValueError: the model has no maps; no picture can be read; no box is in its picture; maps
            are not finite.
    """
    settings, reading = settings or Evaluation(), reading or Reading()
    _check_grounds(type(model), "grounding: model")
    unread, found, texts = Unread(), [], []
    detected = 0
    with evaluating(model, bf16=reading.bf16) as device:
        for numbers, pictures in read_pictures(
            "grounding",
            examples,
            unread,
            batch_size=settings.batch_size,
            reading=reading,
            full_size=True,  # boxes are in pixels of the file
        ):
            some = [examples[k] for k in numbers]
            maps = _maps(model, tokenizer, some, pictures, settings, reading, device)
            for saliency, reference, picture in zip(maps, some, pictures, strict=True):
                size = (picture.shape[-1], picture.shape[-2])
                assert reference.box is not None
                try:
                    check_inside(reference.box, size)
                except ValueError as error:
                    unread.left_out.append(f"{reference.place}: {error}")
                    continue
                found.append(ground_thing(saliency, reference.box, reference.detections, size))
                texts.append(reference.captions[0])
                detected += bool(reference.detections)
    if not found:
        raise ValueError(f"grounding: no box is in its picture; the first: {unread.left_out[0]}")
    return {
        **grounding_accuracies(found),
        "references": len(found),
        "with_detections": detected,
        "texts_cut": count_cut(tokenizer, texts, reading.text_length),
        "skipped": dict(unread.skipped.reasons),
        "left_out": unread.left_out,
    }


def _check_grounds(model: type[Any], what: str) -> None:
    if not hasattr(model, "ground"):
        raise ValueError(f"{what} must have saliency maps of texts, {model.__name__} has none")


def _maps(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    references: Sequence[Reference],
    pictures: Sequence[Tensor],
    settings: Evaluation,
    reading: Reading,
    device: torch.device,
) -> Tensor:
    """Saliency ``(references, rows, columns)``."""
    texts = [reference.captions[0] for reference in references]
    inputs = encode_texts(tokenizer, texts, reading.text_length, "longest")
    # Maps may be made of gradients, which inference mode refuses.
    with torch.inference_mode(False), torch.enable_grad():
        with torch.autocast(device.type, enabled=False):  # pictures as in training
            pixels = to_pixel_values(
                [picture.to(device) for picture in pictures],
                model.config.image_size,
                resize=reading.resize,
            )
        on_device = {name: tensor.to(device).clone() for name, tensor in inputs.items()}
        maps = model.ground(pixel_values=pixels, **on_device, layer=settings.layer).detach()
    if maps.dim() != 3 or len(maps) != len(references):
        raise ValueError(
            f"grounding: the model's maps must have shape ({len(references)}, rows, columns), got"
            f" {tuple(maps.shape)}"
        )
    check_finite(maps, "grounding: maps", lambda k: f"that of {references[k].place}")
    found: Tensor = maps.float().cpu()
    return found


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Reference],
    reading: RunSettings,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What `ground` finds."""
    if options.detections is not None:
        examples = with_detections(examples, read_detections(options.detections, "--detections"))
    settings, how = Evaluation.of(options), Reading.of(reading, options)
    return ground(model, tokenizer, examples, settings=settings, reading=how)


def render(facts: dict[str, Any]) -> str:
    """Both accuracies beside their chances."""
    rows = [
        ("", "accuracy", "chance"),
        ("box", f"{facts['accuracy']:.1f}", f"{facts['chance']:.1f}"),
        ("pointing", f"{facts['pointing']:.1f}", f"{facts['pointing_chance']:.1f}"),
    ]
    count, detected = facts["references"], facts["with_detections"]
    chosen = f"boxes chosen among detections for {detected}, of the map for {count - detected}"
    lines = [f"{count} references; {chosen}", *format_rows(rows)]
    if cut := facts["texts_cut"]:
        lines.append(f"{cut} texts are longer than the text length, and cut")
    return "\n".join([*lines, *left_out_lines(facts["skipped"])])

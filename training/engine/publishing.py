"""A trained model's folder as others can use it: weights, processor, recipe, model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import svitt_ops
from svitt_ops.training.engine.build import build_processor
from svitt_ops.training.engine.checkpoints import RECIPE
from svitt_ops.training.engine.provenance import commit
from svitt_ops.training.engine.recipes import Recipe, recipe_text

CARD = "README.md"
HEAD = """\
---
library_name: svitt-ops
tags:
- svitt-ops
- {system}
- video-text
---

# {name}

A {system} model, {learned}, with svitt-ops {version}{commit}.
{parameters:,} parameters; clips of {frames} frames of {size} x {size} pixels.

## Training

| | |
|---|---|
{training}

`recipe.yaml` beside this file says everything else.
{numbers}
## Use

```python
import svitt_ops.models
from transformers import AutoProcessor

folder = "."  # of this file, or its name on the Hub
processor = AutoProcessor.from_pretrained(folder)
model = svitt_ops.models.{name}.from_pretrained(folder).eval()
{use}```

The model has learned from what it was shown, and has its gaps and biases.
"""
SIMILARITY = """\
inputs = processor(videos=["clip.mp4"], text=["what is seen"])
video = model.encode_video(inputs["pixel_values"]).embeds
text = model.encode_text(inputs["input_ids"], inputs["attention_mask"]).embeds
similarity = text @ video.T
"""


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """Writes models of a run."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    recipe_text: str = ""
    """Of `recipe.yaml`; default: the recipe's."""
    items: int | None = None
    """How many it learns from; None: not known any more."""

    def write(
        self,
        model: Any,
        folder: Path,
        *,
        weights: Any = None,
        numbers: Mapping[str, float] | None = None,
    ) -> None:
        """Write a folder that `from_pretrained`, `AutoProcessor` and `push_to_hub` take.

        Args:
            model: to be written.
            folder: that exists.
            weights: of a model in shards, whole.
            numbers: for the card, by name.
        """
        model.save_pretrained(folder, state_dict=weights)
        build_processor(self.recipe, self.tokenizer, model.config).save_pretrained(folder)
        text = self.recipe_text or recipe_text(self.recipe)
        (folder / RECIPE).write_text(text, encoding="utf-8")
        card = model_card(self.recipe, model, self.items, numbers or {})
        (folder / CARD).write_text(card, encoding="utf-8")


def model_card(recipe: Recipe, model: Any, items: int | None, numbers: Mapping[str, float]) -> str:
    """Markdown that says what a model is, what it learned from, how well, and how to use it.

    Of files only names are told, not where they lay.

    Args:
        recipe: that it was trained by.
        model: that was trained.
        items: of the training data; None: not known.
        numbers: that were measured, by name.
    """
    settings, known = recipe.optimizer, commit()
    start = {key: Path(str(x)).name for key, x in vars(recipe.init).items() if x is not None}
    rows = {
        "learned from": ", ".join(
            f"{Path(corpus.annotations).name} ({corpus.kind}s)" for corpus in recipe.data.train
        ),
        "examples": None if items is None else f"{items:,}",
        "started from": ", ".join(f"{key}: {name}" for key, name in start.items()),
        "steps": settings.steps and f"{settings.steps:,}",
        "epochs": None if settings.steps else f"{settings.epochs:g}",
        "batch": str(settings.batch_size),
        "learning rate": f"{settings.lr:g}",
        "precision": recipe.run.precision,
        "seed": str(recipe.seed),
    }
    config, name = model.config, type(model).__name__
    measured = "".join(f"| {key} | {value:.4g} |\n" for key, value in numbers.items())
    both = hasattr(model, "encode_text") and not config.given_features
    return HEAD.format(
        system=recipe.system,
        name=name,
        learned=f"trained for {recipe.task.replace('_', ' ')}",
        version=svitt_ops.__version__,
        commit=f", commit {known}" if known else "",
        parameters=sum(x.numel() for x in model.parameters()),
        frames=config.num_frames,
        size=config.image_size,
        training="\n".join(f"| {key} | {value} |" for key, value in rows.items() if value),
        numbers=f"\n## Numbers\n\n| | |\n|---|---:|\n{measured}" if measured else "",
        use=SIMILARITY if both else "",
    )

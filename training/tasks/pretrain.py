"""Pretraining: video-text and image-text pairs, for the contrastive, matching and MLM losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.models.parts.configuration import VideoConfig
from svitt_ops.training.data.annotations import Entry
from svitt_ops.training.data.augment import to_pixel_values
from svitt_ops.training.data.collate import Collator
from svitt_ops.training.data.datasets import PairDataset
from svitt_ops.training.data.views import ViewCollator
from svitt_ops.training.engine.build import read_corpora
from svitt_ops.training.engine.gate import check_batches
from svitt_ops.training.engine.recipes import Recipe
from svitt_ops.training.tasks.parts.training import clip_spec, collator

HEAD = "pretraining"
VIEWS = {"of_pictures": "vcl", "of_texts": "tcl"}
"""Of `ViewCollator`, and the loss that wants them."""
DRAWN = ("boxes", "flips", "changes")
"""What augmentation does to the pictures of a batch."""
INPUTS = (
    *("input_ids", "attention_mask", "pair_ids", "mlm_input_ids", "mlm_labels"),
    *("masked_input_ids", "patch_noise", "view_input_ids", "view_attention_mask"),
)


def read_examples(recipe: Recipe) -> list[Entry]:
    """The pairs of all training corpora."""
    entries = read_corpora(recipe.data.train, recipe.data, "train")
    check_batches(entries, recipe.optimizer.batch_size // recipe.optimizer.accumulation)
    return entries


def build_dataset(recipe: Recipe, examples: Sequence[Entry], config: VideoConfig) -> PairDataset:
    """The training pairs."""
    return PairDataset(
        examples, clip_spec(recipe, config), seed=recipe.seed, positives=recipe.data.positives
    )


def build_collator(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any) -> Collator:
    """The collator; it prepares what is masked, or views, only for a model that learns from it."""
    weights, settings = config.weights, recipe.optimizer
    views = {name: weights.get(loss, 0) > 0 for name, loss in VIEWS.items()}
    if any(views.values()):
        if settings.mask_words:
            raise ValueError(
                "recipe: optimizer.mask_words must be false, views of texts are noised piece by"
                " piece, got true"
            )
        return collator(ViewCollator, recipe, tokenizer, noise=settings.mask_probability, **views)
    share = settings.mask_probability if weights.get("mlm", 0) > 0 else 0.0
    completion = None
    if weights.get("scl", 0) > 0:
        completion = (config.text_mask_share, config.grid_size**2)
    more = {"mask_probability": share, "mask_words": settings.mask_words}
    return collator(Collator, recipe, tokenizer, **more, completion=completion)


def model_inputs(
    recipe: Recipe,
    config: VideoConfig,
    batch: dict[str, Any],
    inputs: Sequence[str] = INPUTS,
) -> dict[str, Any]:
    """Pictures of the model's size or given features, views of the pictures, and texts."""
    found = {name: batch[name] for name in inputs if name in batch}
    if config.given_features:
        return {"pixel_values": batch["clips"], **found}

    def pictures(*drawn: Any) -> Tensor:
        size = int(config.image_size)
        return to_pixel_values(batch["clips"], size, *drawn, resize=recipe.data.resize)

    if "view_boxes" in batch:
        views = zip(*(batch[f"view_{name}"] for name in DRAWN), strict=True)
        found["view_pixel_values"] = torch.stack([pictures(*view) for view in views], 1)
    return {"pixel_values": pictures(*(batch[name] for name in DRAWN)), **found}

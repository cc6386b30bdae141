"""Text assignment: further pretraining for two pictures, to which of which a text belongs.

A stage between pretraining and reasoning, on the pairs of pretraining.
Source: ALBEF (NeurIPS 2021), section 4.4.
"""

from __future__ import annotations

from typing import Any

from svitt_ops.models.parts.configuration import VideoConfig
from svitt_ops.training.engine.recipes import Recipe
from svitt_ops.training.tasks import pretrain
from svitt_ops.training.tasks.pretrain import build_dataset, read_examples
from svitt_ops.training.tasks.retrieval import build_collator

__all__ = ["build_collator", "build_dataset", "read_examples"]  # and those that are written here
HEAD = "text_assignment"
INPUTS = ("input_ids", "attention_mask")


def model_inputs(recipe: Recipe, config: VideoConfig, batch: dict[str, Any]) -> dict[str, Any]:
    """Pictures of the model's size, and their texts; the model draws which belong together."""
    return pretrain.model_inputs(recipe, config, batch, INPUTS)

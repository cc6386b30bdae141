"""How the clips of training are read and made batches of, as a recipe's `data` says."""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from svitt_ops.models.parts.configuration import VideoConfig
from svitt_ops.training.data.augment import Augmentation
from svitt_ops.training.data.collate import Collator
from svitt_ops.training.data.datasets import ClipSpec
from svitt_ops.training.engine.recipes import Recipe

Kind = TypeVar("Kind", bound=Collator)


def clip_spec(recipe: Recipe, config: VideoConfig) -> ClipSpec:
    """Which frames of a video make a clip."""
    data = recipe.data
    return ClipSpec(
        num_frames=config.num_frames,
        mode=data.sampling,
        official=data.official_sampling,
        short_side=None if data.resize == "official" else data.short_side,
        features=config.given_features,
        cache=data.cache,
    )


def collator(
    kind: type[Kind], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, **more: Any
) -> Kind:
    """A collator of some kind; `more` of its fields than the recipe's `data` has."""
    data = recipe.data
    return kind(
        tokenizer=tokenizer,
        text_length=data.text_length,
        pad_to=data.pad_to,
        augmentation=Augmentation(
            crop_scale=tuple(data.crop_scale),
            flip=data.flip,
            rand_augment=None if data.rand_augment is None else tuple(data.rand_augment),
        ),
        **more,
    )

"""How tasks are evaluated: what all of them take from recipes and from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from tqdm.auto import tqdm

from svitt_ops.models.parts.clips import Merge
from svitt_ops.training.engine.recipes import Recipe
from svitt_ops.training.engine.settings import RunSettings
from svitt_ops.training.tasks.parts.encoding import Progress

MERGES = get_args(Merge)


@dataclass(kw_only=True)
class ClipEvaluation:
    """Clips of a video, and how their scores become one."""

    clips: int = 1
    """Clips of each video."""
    strided: bool = False
    """Clips take every n-th frame instead of following each other."""
    merge: str = "logsumexp"
    """How clips become one: "logsumexp", "mean" or "max" of their scores, or "concat"."""
    batch_size: int = 32
    """Clips that are encoded, and pairs that are matched, at a time."""

    def __post_init__(self) -> None:
        least = {"top_k": 0, "clips": 1, "batch_size": 1}
        for name, minimum in least.items():
            value = getattr(self, name, minimum)
            if value < minimum:
                raise ValueError(f"evaluation: {name} must be at least {minimum}, got {value}")
        if self.merge not in MERGES:
            raise ValueError(
                f"evaluation: merge must be one of {', '.join(MERGES)}, got {self.merge!r}"
            )

    @classmethod
    def of(cls, options: argparse.Namespace) -> Any:
        """What the options of `svitt evaluate` say."""
        return cls(**{key.name: getattr(options, key.name) for key in fields(cls)})


@dataclass(kw_only=True)
class Evaluation(ClipEvaluation):
    """The same, and how many candidates are looked at closely."""

    top_k: int = 128
    """Candidates of the quick search that are ranked anew; 0: none."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How clips and texts are read, and with what a model computes; its numbers stay the same."""

    text_length: int = 32
    """Longest text, in tokens."""
    short_side: int | None = None
    """As in `ClipSpec`."""
    resize: str = "antialias"
    """As in `to_pixel_values`."""
    test_sampling: str = "middle"
    """As in `RunSettings`."""
    bf16: bool = False
    """Whether towers and fusion layers run under autocast."""
    workers: int = 0
    """Processes that decode."""
    progress: Progress | None = None
    """Wraps loops, such as tqdm; called with the iterable and desc=."""

    @classmethod
    def of(cls, found: RunSettings, options: argparse.Namespace) -> Reading:
        """What `svitt evaluate` was told, and found in the run."""
        return cls(
            text_length=found.text_length,
            short_side=found.short_side,
            resize=found.resize,
            test_sampling=found.test_sampling,
            bf16=options.bf16,
            workers=options.workers,
            progress=lambda items, desc: tqdm(items, desc=desc, dynamic_ncols=True),
        )

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Reading:
        """What a run reads, for evaluation while it trains."""
        data = recipe.data
        return cls(
            text_length=data.text_length,
            short_side=None if data.resize == "official" else data.short_side,
            resize=data.resize,
            test_sampling=data.test_sampling,
            bf16=recipe.run.precision == "bf16",
            workers=data.workers,
        )


@contextmanager
def evaluating(model: Any, *, bf16: bool = False) -> Iterator[torch.device]:
    """A model in eval mode, without gradients, in autocast if asked; left in the mode it was in."""
    device = next(model.parameters()).device
    context = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    was_training = model.training
    model.eval()
    try:
        with context, torch.inference_mode():
            yield device
    finally:
        model.train(was_training)

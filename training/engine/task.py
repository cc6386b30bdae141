"""Tasks by name: each is a module of `svitt_ops.training.tasks`, and no other file knows it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerBase

    from svitt_ops.models.parts.configuration import VideoConfig
    from svitt_ops.training.data.annotations import Entry
    from svitt_ops.training.engine.recipes import Recipe
    from svitt_ops.training.engine.settings import RunSettings


@runtime_checkable
class Trainable(Protocol):
    """What the engine asks of a task that models are trained for.

    A task with keys of its own has a `Recipe` too, derived from `engine.recipes.Recipe`, and may
    refuse values of them in a function `check(recipe)`. What its data say of the model, such as its
    classes, are fields of the configuration that a function `model_fields(recipe)` returns.
    """

    HEAD: str
    """Which of a system's models it trains: a key of `System.models`."""

    def read_examples(self, recipe: Recipe) -> list[Entry]:
        """What there is to train on; unusable entries are reported, and an empty corpus refused."""

    def build_dataset(self, recipe: Recipe, examples: Sequence[Entry], config: Any) -> Dataset[Any]:
        """The examples, read by `dataset[number, epoch]`; its `items` are what batches are of."""

    def build_collator(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any
    ) -> Callable[[Sequence[Any]], dict[str, Any]]:
        """Makes a batch of what the dataset reads; `skipped` of it names unusable files."""

    def model_inputs(
        self, recipe: Recipe, config: VideoConfig, batch: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments of the model's forward, from a batch on the model's device.

        What forward returns has the `loss`, and its parts as `loss_...`.
        """


@runtime_checkable
class Validated(Protocol):
    """What a `Trainable` has besides where it is evaluated while it is trained."""

    def read_validation(self, recipe: Recipe) -> Any:
        """What there is to evaluate on, of `recipe.data.validation`."""

    def validate(
        self, recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerBase, examples: Any
    ) -> dict[str, float]:
        """Numbers by name, "score" the one that says which weights are the best: the highest.

        The model computes as in evaluation, and is left in the mode it was in.
        """


@runtime_checkable
class Evaluable(Protocol):
    """What `svitt evaluate` asks of a task.

    One whose annotations hold something else than captions has a `FORM` too, a `Form` of
    `data.annotations`.
    """

    HEAD: str
    """Which of a system's models it evaluates: a key of `System.models`."""
    OPTIONS: Mapping[str, Any]
    """The options of `svitt evaluate` that it takes besides those of all tasks; their defaults."""

    def evaluate(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Entry],
        reading: RunSettings,
        options: argparse.Namespace,
    ) -> dict[str, Any]:
        """Numbers for JSON."""

    def render(self, facts: dict[str, Any]) -> str:
        """The same as a table."""


Kind = TypeVar("Kind", Trainable, Evaluable)


def task_names() -> list[str]:
    """The names of all tasks."""
    from svitt_ops.training import tasks

    return [module.name for module in iter_modules(tasks.__path__) if not module.ispkg]


def load_task(name: str, kind: type[Kind]) -> Kind:
    """A task by the name of its module.

    Args:
        name: with underscores.
        kind: what it is to be used for.

    Raises:
        ValueError: there is none of this name, or it is not for that.
    """
    names = task_names()
    task: Any = _module(name) if name in names else None
    if not isinstance(task, kind):
        known = ", ".join(other for other in names if isinstance(_module(other), kind))
        raise ValueError(f"task must be one of {known}, got {name!r}")
    return task


def _module(name: str) -> Any:
    return import_module(f"svitt_ops.training.tasks.{name}")

"""Evaluation of a model while it is trained, which the training does not notice."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from svitt_ops.training.engine.checkpoints import BEST, whole_folder
from svitt_ops.training.engine.publishing import Publisher
from svitt_ops.training.engine.recipes import Recipe

log = logging.getLogger(__name__)
NUMBERS = "validation.json"
"""In the folder of the best weights: their step and their numbers."""


@dataclass(kw_only=True)
class Validation:
    """Evaluates, and keeps the best weights.

    What is drawn in it comes from generators of its own, so that a run has the same losses
    whether it is evaluated or not.
    """

    recipe: Recipe
    validate: Callable[[Any], Mapping[str, float]]
    """The numbers of a model, as `task.Validated.validate` has them."""
    publisher: Publisher
    """Writes a model into a folder."""
    batches_per_epoch: int
    steps: int
    """Of the whole run."""

    def __post_init__(self) -> None:
        self.folder = Path(self.recipe.output) / BEST
        self.best = best_score(self.folder)

    def is_due(self, step: int) -> bool:
        """Whether the weights after a step are evaluated: at the end of epochs and of the run."""
        if step == self.steps:
            return True
        if every := self.recipe.run.evaluate_steps:
            return step % every == 0
        accumulation = self.recipe.optimizer.accumulation
        before, after = (k * accumulation // self.batches_per_epoch for k in (step - 1, step))
        return after > before

    def run(self, model: Any, step: int) -> dict[str, float]:
        """Evaluate the weights after a step, and keep them if none before were as good.

        Returns:
            The numbers, and the `best` score until now.
        """
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices):
            found = dict(self.validate(model))
        if self.best is None or found["score"] > self.best:
            with whole_folder(self.folder) as folder:
                self.publisher.write(model, folder, numbers=found)
                (folder / NUMBERS).write_text(json.dumps({"step": step, **found}, indent=2) + "\n")
            self.best = found["score"]
        return {**found, "best": self.best}


class Evaluate(TrainerCallback):
    """Asks for an evaluation after the steps that are due."""

    def __init__(self, validation: Validation) -> None:
        self.validation = validation

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_evaluate = self.validation.is_due(state.global_step)


def forget_best(output: Path) -> None:
    """Remove the best weights of an earlier run: one that starts anew has none."""
    if (output / BEST).exists():
        log.warning("%s: is of an earlier run, and removed", output / BEST)
        shutil.rmtree(output / BEST)


def best_score(folder: Path) -> float | None:
    """The score of the best weights until now; None: there are none."""
    try:
        return float(json.loads((folder / NUMBERS).read_bytes())["score"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: cannot be read, and will be replaced (%s)", folder / NUMBERS, error)
        return None

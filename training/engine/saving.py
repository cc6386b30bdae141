"""transformers.Trainer whose checkpoints are whole and finite, or not there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

from svitt_ops.training.engine.checkpoints import (
    PARTIAL,
    RECIPE,
    keep_last,
    last_checkpoint,
    publish,
    writing,
)
from svitt_ops.training.engine.finite import first_not_finite
from svitt_ops.training.engine.recipes import Recipe, recipe_text
from svitt_ops.training.engine.sharding import gather, read_sharding

TRAINING_STATE = "training_state.safetensors"
"""File of a checkpoint with the tensors of a model that weights for use do without."""


class SavingTrainer(Trainer):
    """What a run leaves on the disk.

    Args:
        recipe: of the run.
        arguments: of transformers.Trainer.
    """

    def __init__(self, recipe: Recipe, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.recipe = recipe
        self.output = Path(recipe.output)
        self.sharding = read_sharding(recipe)
        self._folder: str | None = None
        self._weights: dict[str, Tensor] | None = None
        self._moments: dict[str, Any] = {}

    def refuse_weights_not_finite(self) -> None:
        """Stop if a weight is not finite on any process."""
        name = first_not_finite(self.accelerator.unwrap_model(self.model).state_dict().items())
        if name is not None:
            self.stop(f"{name} is not finite after step {self.state.global_step}")

    def stop(self, what: str) -> None:
        """End the run for what is not finite."""
        last = last_checkpoint(self.output)
        kept = f"the last checkpoint is {last[1]}" if last else "no checkpoint was saved before"
        raise ValueError(f"{what}: training stopped, {kept}; a lower optimizer.lr may help")

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._folder or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        """Write beside the checkpoints, and rename when everything is on the disk."""
        self.refuse_weights_not_finite()
        output = self.output
        name = f"checkpoint-{self.state.global_step}"
        partial = output / f"{PARTIAL}{name}"
        if self.is_world_process_zero() and partial.exists():
            shutil.rmtree(partial)
        if self.sharding is not None:
            assert self.optimizer is not None
            self._weights = self.whole_weights()
            self._moments = gather(self.optimizer.state_dict(), keep=self.args.should_save)
        wait()
        self._folder = str(partial)
        problem = ""
        try:
            with writing(output / name):
                super()._save_checkpoint(model, trial)
                if self.is_world_process_zero():
                    self._save_training_state(partial / name)
                    text = recipe_text(self.recipe)
                    (partial / name / RECIPE).write_text(text, encoding="utf-8")
        except ValueError as error:
            problem = str(error)
        finally:
            self._folder, self._weights, self._moments = None, None, {}
        self.agree(problem, partial=partial)
        try:
            if self.is_world_process_zero():
                with writing(output / name):
                    publish(partial / name, output / name)
                    partial.rmdir()
                    keep_last(output, self.recipe.run.keep_checkpoints)
        except ValueError as error:
            problem = str(error)
        self.agree(problem, partial=partial)

    def _save_training_state(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        state = model.training_state()
        if self._weights is not None:  # of shards
            state = {name: self._weights[name] for name in state}
        if state:
            save_file({name: x.contiguous() for name, x in state.items()}, folder / TRAINING_STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        target: Any = self.model if model is None else model
        wanted, path = set(target.training_state()), Path(resume_from_checkpoint) / TRAINING_STATE
        if not wanted:
            return
        state = load_file(path) if path.is_file() else {}
        if set(state) != wanted:
            raise ValueError(
                f"{path}: must hold the {len(wanted)} tensors that the model trains with, "
                f"got {len(state)}; remove the checkpoint to go on from an earlier one"
            )
        target.load_state_dict(state, strict=False)

    def agree(self, problem: str, found: Any = None, *, partial: Path | None = None) -> Any:
        """Go on when every process has come here, or stop all if one has a problem.

        Args:
            problem: of this process; "" for none.
            found: what the first process found.
            partial: folder to remove if there is a problem.

        Returns:
            What the first process found, on all of them.
        """
        said: list[Any] = [(problem, found)]
        if dist.is_initialized():
            said *= dist.get_world_size()
            dist.all_gather_object(said, (problem, found))
        problem = next(filter(None, (problem for problem, _ in said)), "")
        if problem:
            if partial is not None and self.is_world_process_zero():
                shutil.rmtree(partial, ignore_errors=True)
            last = last_checkpoint(self.output)
            raise ValueError(problem + (f"; the last checkpoint is {last[1]}" if last else ""))
        return said[0][1]

    def whole_weights(self) -> dict[str, Tensor] | None:
        """All weights where they are in shards, on the process that saves; None: they are not."""
        if self.sharding is None:
            return None
        assert self.model is not None
        state: dict[str, Tensor] = gather(self.model.state_dict(), keep=self.args.should_save)
        return state

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._weights is None:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir, state_dict=dict(self._weights))  # whose names are removed

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._moments:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self._moments, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")


def wait() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier()

"""`svitt pretrain`: a recipe to a trained model."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from svitt_ops.training.build import (
    build_collator,
    build_dataset,
    build_model,
    build_tokenizer,
    read_corpora,
)
from svitt_ops.training.callbacks import ProgressBar
from svitt_ops.training.checkpoints import FINAL, last_checkpoint, model_folder, whole_folder
from svitt_ops.training.datasets import GlobalBatches, SkipLog
from svitt_ops.training.gate import check_batches, check_run
from svitt_ops.training.recipes import Recipe, load_recipe, recipe_text
from svitt_ops.training.text import load_tokenizer, save_tokenizer
from svitt_ops.training.trainer import PretrainTrainer

if TYPE_CHECKING:
    from svitt_ops.models import SViTTForPreTraining

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run leaves behind."""

    model: SViTTForPreTraining
    folder: Path
    """Weights, configuration and tokenizer, as `svitt evaluate` or a next stage takes them."""
    skipped: SkipLog
    history: list[dict[str, float]]
    """What was logged, by step."""
    began_at: int
    """The step that it was resumed from; 0: the start."""


def pretrain(
    recipe: Recipe, *, callbacks: Sequence[TrainerCallback] = (), label: str = "pretrain"
) -> Trained:
    """Train what a recipe describes; resumes by itself where a killed run stopped.

    Under torchrun every process calls this, and the batch is shared among them.

    Args:
        recipe: what to train, on what.
        callbacks: more callbacks of transformers.Trainer.
        label: of the progress bar.
    """
    _quiet_transformers()
    recipe = check_run(recipe)
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    output = Path(recipe.output)
    set_seed(recipe.seed)  # the initial weights, on every process
    entries = read_corpora(recipe.data.train, recipe.data, "train")
    check_batches(entries, recipe.optimizer.batch_size // recipe.optimizer.accumulation)
    resumed = last_checkpoint(output)
    if resumed is None:
        tokenizer = build_tokenizer(recipe, entries)
    else:
        tokenizer = load_tokenizer(str(resumed[1]))
        _report_changes(output, recipe)
    model = build_model(recipe, tokenizer)
    dataset = build_dataset(recipe, entries, model.config.num_frames)
    settings = recipe.optimizer
    if settings.batch_size % (world * settings.accumulation):
        raise ValueError(
            f"recipe: optimizer.batch_size must be a multiple of {world} processes x"
            f" {settings.accumulation} accumulated batches, got {settings.batch_size}"
        )
    batches = GlobalBatches(
        dataset.items,
        settings.batch_size // settings.accumulation,
        seed=recipe.seed,
        rank=rank,
        world_size=world,
    )
    steps, warmup = _steps(recipe, batches.batches_per_epoch)
    arguments = _arguments(recipe, world, steps, model)
    trainer = PretrainTrainer(
        model,
        arguments,
        recipe,
        dataset,
        batches,
        build_collator(recipe, tokenizer, model.config),
        warmup,
    )
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    trainer.add_callback(ProgressBar(settings.batch_size, label))
    if recipe.run.tensorboard and rank == 0:
        trainer.add_callback(_tensorboard(output, resumed[0] if resumed else 0))
    for callback in callbacks:
        trainer.add_callback(callback)
    if rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        (output / "recipe.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    began_at = trainer.train_from_last()
    if rank == 0:
        with whole_folder(output / FINAL) as folder:
            model.save_pretrained(folder)
            save_tokenizer(tokenizer, folder)
    _report_skipped(trainer.skipped, output, rank)
    return Trained(
        model=model,
        folder=output / FINAL,
        skipped=trainer.skipped,
        history=trainer.state.log_history,
        began_at=began_at,
    )


def load_trained(path: str | Path) -> tuple[SViTTForPreTraining, Any, Path]:
    """Model and tokenizer of a run's folder, or of a folder with weights."""
    from svitt_ops.models import SViTTForPreTraining

    _quiet_transformers()
    folder = model_folder(path)
    return SViTTForPreTraining.from_pretrained(folder), load_tokenizer(str(folder)), folder


def _quiet_transformers() -> None:
    """Without its bars for loading, and its warning that it knows no `svitt` models."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _steps(recipe: Recipe, batches_per_epoch: int) -> tuple[int, int]:
    """Optimizer steps of the run and of its warm-up."""
    settings = recipe.optimizer
    per_epoch = batches_per_epoch / settings.accumulation
    total = settings.steps or math.floor(settings.epochs * per_epoch)
    if total < 1:
        raise ValueError(
            f"recipe: optimizer.epochs must make at least one step, of {per_epoch:g} an epoch,"
            f" got {settings.epochs:g}"
        )
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = round(settings.warmup_epochs * per_epoch)
    return total, warmup


def _arguments(
    recipe: Recipe, world: int, steps: int, model: SViTTForPreTraining
) -> TrainingArguments:
    settings, run = recipe.optimizer, recipe.run
    known = {f.name for f in fields(TrainingArguments)}
    unknown = sorted(set(run.trainer) - known)
    if unknown:
        raise ValueError(f"recipe: run.trainer has {unknown[0]!r}, no TrainingArguments has")
    if run.device not in (None, "cpu", "cuda"):
        raise ValueError(f"recipe: run.device must be 'cpu' or 'cuda', got {run.device!r}")
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("recipe: run.device is 'cuda', but torch sees no GPU here")
    on_cpu = run.device == "cpu" or not torch.cuda.is_available()
    # What newer versions of transformers call it, and what older ones do.
    names = ("activation_checkpointing", "gradient_checkpointing")
    recompute = next(name for name in names if name in known)
    values: dict[str, Any] = {
        "output_dir": recipe.output,
        "per_device_train_batch_size": settings.batch_size // (world * settings.accumulation),
        "gradient_accumulation_steps": settings.accumulation,
        "max_steps": steps,
        "learning_rate": settings.lr,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": run.precision == "bf16",
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and world > 1 else None,
        # A loss of weight 0 leaves its heads out of the graph.
        "ddp_find_unused_parameters": not all(model.config.loss_weights.values()),
        recompute: run.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": run.save_steps,
        "logging_steps": run.log_steps,
        "logging_nan_inf_filter": False,
        "dataloader_num_workers": recipe.data.workers,
        "remove_unused_columns": False,
        "ignore_data_skip": True,  # the batch sampler starts where the run stopped
        "disable_tqdm": True,
        "report_to": [],
        "seed": recipe.seed,
    }
    return TrainingArguments(**{**values, **run.trainer})


def _tensorboard(output: Path, step: int) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(str(output / "tensorboard"), purge_step=step))


def _report_changes(output: Path, recipe: Recipe) -> None:
    """Say which keys differ from those that the run was begun with."""
    stored = output / "recipe.yaml"
    if not stored.is_file():
        return
    before, after = (text.splitlines() for text in (_stored_text(stored), recipe_text(recipe)))
    for old, new in zip(before, after, strict=False):
        if old != new:
            log.warning("resuming with a changed recipe: %s -> %s", old.strip(), new.strip())


def _stored_text(path: Path) -> str:
    try:
        return recipe_text(load_recipe(path))
    except ValueError:  # of another version of the library
        return path.read_text(encoding="utf-8", errors="replace")


def _report_skipped(skipped: SkipLog, output: Path, rank: int) -> None:
    if skipped.reasons:
        path = output / f"skipped-{rank}.tsv"
        skipped.write(path)
        log.warning("%s: %s", skipped.summary(), path)

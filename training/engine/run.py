"""From a recipe to a trained model, whatever its system and its task."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from svitt_ops.training.data.datasets import GlobalBatches, SkipLog
from svitt_ops.training.data.text import load_tokenizer
from svitt_ops.training.engine.build import build_model, build_tokenizer, refuse_other_shapes
from svitt_ops.training.engine.callbacks import ProgressBar, TensorBoard, WriteRecipe
from svitt_ops.training.engine.changes import report_changes
from svitt_ops.training.engine.checkpoints import (
    BEST,
    BROKEN,
    FINAL,
    RECIPE,
    last_checkpoint,
    newest_whole,
    remove_partial,
    whole_folder,
    writing,
)
from svitt_ops.training.engine.gate import check_run
from svitt_ops.training.engine.loading import load_trained, quiet_transformers
from svitt_ops.training.engine.lock import own_folder
from svitt_ops.training.engine.publishing import Publisher
from svitt_ops.training.engine.recipes import Recipe, recipe_text
from svitt_ops.training.engine.sharding import KEYS, read_sharding
from svitt_ops.training.engine.task import Trainable, Validated, load_task
from svitt_ops.training.engine.trainer import RecipeTrainer
from svitt_ops.training.engine.validation import Evaluate, Validation, best_score, forget_best

log = logging.getLogger(__name__)
_OWN = "the optimizer is AdamW, with the values of `optimizer`"
UNUSED = {
    "output_dir": "set output",
    "per_device_train_batch_size": "set optimizer.batch_size",
    "num_train_epochs": "set optimizer.epochs",
    "report_to": "set run.report_to",
    "resume_from_checkpoint": "a run goes on from the newest checkpoint of its output",
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_beta1", "adam_beta2"), _OWN),
    **dict.fromkeys(("adam_epsilon", "optim", "optim_args", "optim_target_modules"), _OWN),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"), _OWN),
}
"""Of `run.trainer`: what the recipe or this package decides, and what to do instead."""

TENSORBOARD = "tensorboard"
LONGEST_WAIT = 24 * 3600
"""Seconds that processes wait for the one that evaluates."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run leaves behind."""

    model: PreTrainedModel
    folder: Path
    """Weights, configuration and tokenizer, as `svitt evaluate` or a next stage takes them."""
    best: Path | None
    """The same with the best score on `data.validation`; None: there was none."""
    skipped: SkipLog
    history: list[dict[str, float]]
    """What was logged, by step."""
    began_at: int
    """The step that it was resumed from; 0: the start."""


def pretrain(
    recipe: Recipe, *, callbacks: Sequence[TrainerCallback] = (), label: str | None = None
) -> Trained:
    """Train what a recipe describes; resumes by itself where a killed run stopped.

    Under torchrun every process calls this, and the batch is shared among them.

    Args:
        recipe: what to train, on what.
        callbacks: more callbacks of transformers.Trainer.
        label: of the progress bar; default: the task.
    """
    quiet_transformers()
    recipe = check_run(recipe)
    rank = int(os.environ.get("RANK", 0))
    output = Path(recipe.output)
    with own_folder(output) if rank == 0 else nullcontext():
        if rank == 0:
            remove_partial(output)
            if last_checkpoint(output) is None:
                forget_best(output)
        return _train(recipe, output, rank, callbacks, label or recipe.task)


def _train(
    recipe: Recipe, output: Path, rank: int, callbacks: Sequence[TrainerCallback], label: str
) -> Trained:
    world = int(os.environ.get("WORLD_SIZE", 1))
    settings, task = recipe.optimizer, load_task(recipe.task, Trainable)
    resumed, broken = newest_whole(output)
    if resumed is not None and settings.steps and resumed[0] >= settings.steps:
        return _trained_before(recipe, resumed, settings.steps, rank, task.HEAD)
    read_sharding(recipe)  # refused before anything is read, as what follows
    arguments = _arguments(recipe, world)
    set_seed(recipe.seed)  # the initial weights, on every process
    examples = task.read_examples(recipe)
    held_out: Any = None
    if recipe.data.validation and isinstance(task, Validated):
        held_out = task.read_validation(recipe)
    if resumed is None:
        tokenizer = build_tokenizer(recipe, examples)
    else:
        tokenizer = load_tokenizer(str(resumed[1]))
    fields_of = getattr(task, "model_fields", None)
    model = build_model(recipe, tokenizer, task.HEAD, fields_of(recipe) if fields_of else None)
    if resumed is not None:
        own = ("image_size", "num_frames", *model.config.own_fixed)
        refuse_other_shapes(model.config, resumed[1], also=own)
    dataset: Any = task.build_dataset(recipe, examples, model.config)
    del examples  # or forked workers would each come to own a copy
    batches = GlobalBatches(
        dataset.items,
        settings.batch_size // settings.accumulation,
        seed=recipe.seed,
        rank=rank,
        world_size=world,
    )
    steps, warmup = _steps(recipe, batches.batches_per_epoch)
    model.fit_epoch(max(1, round(batches.batches_per_epoch / settings.accumulation)))
    if resumed is not None and resumed[0] >= steps:
        return _trained_before(recipe, resumed, steps, rank, task.HEAD)
    if resumed is not None and rank == 0:
        report_changes(output / RECIPE, recipe)
        for path, reason in broken.items():
            text = "%s: %s; going on from %s, and it is renamed to %s"
            log.warning(text, path, reason, resumed[1].name, f"{BROKEN}{path.name}")
    known_now: dict[str, Any] = {
        "max_steps": steps,
        "ddp_find_unused_parameters": model.leaves_parameters_unused,
    }
    for name in known_now.keys() - recipe.run.trainer.keys():
        setattr(arguments, name, known_now[name])
    collator = task.build_collator(recipe, tokenizer, model.config)
    with _of_trainer(recipe):
        trainer = RecipeTrainer(model, arguments, recipe, task, dataset, batches, collator, warmup)
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    trainer.add_callback(ProgressBar(settings.batch_size, label))
    began_at = resumed[0] if resumed else 0
    publisher = Publisher(recipe=recipe, tokenizer=tokenizer, items=len(dataset.items))
    if held_out is not None and isinstance(task, Validated):
        trainer.validation = Validation(
            recipe=recipe,
            validate=partial(task.validate, recipe, tokenizer=tokenizer, examples=held_out),
            publisher=publisher,
            batches_per_epoch=batches.batches_per_epoch,
            steps=steps,
        )
        trainer.add_callback(Evaluate(trainer.validation))
    if rank == 0:
        trainer.add_callback(WriteRecipe(output / RECIPE, recipe_text(recipe)))
        if recipe.run.tensorboard or TENSORBOARD in recipe.run.report_to:
            trainer.add_callback(TensorBoard(output / TENSORBOARD, began_at))
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train_from(resumed, broken)
    trainer.refuse_weights_not_finite()
    weights = trainer.whole_weights()
    if rank == 0:
        _write_final(output, model, publisher, trainer.state.log_history, weights)
    if weights is not None:  # the model itself stays in shards
        trainer.accelerator.wait_for_everyone()
        model = load_trained(output / FINAL, task.HEAD)[0]
    _report_skipped(trainer.skipped, output, rank)
    return Trained(
        model=model,
        folder=output / FINAL,
        best=_best(output),
        skipped=trainer.skipped,
        history=trainer.state.log_history,
        began_at=began_at,
    )


def _trained_before(
    recipe: Recipe, last: tuple[int, Path], steps: int, rank: int, head: str
) -> Trained:
    """What a run that is complete left behind; its recipe stays, and no data is read."""
    step, folder = last
    output = Path(recipe.output)
    log.warning("already trained %d of %d steps: %s", step, steps, output)
    model, tokenizer, _ = load_trained(folder, head)
    if rank == 0 and not (output / FINAL / "config.json").is_file():  # killed before the end
        stored = output / RECIPE
        text = stored.read_text(encoding="utf-8") if stored.is_file() else ""
        publisher = Publisher(recipe=recipe, tokenizer=tokenizer, recipe_text=text)
        _write_final(output, model, publisher, [])
    return Trained(
        model=model,
        folder=output / FINAL,
        best=_best(output),
        skipped=SkipLog(),
        history=[],
        began_at=step,
    )


def _best(output: Path) -> Path | None:
    return output / BEST if best_score(output / BEST) is not None else None


def _write_final(
    output: Path,
    model: PreTrainedModel,
    publisher: Publisher,
    history: Sequence[dict[str, float]],
    weights: Any = None,
) -> None:
    last = next((row for row in reversed(history) if "loss" in row), {})
    numbers = {key: value for key, value in last.items() if key.startswith("loss")}
    with whole_folder(output / FINAL) as folder:
        publisher.write(model, folder, weights=weights, numbers=numbers)


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


@contextmanager
def _of_trainer(recipe: Recipe) -> Iterator[None]:
    """Name `run.trainer` in an error about what it says."""
    try:
        yield
    except Exception as error:  # of several packages, about arguments of any kind
        if not recipe.run.trainer:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"recipe: run.trainer must be what TrainingArguments take, got {recipe.run.trainer}"
            f" ({reason})"
        ) from error


def _arguments(recipe: Recipe, world: int) -> TrainingArguments:
    """All arguments that can be known before the data is read."""
    settings, run = recipe.optimizer, recipe.run
    if settings.batch_size % (world * settings.accumulation):
        raise ValueError(
            f"recipe: optimizer.batch_size must be a multiple of {world} processes x"
            f" {settings.accumulation} accumulated batches, got {settings.batch_size}"
        )
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("recipe: run.device is 'cuda', but torch sees no GPU here")
    on_cpu = run.device == "cpu" or not torch.cuda.is_available()
    # What newer versions of transformers call it, and what older ones do.
    known = {f.name for f in fields(TrainingArguments)}
    names = ("activation_checkpointing", "gradient_checkpointing")
    recompute = next(name for name in names if name in known)
    values: dict[str, Any] = {
        "output_dir": recipe.output,
        "per_device_train_batch_size": settings.batch_size // (world * settings.accumulation),
        "gradient_accumulation_steps": settings.accumulation,
        "max_steps": settings.steps or 1,  # of epochs they are counted later
        "learning_rate": settings.lr,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": run.precision == "bf16",
        "use_cpu": on_cpu,
        "ddp_timeout": LONGEST_WAIT if recipe.data.validation else 1800,
        "ddp_backend": "gloo" if on_cpu and world > 1 else None,
        recompute: run.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": run.save_steps,
        "logging_steps": run.log_steps,
        "logging_nan_inf_filter": False,
        "dataloader_num_workers": recipe.data.workers,
        "remove_unused_columns": False,
        "ignore_data_skip": True,  # the batch sampler starts where the run stopped
        "disable_tqdm": True,
        "report_to": [name for name in run.report_to if name != TENSORBOARD],
        "log_level_replica": "error",  # as this one's: what changed is said by key
        "seed": recipe.seed,
    }
    given = {key: value for key, value in run.trainer.items() if key not in (*KEYS, *UNUSED)}
    with _of_trainer(recipe):
        arguments = TrainingArguments(**{**values, **given})
    for key in run.trainer.keys() & UNUSED.keys():
        log.warning("run.trainer.%s has no effect: %s", key, UNUSED[key])
    if arguments.n_gpu > 1:
        # Trainer would wrap the model in nn.DataParallel, which splits the negatives of a batch.
        log.warning(
            "%d GPUs, of which one is used; all with torchrun --nproc-per-node %d"
            " -m svitt_ops.training pretrain ...",
            arguments.n_gpu,
            arguments.n_gpu,
        )
        arguments._n_gpu = 1
    return arguments


def _report_skipped(skipped: SkipLog, output: Path, rank: int) -> None:
    if skipped.reasons:
        path = output / f"skipped-{rank}.tsv"
        with writing(path):
            skipped.write(path)
        log.warning("%s: %s", skipped.summary(), path)

"""transformers.Trainer with this library's data order, losses, schedule and checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, TrainerControl, TrainingArguments

from svitt_ops.training.data.datasets import GlobalBatches, SkipLog
from svitt_ops.training.data.transport import leave_interrupts_to_parent
from svitt_ops.training.engine.checkpoints import set_aside
from svitt_ops.training.engine.finite import first_not_finite
from svitt_ops.training.engine.groups import parameter_groups
from svitt_ops.training.engine.process import (
    compile_backward_outside_autocast,
    keep_freed_memory,
)
from svitt_ops.training.engine.recipes import Recipe
from svitt_ops.training.engine.saving import SavingTrainer, wait
from svitt_ops.training.engine.schedule import learning_rate_factor
from svitt_ops.training.engine.sharding import fit_optimizer_state, shard, whole
from svitt_ops.training.engine.task import Trainable
from svitt_ops.training.engine.validation import Validation

log = logging.getLogger(__name__)


class RecipeTrainer(SavingTrainer):
    """The engine.

    Everything random in a step (sparse patterns, drop path, hard negatives) is drawn from a seed
    that is made of the run's seed and the step, and everything random in a clip from the clip's
    own. So a run that was killed goes on exactly as it would have, from any checkpoint, and
    processes that share a batch draw the same patterns.

    A loss or gradient that is not finite ends the run before the optimizer sees it, and weights
    that are not finite before they are saved, on all processes at once.
    """

    control: TrainerControl
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR | None

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        recipe: Recipe,
        task: Trainable,
        dataset: Dataset[Any],
        batches: GlobalBatches,
        collator: Callable[[Sequence[Any]], dict[str, Any]],
        warmup_steps: int,
    ) -> None:
        super().__init__(
            recipe, model=model, args=args, data_collator=collator, train_dataset=dataset
        )
        self.task = task
        self.dataset = dataset
        self.batches = batches
        self.warmup_steps = warmup_steps
        self.skipped = SkipLog()
        self.validation: Validation | None = None
        self.loss_is_scaled_for_ga = False  # the losses are means over a batch
        self._sums: dict[str, Tensor] = {}
        self._summed_at = 0  # the step that they begin after
        self._part = 0
        self._norm: Tensor | None = None

    def train_from(self, last: tuple[int, Path] | None, broken: Iterable[Path] = ()) -> None:
        """Train to the end.

        Args:
            last: step and folder of the checkpoint to go on from; None: from the start.
            broken: newer checkpoints, which are renamed.
        """
        compile_backward_outside_autocast()
        if self.args.device.type == "cpu":
            keep_freed_memory()
        wait()  # until every process has looked at them
        if self.is_world_process_zero():
            set_aside(broken)
        if last is not None:
            self._summed_at = last[0]
            self.batches.start = last[0] * self.args.gradient_accumulation_steps
        self.train(resume_from_checkpoint=None if last is None else str(last[1]))

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Not prepared by accelerate: the sampler knows its process, and where to start.
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=leave_interrupts_to_parent,
        )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over `parameter_groups`."""
        if self.optimizer is None:
            target = self.model if model is None else model
            assert target is not None
            if self.sharding is not None:
                # Here the weights of a checkpoint are in the model, and no optimizer has them.
                shard(self.model, self.sharding, self.args.device)
                self.accelerator.prepare_model(
                    self.model, device_placement=False, evaluation_mode=True
                )  # autocast; and what is prepared is not wrapped in DDP
            settings = self.recipe.optimizer
            self.optimizer = torch.optim.AdamW(
                parameter_groups(target, settings),
                lr=settings.lr,
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                # One pass over all parameters, where the kernel exists: CPU and CUDA.
                fused=self.args.device.type in ("cpu", "cuda"),
            )
            self.optimizer.register_load_state_dict_pre_hook(fit_optimizer_state)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            settings = self.recipe.optimizer

            def factor(step: int) -> float:
                return learning_rate_factor(
                    step,
                    total=num_training_steps,
                    warmup=self.warmup_steps,
                    floor=settings.min_lr_ratio,
                    decay=settings.decay,
                    drop=settings.drop,
                    drop_at=settings.drop_at,
                )

            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        for reason in self.skipped.add(inputs.pop("skipped")):
            log.warning("skipped: %s", reason)
        part = self._next_part()
        torch.manual_seed(hash_seed(self.args.seed, self.state.global_step, part))
        if part == 0:  # weights, and what follows them, move once for all accumulated batches
            with torch.no_grad():
                self.accelerator.unwrap_model(model).before_step()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._refuse_not_finite(self.accelerator.unwrap_model(model))
        return loss

    def _refuse_not_finite(self, model: torch.nn.Module) -> None:
        """Stop before a step whose losses, or gradient, are not finite on any process.

        Costs one read of a few numbers, for which the next batch's transfer would have waited.
        """
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self._norm = whole(torch.nn.utils.get_total_norm(gradients))
        name = first_not_finite([*self._sums.items(), ("the gradient", self._norm)])
        if name is None:
            return
        if name not in self._sums:
            named = ((n, p if p.grad is None else p.grad) for n, p in model.named_parameters())
            parameter = first_not_finite(named)  # none: the sum of squares overflows
            name = f"the gradient of {parameter}" if parameter else "the norm of the gradient"
        self.stop(f"{name} is not finite in step {self.state.global_step + 1}")

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # Spares a second pass over the gradients where nothing is clipped.
        return self._norm if grad_norm is None else grad_norm

    def _next_part(self) -> int:
        """Which of a step's accumulated batches this is."""
        part = self._part
        self._part = (part + 1) % self.args.gradient_accumulation_steps
        return part

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        config = self.accelerator.unwrap_model(model).config
        outputs = model(**self.task.model_inputs(self.recipe, config, inputs))
        for name, value in outputs.items():  # those that are not None
            if name.startswith("loss_"):
                total = self._sums.get(name)
                self._sums[name] = value.detach() + (0 if total is None else total)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluate on one process, while the others wait; what it finds is logged as `eval_...`."""
        assert self.validation is not None
        self.refuse_weights_not_finite()
        weights, problem = self.whole_weights(), ""
        found: dict[str, float] = {}
        if self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model)
            if weights is not None:  # of shards: a whole copy
                model = type(model)(model.config).to(self.args.device)
                model.load_state_dict(weights)
            try:
                found = self.validation.run(model, self.state.global_step)
            except ValueError as error:
                problem = str(error)
        found = self.agree(problem, found)
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log({**metrics})  # which adds to it
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, the temperature and the true epoch."""
        if "loss" in logs and self._sums:
            sums = torch.stack([self._sums[name].float() for name in self._sums])
            steps = self.state.global_step - self._summed_at
            self._summed_at = self.state.global_step
            if dist.is_initialized():
                dist.all_reduce(sums)
            parts = sums / (self.args.world_size * steps * self.args.gradient_accumulation_steps)
            logs |= dict(zip(self._sums, parts.tolist(), strict=True))
            self._sums = {}
            temperature = getattr(self.accelerator.unwrap_model(self.model), "temperature", None)
            if temperature is not None:
                logs["temperature"] = whole(temperature.detach()).item()
        batches = self.state.global_step * self.args.gradient_accumulation_steps
        self.state.epoch = batches / self.batches.batches_per_epoch
        super().log(logs, start_time)


def hash_seed(*numbers: int) -> int:
    """A seed from several numbers, without the collisions of their sum."""
    seed = 0x9E3779B97F4A7C15
    for number in numbers:  # splitmix64, one round per number
        seed = (seed ^ number) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        seed = (seed ^ seed >> 31) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        seed ^= seed >> 29
    return seed & 0x7FFFFFFFFFFFFFFF

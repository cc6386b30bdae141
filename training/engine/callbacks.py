"""What a run shows while it runs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from svitt_ops.training.engine.checkpoints import write_whole

log = logging.getLogger(__name__)


class ProgressBar(TrainerCallback):
    """One bar over all clips of the run, with clips/s and the parts of the loss."""

    def __init__(self, batch_size: int, label: str) -> None:
        self.batch_size = batch_size
        self.label = label
        self.bar: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps * self.batch_size,
                initial=state.global_step * self.batch_size,
                desc=self.label,
                unit="clip",
                unit_scale=True,
                mininterval=0.5,
                dynamic_ncols=True,
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if self.bar is not None:
            self.bar.update(self.batch_size)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.bar is None or not logs:
            return
        shown = {
            name.removeprefix("loss_"): f"{value:.3f}"
            for name, value in logs.items()
            if name.startswith("loss")
        }
        if shown:
            self.bar.set_postfix(shown, refresh=False)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.bar is not None and metrics:
            shown = (f"{name.removeprefix('eval_')} {x:.1f}" for name, x in metrics.items())
            line = f"{self.label}: step {state.global_step}: {', '.join(shown)}"
            tqdm.write(line, file=sys.stderr)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class WriteRecipe(TrainerCallback):
    """Writes the run's recipe when training begins: whatever it goes on from has been loaded."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.text = text

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        write_whole(self.path, self.text)


class TensorBoard(TensorBoardCallback):
    """Points of a run, across its resumptions; without space for them it goes on, and says so.

    Args:
        folder: of the event files.
        step: that the run goes on from. Points of later steps, of before it was killed, are hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.failed = False
        with self._guard():
            super().__init__(SummaryWriter(str(folder), purge_step=step + 1))

    def on_train_begin(self, *given: Any, **more: Any) -> None:
        with self._guard():
            if not self.failed:
                super().on_train_begin(*given, **more)

    def on_log(self, *given: Any, **more: Any) -> None:
        with self._guard():
            if not self.failed:
                super().on_log(*given, **more)

    def on_save(self, *_: Any, **__: Any) -> None:
        """Bring the points to the disk with the checkpoint that a run may go on from."""
        with self._guard():
            if not self.failed:
                self.tb_writer.flush()

    def on_train_end(self, *given: Any, **more: Any) -> None:
        with self._guard():
            if not self.failed:
                super().on_train_end(*given, **more)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = True
            reason = error.strerror or error
            log.warning("%s: no more points are written here: %s", self.folder, reason)

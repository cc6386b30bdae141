"""Runs in this process and in others, and what they logged."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from svitt_ops.training.cli import main
from svitt_ops.training.engine.recipes import Recipe, recipe_text
from svitt_ops.training.engine.run import Trained

PARTS = ("loss", "loss_vtc", "loss_vtm", "loss_mlm", "loss_scl")
DENSE = {
    "edge_sparsity": False,
    "keep_rate": 1.0,
    "prune_layers": [],
    "multimodal_keep_rate": 1.0,
    "multimodal_prune_layers": [],
}
"""What to change in the small model for a system without sparsity."""
OF_PICTURES: dict[str, dict[str, Any]] = {
    "albef": {},
    "simla": {"fusion_layer": 0, "unpaired_layers": 1, "masked_patches": 2, "image_vocab_size": 8},
    "softmask": {"mask_layer": 1},
}
"""The systems of pictures, and what a small model of each has besides."""
LONG = 100_000  # steps that no test waits for
ENOUGH = 600  # seconds in which any process ends, however busy the machine is


class StopAt(TrainerCallback):
    """Ends a run early, without changing its schedule."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def losses(trained: Trained) -> dict[int, tuple[float, ...]]:
    """All parts of the loss by step, from where the run began."""
    found = {}
    for entry in trained.history:
        if "loss" in entry and entry["step"] > trained.began_at:
            found[int(entry["step"])] = tuple(entry[part] for part in PARTS if part in entry)
    return found


def write(recipe: Recipe, path: Path) -> Path:
    path.write_text(recipe_text(recipe))
    return path


def run(*command: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # What goes wrong is on stderr, which pytest shows of a failed test.
    return subprocess.Popen(command, env=environment, **{"stdout": subprocess.DEVNULL, **options})


def run_killed(step: int, *command: str) -> None:
    """`svitt` with these words, killed in the middle of writing the checkpoint of a step."""
    # Forked from a process that has imported all there is to: that takes longer than the training.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["running", "svitt_ops.training.engine.run"])
    process = context.Process(target=_killed, args=(step, command))
    process.start()
    process.join(ENOUGH)
    code = process.exitcode
    # Its workers wait for ever: each keeps the server that forked it, which it takes for the run.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert code == -signal.SIGKILL


def _killed(step: int, command: tuple[str, ...]) -> None:
    os.setsid()
    torch.set_num_threads(1)
    real = torch.save

    def save(content: Any, path: Any, *arguments: Any, **options: Any) -> None:
        real(content, path, *arguments, **options)
        if f"checkpoint-{step}" in str(path) and "optimizer" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save  # type: ignore[assignment]
    main(list(command))


def torchrun(*command: str, **options: Any) -> subprocess.Popen[bytes]:
    """Two processes."""
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return run(*start, "--nproc-per-node", "2", *command, **options)

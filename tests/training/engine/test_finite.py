"""Runs that diverge: they stop at the first number that is not finite, and lose nothing."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ENOUGH, torchrun, write
from safetensors.torch import load_file
from transformers import TrainerCallback

from svitt_ops.training.cli import main
from svitt_ops.training.engine.checkpoints import checkpoints
from svitt_ops.training.engine.loading import load_trained
from svitt_ops.training.engine.run import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


class Poison(TrainerCallback):
    """Calls a function with the model before or after the fourth step."""

    def __init__(self, change: Callable[[Any], None], event: str) -> None:
        self.change = change
        self.done = 3 if event == "on_step_begin" else 4
        setattr(self, event, self._poison)

    def _poison(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.done:
            with torch.no_grad():
                self.change(model)


def nothing_lost(output: Path, steps: list[int]) -> None:
    assert [step for step, _ in checkpoints(output)] == steps
    for _, path in checkpoints(output):
        for name, value in load_file(path / "model.safetensors").items():
            assert value.isfinite().all(), name
    assert not (output / "final").exists()
    assert not list(output.glob(".*"))
    load_trained(output)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_learning_rate_that_is_too_high(make_recipe: Any, tmp_path: Path, precision: str) -> None:
    options = ("optimizer.lr=1e6", "run.save_steps=1", f"run.precision={precision}")
    # Which number overflows first, and when, is a matter of the processor's rounding.
    with pytest.raises(ValueError, match=r" is not finite in step [23]: training stop") as caught:
        pretrain(make_recipe(tmp_path / "run", *options))
    done = int(str(caught.value).partition(" in step ")[2][0]) - 1
    assert f"the last checkpoint is {tmp_path / 'run' / f'checkpoint-{done}'};" in str(caught.value)
    nothing_lost(tmp_path / "run", [*range(1, done + 1)])


def hooked(model: Any) -> None:
    model.match_head.weight.register_hook(lambda gradient: gradient * math.nan)


def huge(model: Any) -> None:
    model.match_head.weight.register_hook(lambda gradient: gradient * 0 + 1e30)


POISONS = {
    "loss_vtc is not finite in step 4": lambda m: m.temperature.fill_(math.nan),
    "loss_vtm is not finite in step 4": lambda m: m.match_head.bias.fill_(math.inf),
    "loss_mlm is not finite in step 4": lambda m: m.token_head.bias.fill_(-math.inf),
    "the gradient of match_head.weight is not finite in step 4": hooked,
    "the norm of the gradient is not finite in step 4": huge,
    "match_head.bias is not finite after step 4": lambda m: m.match_head.bias.fill_(math.inf),
}


@pytest.mark.parametrize("message", POISONS)
def test_what_is_not_finite_is_named(make_recipe: Any, tmp_path: Path, message: str) -> None:
    event = "on_step_end" if "after" in message else "on_step_begin"
    options = ("run.save_steps=2", "run.log_steps=10", "optimizer.max_grad_norm=1")
    recipe = make_recipe(tmp_path / "run", *options, "optimizer.accumulation=2")
    with pytest.raises(ValueError, match=f"^{message}: training stopped") as caught:
        pretrain(recipe, callbacks=[Poison(POISONS[message], event)])
    assert f"the last checkpoint is {tmp_path / 'run' / 'checkpoint-2'}" in str(caught.value)
    assert "\n" not in str(caught.value)
    nothing_lost(tmp_path / "run", [2])


def test_the_final_model_is_finite_or_not_there(make_recipe: Any, tmp_path: Path) -> None:
    """Also where no checkpoint is saved with it."""

    class AtTheEnd(TrainerCallback):
        def on_train_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            model.match_head.bias.data.fill_(math.nan)

    recipe = make_recipe(tmp_path / "run", "optimizer.steps=1")
    with pytest.raises(ValueError, match=r"^match_head.bias is not finite after step 1: "):
        pretrain(recipe, callbacks=[AtTheEnd()])
    nothing_lost(tmp_path / "run", [1])


def test_the_command_exits_with_2(
    make_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(make_recipe(tmp_path / "run", "optimizer.lr=1e6"), tmp_path / "r.yaml")
    assert main(["pretrain", "--config", str(path)]) == 2
    errors = capsys.readouterr().err
    (line,) = (line for line in errors.splitlines() if line.startswith("svitt pretrain: "))
    assert " is not finite in step " in line and ": training stopped, no checkpoint was" in line
    assert not list((tmp_path / "run").glob("[cf]*"))


@pytest.mark.timeout(ENOUGH)
def test_all_processes_stop_when_one_is_not_finite(make_recipe: Any, tmp_path: Path) -> None:
    """The loss of masked tokens is each process's own."""
    path = write(make_recipe(tmp_path / "run", "run.save_steps=2"), tmp_path / "r.yaml")
    script = tmp_path / "poisoned.py"
    script.write_text("""
import os, sys, torch
from pathlib import Path
from transformers import TrainerCallback
from svitt_ops.training.engine.run import pretrain
from svitt_ops.training.engine.recipes import load_recipe

class Poison(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 3 and os.environ["RANK"] == "1":
            model.token_head.bias.data.fill_(-torch.inf)

try:
    pretrain(load_recipe(sys.argv[1]), callbacks=[Poison()])
except ValueError as error:
    Path(sys.argv[2], os.environ["RANK"]).write_text(str(error))
""")
    process = torchrun(str(script), str(path), str(tmp_path))
    assert process.wait(timeout=ENOUGH) == 0
    said = [(tmp_path / rank).read_text() for rank in "01"]
    assert said[0] == said[1]
    assert said[0].startswith("loss_mlm is not finite in step 4: training stopped")
    nothing_lost(tmp_path / "run", [2])

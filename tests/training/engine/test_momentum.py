"""A model with a momentum twin in the engine: killed and resumed, and what it leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from running import DENSE, StopAt, losses
from safetensors.torch import load_file

from svitt_ops.training.engine.run import pretrain
from svitt_ops.training.engine.saving import TRAINING_STATE

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = {
    **DENSE,
    "bias_init_std": 0.0,
    "num_frames": 1,
    "queue_size": 12,
    "momentum": 0.5,
    "alpha_warmup_steps": 5,
    "text_dropout": 0.1,
}


@pytest.fixture
def make(make_recipe: Any, tmp_path: Path) -> Any:
    options = ("system=albef", "run.save_steps=3", "optimizer.lr=1e-2")
    return lambda name: make_recipe(tmp_path / name, *options, **MODEL)


def test_stopped_and_resumed(make: Any, tmp_path: Path) -> None:
    """The twin, the queues and the share of the twin go on as they were."""
    whole = pretrain(make("whole"))
    assert len(losses(whole)) == 6 and all(len(parts) == 4 for parts in losses(whole).values())
    stopped = pretrain(make("stopped"), callbacks=[StopAt(3)])
    assert len(losses(stopped)) == 3
    resumed = pretrain(make("stopped"))
    assert resumed.began_at == 3
    assert losses(resumed) == {step: x for step, x in losses(whole).items() if step > 3}
    one, other = (
        load_file(tmp_path / name / "checkpoint-6" / TRAINING_STATE)
        for name in ("whole", "stopped")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert int(one["steps"]) == 6 and int(one["queue.next"]) == 6 * 8 % 12


def test_what_a_run_leaves(make: Any, tmp_path: Path) -> None:
    """One copy of the model for use, and none of the twin in the optimizer."""
    trained = pretrain(make("run"))
    run, model = tmp_path / "run", trained.model
    for folder in (run / "final", run / "checkpoint-6"):
        stored = load_file(folder / "model.safetensors")
        assert not any(name.startswith(model.training_only) for name in stored)
    assert not (run / "final" / TRAINING_STATE).exists()
    optimizer = torch.load(run / "checkpoint-6" / "optimizer.pt", weights_only=True)
    learned = [p for p in model.parameters() if p.requires_grad]
    assert len(optimizer["state"]) == len(learned) < len(list(model.parameters()))
    twin, own = (m.fusion.layers[0].mlp.up.weight for m in (model.teacher, model))
    assert not torch.equal(twin, own)


def test_a_checkpoint_without_the_twin_is_refused(make: Any, tmp_path: Path) -> None:
    pretrain(make("run"), callbacks=[StopAt(3)])
    (tmp_path / "run" / "checkpoint-3" / TRAINING_STATE).unlink()
    with pytest.raises(ValueError, match=r"training_state.safetensors: must hold the \d+ tensors"):
        pretrain(make("run"))

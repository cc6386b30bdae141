"""FSDP2 on two CPU processes: the losses of one process, and checkpoints that any number reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import DENSE, ENOUGH, losses, torchrun, write
from safetensors.torch import load_file

from svitt_ops.training.engine.loading import load_trained
from svitt_ops.training.engine.run import pretrain
from svitt_ops.training.engine.saving import TRAINING_STATE
from svitt_ops.training.engine.sharding import Sharding, read_sharding

pytestmark = pytest.mark.usefixtures("one_thread")
# The other losses are means over what each process masks and draws.
ALONE = {"loss_weights": {"vtc": 1, "vtm": 0, "mlm": 0}}
OPTIONS = ("optimizer.steps=4", "run.save_steps=2", "optimizer.max_grad_norm=1")


def logged(output: Path) -> dict[int, float]:
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


@pytest.mark.timeout(ENOUGH)
def test_two_shards_equal_one_process(make_recipe: Any, tmp_path: Path) -> None:
    output = tmp_path / "two"
    fsdp = ("run.trainer.fsdp=full_shard", "run.trainer.fsdp_config.version=2")
    path = write(make_recipe(output, *OPTIONS, *fsdp, **ALONE), tmp_path / "two.yaml")
    command = ("-m", "svitt_ops.training", "pretrain", "--config", str(path))
    assert torchrun(*command).wait(timeout=ENOUGH) == 0
    one = pretrain(make_recipe(tmp_path / "one", *OPTIONS, **ALONE))
    wanted = {step: parts[0] for step, parts in losses(one).items()}
    assert logged(output) == pytest.approx(wanted, rel=1e-5)
    model, _, _ = load_trained(output)
    assert model.config.architectures == ["SViTTForPreTraining"]
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    moments = torch.load(output / "checkpoint-4" / "optimizer.pt")["state"]
    of_one = torch.load(tmp_path / "one" / "checkpoint-4" / "optimizer.pt")["state"]
    assert moments.keys() == of_one.keys()
    for number, state in of_one.items():
        for name, value in state.items():
            torch.testing.assert_close(moments[number][name], value, rtol=1e-3, atol=1e-5)

    # From the checkpoint in the middle: sharded as before, and whole on one process.
    shutil.rmtree(output / "checkpoint-4")
    shutil.rmtree(output / "final")
    shutil.copytree(output, tmp_path / "alone")
    before = load_file(output / "checkpoint-2" / "model.safetensors")
    assert torchrun(*command).wait(timeout=ENOUGH) == 0
    assert logged(output) == pytest.approx(wanted, rel=1e-5)
    again, _, _ = load_trained(output)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert not torch.equal(before["temperature"], again.temperature)
    alone = pretrain(make_recipe(tmp_path / "alone", *OPTIONS, **ALONE))
    assert alone.began_at == 2
    assert {step: parts[0] for step, parts in losses(alone).items()} == pytest.approx(
        {3: wanted[3], 4: wanted[4]}, rel=1e-5
    )


def test_what_is_asked_for(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*options: str) -> Sharding | None:
        return read_sharding(make_recipe(tmp_path, *(f"run.trainer.{x}" for x in options)))

    assert read() is None
    assert read("fsdp=false") is None
    with pytest.raises(
        ValueError, match=r"^recipe: run.trainer.fsdp shares a model among .*torchrun"
    ):
        pretrain(make_recipe(tmp_path / "run", "run.trainer.fsdp=true"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read("fsdp=true") == Sharding()
    assert read("fsdp=full_shard auto_wrap") == Sharding()
    assert read("fsdp=shard_grad_op") == Sharding(reshard=False)
    config = "fsdp_config={fsdp_reshard_after_forward: false, transformer_layer_cls_to_wrap: A}"
    assert read("fsdp=[full_shard]", config) == Sharding(layers=("A",), reshard=False)
    for option in ("fsdp=hybrid_shard", "fsdp=3", "fsdp=[[a]]", "fsdp=full_shard shard_grad_op"):
        with pytest.raises(ValueError, match=r"^recipe: run.trainer.fsdp must be true, 'full_sh"):
            read(option)
    with pytest.raises(ValueError, match=r"layer_cls_to_wrap must be names of classes, got \[5\]"):
        read("fsdp=true", "fsdp_config.transformer_layer_cls_to_wrap=[5]")
    for option in ("cpu_offload=true", "version=1"):
        with pytest.raises(ValueError, match=f"^recipe: run.trainer.fsdp_config has {option[:7]}"):
            read("fsdp=true", f"fsdp_config.{option}")


@pytest.mark.timeout(ENOUGH)
def test_a_twin_and_its_queues_are_sharded_too(make_recipe: Any, tmp_path: Path) -> None:
    """Losses, twin and queues of one process; a run that goes on has the same, bit by bit."""
    model = {**DENSE, **ALONE, "bias_init_std": 0.0, "num_frames": 1}
    model |= {"queue_size": 20, "momentum": 0.5, "alpha_warmup_steps": 2}
    options = ("system=albef", "optimizer.steps=4", "run.save_steps=2")
    output, shards = tmp_path / "two", "run.trainer.fsdp=full_shard"
    path = write(make_recipe(output, *options, shards, **model), tmp_path / "two.yaml")
    command = ("-m", "svitt_ops.training", "pretrain", "--config", str(path))
    assert torchrun(*command).wait(timeout=ENOUGH) == 0
    one = pretrain(make_recipe(tmp_path / "one", *options, **model))
    found, state = logged(output), load_file(output / "checkpoint-4" / TRAINING_STATE)
    assert found == pytest.approx({k: x[0] for k, x in losses(one).items()}, rel=1e-5)
    wanted = load_file(tmp_path / "one" / "checkpoint-4" / TRAINING_STATE)
    assert state.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(state[name], x, rtol=1e-3, atol=1e-4, msg=name)
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(output / name)
    assert torchrun(*command).wait(timeout=ENOUGH) == 0
    assert logged(output) == found
    again = load_file(output / "checkpoint-4" / TRAINING_STATE)
    assert all(torch.equal(again[name], x) for name, x in state.items())

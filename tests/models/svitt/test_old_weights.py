"""A temperature that is a scalar, as earlier weights have it; and `fully_shard` without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from svitt_ops.models import SViTTConfig, SViTTForPreTraining


@pytest.fixture
def model(make_config: Any) -> SViTTForPreTraining:
    torch.manual_seed(0)
    model = SViTTForPreTraining(make_config())
    model.temperature.data.fill_(0.125)
    return model


def scalar(state: dict[str, Tensor]) -> dict[str, Tensor]:
    assert state["temperature"].shape == (1,)
    return {**state, "temperature": state["temperature"].reshape(())}


def test_from_pretrained(model: SViTTForPreTraining, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for folder in ("new", "old", "again"):
        model.save_pretrained(tmp_path / folder)
        assert load_file(tmp_path / folder / "model.safetensors")["temperature"].shape == (1,)
        if folder == "old":
            old = scalar(load_file(tmp_path / "old" / "model.safetensors"))
            save_file(old, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
        wanted = {name: value.clone() for name, value in model.state_dict().items()}
        model = SViTTForPreTraining.from_pretrained(tmp_path / folder)
        assert model.state_dict().keys() == wanted.keys()
        assert all(torch.equal(x, wanted[name]) for name, x in model.state_dict().items())


def test_load_state_dict(model: SViTTForPreTraining) -> None:
    old = scalar(model.state_dict())
    other = SViTTForPreTraining(model.config)
    assert str(other.load_state_dict(old)) == "<All keys matched successfully>"
    assert torch.equal(other.temperature, model.temperature)
    nested = torch.nn.Sequential(other)
    nested.load_state_dict({f"0.{name}": value for name, value in old.items()})


def test_the_losses_are_those_of_a_scalar(
    model: SViTTForPreTraining, batch: dict[str, Tensor]
) -> None:
    def run() -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        found = model(**batch)
        model.zero_grad()
        found.loss.backward()
        return [found.loss, found.loss_vtc, found.loss_vtm, found.loss_mlm], model.temperature.grad

    parts, gradient = run()
    assert gradient.shape == (1,)
    model.temperature = torch.nn.Parameter(model.temperature.detach().reshape(()))
    wanted, wanted_gradient = run()
    assert all(torch.equal(x, y) for x, y in zip(parts, wanted, strict=True))
    assert torch.equal(gradient[0], wanted_gradient)


def test_fully_shard_in_one_process(model: SViTTForPreTraining, batch: dict[str, Tensor]) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    wanted = model(**batch).loss
    wanted.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    sharded = SViTTForPreTraining(SViTTConfig(**model.config.to_dict()))
    sharded.load_state_dict(model.state_dict())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(sharded, mesh=mesh)
        torch.manual_seed(0)
        loss = sharded(**batch).loss
        loss.backward()
        torch.testing.assert_close(loss, wanted)
        for name, parameter in sharded.named_parameters():
            if gradients[name] is not None:
                torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name])
        sharded.clamp_temperature()
        assert sharded.temperature.full_tensor().item() == 0.125
    finally:
        dist.destroy_process_group()

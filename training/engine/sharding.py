"""FSDP2 (`torch.distributed.fsdp.fully_shard`): parameters, gradients and moments in shards.

Checkpoints hold whole tensors under the names and in the order of unsharded training, so that any
number of processes, sharded or not, goes on from them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from svitt_ops.training.engine.recipes import Recipe

KEYS = ("fsdp", "fsdp_config")
"""Of `run.trainer`: read here, and kept from transformers, which shards on GPUs alone."""
WAYS = (["full_shard"], ["shard_grad_op"])
CONFIG = ("version", "reshard_after_forward", "transformer_layer_cls_to_wrap")


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a model is sharded."""

    layers: tuple[str, ...] | None = None
    """Classes of the modules that are gathered one at a time; None: the model's own choice."""
    reshard: bool = True
    """Free a layer's gathered parameters between its forward and its backward."""


def read_sharding(recipe: Recipe) -> Sharding | None:
    """What `run.trainer.fsdp` and `run.trainer.fsdp_config` ask for; None: nothing.

    Raises:
        ValueError: it is something else than FSDP2 with whole checkpoints can do.
    """
    wanted = recipe.run.trainer.get("fsdp")
    config = recipe.run.trainer.get("fsdp_config") or {}
    if not wanted:
        return None
    words = "full_shard" if wanted is True else wanted
    words = words.split() if isinstance(words, str) else words
    # transformers' words; "auto_wrap" says what is done anyway.
    names = words if isinstance(words, list) else []
    if sorted({*map(str, names)} - {"auto_wrap"}) not in WAYS:
        raise ValueError(
            "recipe: run.trainer.fsdp must be true, 'full_shard' or 'shard_grad_op',"
            f" got {wanted!r}"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise ValueError(
            "recipe: run.trainer.fsdp shares a model among processes, and there is one: start"
            " several with torchrun --nproc-per-node N -m svitt_ops.training pretrain ..."
        )
    if not isinstance(config, Mapping):
        raise ValueError(f"recipe: run.trainer.fsdp_config must be a mapping, got {config!r}")
    config = {str(key).removeprefix("fsdp_"): value for key, value in config.items()}
    for key, value in config.items():
        if key not in CONFIG or (key == "version" and str(value) != "2"):
            raise ValueError(
                f"recipe: run.trainer.fsdp_config has {key}={value!r}; known: version=2,"
                " reshard_after_forward, transformer_layer_cls_to_wrap"
            )
    layers = config.get("transformer_layer_cls_to_wrap", [])
    layers = [layers] if isinstance(layers, str) else layers or []
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise ValueError(
            "recipe: run.trainer.fsdp_config.transformer_layer_cls_to_wrap must be names of"
            f" classes, got {layers!r}"
        )
    return Sharding(
        layers=tuple(layers) or None,
        reshard=bool(config.get("reshard_after_forward", "full_shard" in names)),
    )


def shard(model: PreTrainedModel, sharding: Sharding, device: torch.device) -> None:
    """Shard a model in place over all processes, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    classes = sharding.layers or tuple(model._no_split_modules or ())
    found = [m for m in model.modules() if type(m).__name__ in classes]
    missing = set(sharding.layers or ()) - {type(m).__name__ for m in found}
    if missing:
        raise ValueError(
            "recipe: run.trainer.fsdp_config.transformer_layer_cls_to_wrap must name classes of"
            f" the model's modules, got {sorted(missing)[0]!r}"
        )
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*found, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=sharding.reshard)


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor."""
    found: Tensor = tensor.to_local() if _is_sharded(tensor) else tensor
    return found


def whole(content: Any) -> Any:
    """Tensors in nested content, in full; every process must call this."""
    return tree_map(lambda x: x.full_tensor() if _is_sharded(x) else x, content)


def gather(content: Any, keep: bool) -> Any:
    """As `whole`, on the CPU, where `keep` says that this process wants it; one at a time."""

    def fetch(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        found = whole(value)
        return found.detach().cpu() if keep else None

    return tree_map(fetch, content)


def fit_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Give a loaded state's tensors their parameters' shape and shards.

    A hook of `Optimizer.register_load_state_dict_pre_hook`. The shape differs for a parameter
    that was a scalar in an earlier version.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    fitted = dict(state["state"])
    for number, parameter in zip(numbers, parameters, strict=False):
        if number in fitted:
            fitted[number] = {
                name: _fit(value, parameter) if name != "step" else value
                for name, value in fitted[number].items()
            }
    return {**state, "state": fitted}


def _fit(value: Any, parameter: Any) -> Any:
    if not isinstance(value, Tensor) or value.numel() != parameter.numel():
        return value
    value = value.reshape(parameter.shape)
    if not _is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    # Every process has read the same file: nothing is sent.
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)


def _is_sharded(value: Any) -> Any:
    if not isinstance(value, Tensor) or type(value) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)

"""What losses over the ranks of a process group share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_group(op: str, group: ProcessGroup) -> None:
    """A process group that contains this rank."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{op}: group must be of an initialised torch.distributed, got {type(group).__name__}"
        )
    if not torch.compiler.is_compiling() and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group must be a ProcessGroup, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError(f"{op}: group must contain this rank, got {group!r}")


def first_row(op: str, query: Tensor, group: ProcessGroup) -> int:
    """Where this rank's rows begin in the batch of all, which have as many each."""
    local = query.shape[0]
    sizes = gather(torch.tensor([local], device=query.device), group)
    if query.device.type == "cpu" and bool((sizes != local).any()):
        raise ValueError(f"{op}: query must have as many rows on every rank, got {sizes.tolist()}")
    return torch.distributed.get_rank(group) * local


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """The rows of all ranks, in their order."""
    ranks = torch.distributed.get_world_size(group)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks)]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def refuse_vmap(op: str) -> None:
    """A loss over ranks has no rule for `torch.vmap`."""
    raise NotImplementedError(f"{op}: vmap (and so jacrev) is not available over a group")

"""Numbers that are not finite, found on all processes alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from svitt_ops.training.engine.sharding import local


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first name whose tensor holds NaN or infinity on any process; None: there is none.

    Every process must give the same names in the same order. One number per tensor is computed
    where the tensors are, and one read.
    """
    names: list[str] = []
    flags: list[Tensor] = []
    for name, value in named:
        names.append(name)
        flags.append(local(value.detach()).isfinite().all())
    bad = torch.stack(flags).logical_not().to(torch.int32)
    if dist.is_initialized():
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    found = bad.nonzero()
    return names[int(found[0])] if len(found) else None

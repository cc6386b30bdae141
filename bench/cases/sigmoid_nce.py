"""Cases of `sigmoid_nce`: from the batch of one GPU to large ones, where SigLIP's training begins.

The floor: ``2 B B D`` FLOP forward, and twice as many for the gradients of both sides, whose
weights need no second pass. A peer that does not keep the matrix computes it again, for one third
more. Temperature and bias are those of SigLIP's start.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so
from bench.measure.harness import DTYPES, Case, Expected, Problem, Provider
from bench.peers import sigmoid as peers


def cases(device: str) -> list[Case]:
    """Batch sizes by embedding width; ids; pairs that are mostly right already."""
    if device == "cuda":
        dtypes, sizes = ("bf16",), ((32, 256), (4096, 256), (16384, 512))
    else:
        dtypes, sizes = ("fp32", "bf16"), ((32, 256), (1024, 256), (4096, 256), (8192, 256))
    found = []
    for dtype in dtypes:
        for rows, dim in sizes:
            found.append(_case(device, dtype, rows, dim, quick=rows == sizes[1][0]))
        rows, dim = sizes[1]
        found.append(_case(device, dtype, rows, dim, "ids", ids=True))
        found.append(_case(device, dtype, rows, dim, "cold", temperature=0.02, bias=-20.0))
    return found


def _case(
    device: str,
    dtype: str,
    rows: int,
    dim: int,
    suffix: str = "",
    *,
    quick: bool = False,
    **given: object,
) -> Case:
    fields = {"rows": rows, "dim": dim, "temperature": 0.1, "bias": -10.0, "ids": False} | given
    name = f"b{rows}-d{dim}-{dtype}" + (f"-{suffix}" if suffix else "")
    return Case(name=name, dtype=dtype, device=device, fields=fields, quick=quick)


def shrunk(case: Case) -> Case:
    """The same case with a few rows."""
    return case.shrunk(rows=16)


def problem(case: Case) -> Problem:
    """Tensors, oracles and providers of a case."""
    f, device, dtype = case.fields, torch.device(case.device), DTYPES[case.dtype]
    rows, dim = f["rows"], f["dim"]
    generator = torch.Generator().manual_seed(rows)
    query, noise = torch.randn(2, rows, dim, generator=generator)
    key = query + noise  # half aligned, as in the middle of a training
    ids = torch.randint(rows // 2, (rows,), generator=generator).to(device) if f["ids"] else None
    inputs = {
        "query": F.normalize(query, dim=1).to(device, dtype),
        "key": F.normalize(key, dim=1).to(device, dtype),
        "temperature": torch.tensor(f["temperature"], device=device),
        "bias": torch.tensor(f["bias"], device=device),
    }
    flops, moved = 2.0 * rows * rows * dim, 2.0 * rows * dim * dtype.itemsize
    ours = Provider(name="svitt_ops", role="ours", build=lambda: partial(_ours, ids=ids))
    return Problem(
        inputs=inputs,
        upstream=torch.ones((), device=device),
        outputs=("loss",),
        oracles={"op": lambda: Expected.of(partial(_reference, inputs=inputs, ids=ids), dtype)},
        providers=[ours, *(peers.providers() if ids is None else [])],
        flops={"forward": flops, "forward_backward": 3 * flops},
        bytes={"forward": moved, "forward_backward": 2 * moved},
    )


def _ours(*inputs: Tensor, ids: Tensor | None) -> tuple[Tensor]:
    return (so.sigmoid_nce(*inputs, ids=ids),)


def _reference(
    dtype: torch.dtype, inputs: dict[str, Tensor], ids: Tensor | None
) -> dict[str, Tensor]:
    """The loss and its gradients, every step in this dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.detach().to(wide if x.dim() == 0 else dtype) for x in inputs.values()]
    leaves = [x.requires_grad_() for x in leaves]
    loss = so.reference.sigmoid_nce(*leaves, ids=ids)
    grads = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach()} | {
        f"grad_{name}": grad for name, grad in zip(inputs, grads, strict=True)
    }

"""Cases of `info_nce`: from the batch of one GPU in SViTT's recipe to large ones."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so
from bench.measure.harness import DTYPES, Case, Expected, Problem, Provider
from bench.peers import contrastive

SMALL_ROWS = 16


def cases(device: str) -> list[Case]:
    """Batch sizes by embedding width; ids, and a temperature that only a maximum survives."""
    if device == "cuda":
        dtypes, sizes = ("bf16",), ((32, 256), (4096, 256), (16384, 512), (65536, 768))
    else:
        dtypes, sizes = ("fp32", "bf16"), ((32, 256), (1024, 256), (4096, 256), (8192, 256))
    found = []
    for dtype in dtypes:
        for rows, dim in sizes:
            found.append(_case(device, dtype, rows, dim, quick=rows == sizes[1][0]))
        rows, dim = sizes[1]
        found.append(_case(device, dtype, rows, dim, "ids", ids=True))
        # Pairs so far apart that the loss does not vanish beside the rounding of its fp64 oracle.
        found.append(_case(device, dtype, rows, dim, "cold", temperature=0.005, noise=4.0))
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
    fields = {"rows": rows, "dim": dim, "temperature": 0.07, "ids": False, "noise": 1.0} | given
    name = f"b{rows}-d{dim}-{dtype}" + (f"-{suffix}" if suffix else "")
    return Case(name=name, dtype=dtype, device=device, fields=fields, quick=quick)


def shrunk(case: Case) -> Case:
    """The same case with a few rows."""
    return case.shrunk(rows=SMALL_ROWS)


def problem(case: Case) -> Problem:
    """Tensors, oracles and providers of a case."""
    f, device, dtype = case.fields, torch.device(case.device), DTYPES[case.dtype]
    rows, dim = f["rows"], f["dim"]
    generator = torch.Generator().manual_seed(rows)
    query = F.normalize(torch.randn(rows, dim, generator=generator), dim=1)
    # Half aligned, as in the middle of a training.
    noise = torch.randn(rows, dim, generator=generator) / dim**0.5
    key = F.normalize(query + f["noise"] * noise, dim=1)
    ids = torch.randint(rows // 2, (rows,), generator=generator).to(device) if f["ids"] else None
    inputs = {
        "query": query.to(device, dtype),
        "key": key.to(device, dtype),
        "temperature": torch.tensor(f["temperature"], device=device),
    }
    flops = 2.0 * rows * rows * dim
    moved = 2.0 * rows * dim * dtype.itemsize
    providers = [Provider(name="svitt_ops", role="ours", build=lambda: partial(_ours, ids=ids))]
    if ids is None:
        providers += contrastive.providers(f["temperature"], device)
    return Problem(
        inputs=inputs,
        upstream=torch.ones((), device=device),
        outputs=("loss",),
        oracles={"op": lambda: Expected.of(partial(_reference, inputs=inputs, ids=ids), dtype)},
        providers=providers,
        flops={"forward": flops, "forward_backward": 4 * flops},
        bytes={"forward": moved, "forward_backward": 3 * moved},
    )


def _ours(query: Tensor, key: Tensor, temperature: Tensor, ids: Tensor | None) -> tuple[Tensor]:
    return (so.info_nce(query, key, temperature, ids=ids),)


def _reference(
    dtype: torch.dtype, inputs: dict[str, Tensor], ids: Tensor | None
) -> dict[str, Tensor]:
    """The loss and its gradients, every step in this dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [
        x.detach().to(wide if name == "temperature" else dtype).requires_grad_()
        for name, x in inputs.items()
    ]
    loss = so.reference.info_nce(*leaves, ids=ids)
    grads = torch.autograd.grad(loss, leaves)
    found = {f"grad_{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {"loss": loss.detach()} | found

"""Cases of `queue_info_nce`: ALBEF's queue of 65536 features, with and without its teacher."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so
from bench.measure.harness import DTYPES, Case, Expected, Problem, Provider
from bench.peers import queue_info_nce as peers

ALPHA, TEMPERATURE = 0.4, 0.07
ORACLE_ROWS = 64


def cases(device: str) -> list[Case]:
    """Batches of 32 and 256 against the queue; quick ones against an eighth of it."""
    found = []
    for dtype in ("bf16",) if device == "cuda" else ("fp32", "bf16"):
        found.append(_case(device, dtype, 32, 8192, ALPHA, quick=True))
        for rows in (32, 256):
            for alpha in (0.0, ALPHA):
                found.append(_case(device, dtype, rows, 65536, alpha))
    return found


def _case(
    device: str, dtype: str, rows: int, length: int, alpha: float, quick: bool = False
) -> Case:
    fields = {"rows": rows, "queue": length, "dim": 256, "alpha": alpha, "temperature": TEMPERATURE}
    name = f"b{rows}-q{length}-{dtype}" + ("-teacher" if alpha else "")
    return Case(name=name, dtype=dtype, device=device, fields=fields, quick=quick)


def shrunk(case: Case) -> Case:
    """The same case with a few rows and a short queue."""
    return case.shrunk(rows=8, queue=40, dim=16)


def problem(case: Case) -> Problem:
    """Tensors, oracles and providers of a case."""
    f, device, dtype = case.fields, torch.device(case.device), DTYPES[case.dtype]
    rows, length, dim, alpha = f["rows"], f["queue"], f["dim"], f["alpha"]
    generator = torch.Generator().manual_seed(rows)

    def randn(count: int) -> Tensor:
        return torch.randn(count, dim, generator=generator) / dim**0.5

    def ready(x: Tensor) -> Tensor:
        return F.normalize(x, dim=1).to(device, dtype)

    # Half aligned, as in the middle of a training; the teacher is a little behind.
    query = randn(rows)
    spec = peers.Queue(
        key=ready(query + randn(rows)),
        queue=ready(randn(length)),
        teacher=ready(query + randn(rows) / 4) if alpha else None,
        alpha=alpha,
    )
    inputs = {
        "query": ready(query),
        "temperature": torch.tensor(f["temperature"], device=device),
    }
    product = 2.0 * rows * (rows + length) * dim
    similarities = 2 if alpha else 1
    row = dim * dtype.itemsize
    moved = float((rows * (1 + similarities) + length) * row)
    ours = Provider(name="svitt_ops", role="ours", build=lambda: partial(_ours, spec=spec))
    return Problem(
        inputs=inputs,
        upstream=torch.ones((), device=device),
        outputs=("loss",),
        oracles={"op": lambda: Expected.of(partial(_reference, inputs=inputs, spec=spec), dtype)},
        providers=[ours, *peers.providers(spec, device)],
        # The gradient weighs each candidate once, whatever its weight is made of.
        flops={
            "forward": similarities * product,
            "forward_backward": (similarities + 1) * product,
        },
        bytes={"forward": moved, "forward_backward": moved + rows * row},
    )


def _ours(query: Tensor, temperature: Tensor, spec: peers.Queue) -> tuple[Tensor]:
    loss = so.queue_info_nce(
        query, spec.key, spec.queue, temperature, teacher_query=spec.teacher, alpha=spec.alpha
    )
    return (loss,)


def _reference(
    dtype: torch.dtype, inputs: dict[str, Tensor], spec: peers.Queue
) -> dict[str, Tensor]:
    """The loss and its gradients over a few rows at a time, since all their logits are kept."""
    query = inputs["query"].detach().to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    temperature = inputs["temperature"].detach().to(wide).requires_grad_()
    key, queue = spec.key.to(dtype), spec.queue.to(dtype)
    numbers = torch.arange(len(query), device=query.device)
    loss = torch.zeros((), dtype=torch.float64, device=query.device)
    by_temperature, by_query = torch.zeros_like(loss), []
    for chosen in numbers.split(ORACLE_ROWS):
        part = query[chosen].requires_grad_()
        mean = so.reference.queue_info_nce(
            part,
            key,
            queue,
            temperature,
            teacher_query=None if spec.teacher is None else spec.teacher[chosen].to(dtype),
            alpha=spec.alpha,
            query_ids=chosen,
            key_ids=numbers,
        )
        grads = torch.autograd.grad(mean, (part, temperature))
        share = len(chosen) / len(query)
        loss += mean.detach() * share
        by_query.append(grads[0].double() * share)
        by_temperature += grads[1] * share
    return {
        "loss": loss,
        "grad_query": torch.cat(by_query),
        "grad_temperature": by_temperature,
    }

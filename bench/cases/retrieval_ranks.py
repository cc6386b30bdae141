"""Cases of `retrieval_ranks`: test sets of 1000 and 4096 pairs.

Ranks are whole numbers that rounding changes, so they are gated by what fp32 sums can make of them:
a key whose similarity is closer to the positive's than fp32 can tell may count or not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so
from bench.measure.harness import DTYPES, Case, Expected, Problem, Provider, also_compiled

CHUNK = 512


def cases(device: str) -> list[Case]:
    """Numbers of pairs."""
    return [
        Case(
            name=f"n{rows}-d256-{dtype}",
            dtype=dtype,
            device=device,
            fields={"rows": rows, "dim": 256},
            quick=rows == 1000,
            directions=("forward",),
        )
        for dtype in ("fp32", "bf16")
        for rows in (1000, 4096)
    ]


def shrunk(case: Case) -> Case:
    """The same case with a few rows."""
    return case.shrunk(rows=16)


def problem(case: Case) -> Problem:
    """Tensors, oracles and providers of a case."""
    f, device, dtype = case.fields, torch.device(case.device), DTYPES[case.dtype]
    rows, dim = f["rows"], f["dim"]
    generator = torch.Generator().manual_seed(rows)
    query = F.normalize(torch.randn(rows, dim, generator=generator), dim=1)
    # Aligned as far as leaves ranks from 0 to a few hundred.
    key = F.normalize(query / 4 + torch.randn(rows, dim, generator=generator) / dim**0.5, dim=1)
    inputs = {"query": query.to(device, dtype), "key": key.to(device, dtype)}
    return Problem(
        inputs=inputs,
        upstream=torch.ones((), device=device),
        outputs=("ranks",),
        oracles={"op": lambda: _expected(**inputs)},
        providers=_providers(),
        flops={"forward": 2.0 * rows * rows * dim},
        bytes={"forward": 2.0 * rows * dim * dtype.itemsize + 8 * rows},
    )


def _providers() -> list[Provider]:
    return [
        Provider(name="svitt_ops", role="ours", build=lambda: _ours),
        Provider(name="argsort", build=lambda: _argsort, note="all similarities, each row sorted"),
        *also_compiled("count", _count, "all similarities, the larger ones counted"),
        Provider(
            name="chunked", build=lambda: _chunked, note=f"the same, {CHUNK} queries at a time"
        ),
    ]


def _ours(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    return (so.retrieval_ranks(query, key),)


def _similarities(query: Tensor, key: Tensor) -> Tensor:
    """With fp32 sums that are not rounded to the inputs' dtype, as the op's."""
    if query.device.type == "cuda" and query.dtype != torch.float32:
        return torch.mm(query, key.T, out_dtype=torch.float32)  # type: ignore[call-overload]
    return query.float() @ key.float().T


def _argsort(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    order = _similarities(query, key).argsort(1, descending=True)
    own = torch.arange(len(query), device=query.device)
    return ((order == own[:, None]).int().argmax(1),)


def _count(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    dots = _similarities(query, key)
    return ((dots > dots.diagonal()[:, None]).sum(1),)


def _chunked(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    key = key if query.device.type == "cuda" else key.float()
    found = []
    for first in range(0, len(query), CHUNK):
        dots = _similarities(query[first : first + CHUNK], key)
        found.append((dots > dots.diagonal(first)[:, None]).sum(1))
    return (torch.cat(found),)


def _expected(query: Tensor, key: Tensor) -> Expected:
    dots = query.double() @ key.double().T
    # Twice what a sum of rounded products of unit vectors can be off, for each of two sums.
    slack = 4 * torch.finfo(torch.float32).eps * query.shape[1] ** 0.5
    own = dots.diagonal()[:, None]
    fewest, most = (dots > own + slack).sum(1), (dots > own - slack).sum(1) - 1

    def seen(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ranks = found["ranks"]
        return {"wrong": ((ranks < fewest) | (ranks > most)).sum().double()}

    return Expected(
        values={"wrong": torch.zeros((), dtype=torch.float64)},
        plain_error={"wrong": 0.0},
        seen=seen,
    )

"""Cases of `sample_hard_negatives`: from the batch of one GPU to large ones.

A draw is gated by what must hold of it exactly. The op's is replayed: seeded alike, the uniform
number of each row has to lie in the interval of the softmax's sums that belongs to the chosen key.
Peers use randomness of their own, so of theirs the midpoints of these intervals must have the mean
one half, within six deviations. Nobody may choose a positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so
from bench.measure.harness import DTYPES, Case, Expected, Function, Problem, Provider

SEED, DEVIATIONS = 1, 6


def cases(device: str) -> list[Case]:
    """Batch sizes."""
    return [
        Case(
            name=f"b{rows}-d256-{dtype}",
            dtype=dtype,
            device=device,
            fields={"rows": rows, "dim": 256, "temperature": 0.07},
            quick=rows == 256,
            directions=("forward",),
        )
        for dtype in (("bf16",) if device == "cuda" else ("fp32", "bf16"))
        for rows in (32, 256, 1024, 4096)
    ]


def shrunk(case: Case) -> Case:
    """The same case with a few rows."""
    return case.shrunk(rows=16)


def problem(case: Case) -> Problem:
    """Tensors, oracles and providers of a case."""
    f, device, dtype = case.fields, torch.device(case.device), DTYPES[case.dtype]
    rows, dim, temperature = f["rows"], f["dim"], f["temperature"]
    generator = torch.Generator().manual_seed(rows)
    query, key = (
        F.normalize(torch.randn(rows, dim, generator=generator), dim=1).to(device, dtype)
        for _ in range(2)
    )
    return Problem(
        inputs={"query": query, "key": key},
        upstream=torch.ones((), device=device),
        outputs=("indices",),
        oracles={
            "op": lambda: _replayed(query, key, temperature),
            "distribution": lambda: _distributed(query, key, temperature),
        },
        providers=_providers(temperature, device),
        flops={"forward": 2.0 * rows * rows * dim},
        bytes={"forward": 2.0 * rows * dim * dtype.itemsize + 8 * rows},
    )


def _providers(temperature: float, device: torch.device) -> list[Provider]:
    def peer(name: str, note: str, sample: Callable[[Tensor], Tensor]) -> Provider:
        def function(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
            return (sample((query @ key.T).float() / temperature),)

        return Provider(
            name=name, note=note, build=lambda: function, oracle="distribution", same=True
        )

    return [
        Provider(name="svitt_ops", role="ours", build=lambda: _ours(temperature, device)),
        peer("albef_loop", "ALBEF's loop, a multinomial a row", _row_by_row),
        peer("multinomial", "softmax without its diagonal, one multinomial", _multinomial),
        peer("gumbel", "argmax of logits and Gumbel noise", _gumbel),
    ]


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _ours(temperature: float, device: torch.device) -> Function:
    generator = _generator(device)

    def function(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            generator.manual_seed(SEED)
        return (so.sample_hard_negatives(query, key, temperature),)

    return function


def _row_by_row(logits: Tensor) -> Tensor:
    weights = logits.softmax(1).fill_diagonal_(0)
    chosen = [int(torch.multinomial(row, 1).item()) for row in weights]
    return torch.tensor(chosen, device=logits.device)


def _multinomial(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.softmax(1).fill_diagonal_(0), 1)[:, 0]


def _gumbel(logits: Tensor) -> Tensor:
    noise = torch.empty_like(logits).exponential_().log_()
    return (logits.fill_diagonal_(-math.inf) - noise).argmax(1)


def _sums(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Sums of the softmax over the negatives up to each key; they end at 1."""
    logits = (query.double() @ key.double().T / temperature).fill_diagonal_(-math.inf)
    return logits.softmax(1).cumsum(1)


def _intervals(sums: Tensor, found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Where the interval of each chosen key begins and ends, and how many keys are inadmissible."""
    indices = found["indices"].long()
    inside = indices.clamp(0, len(sums) - 1)
    ends = sums.gather(1, inside[:, None])[:, 0]
    before = sums.gather(1, (inside - 1).clamp(min=0)[:, None])[:, 0]
    begins = torch.where(inside > 0, before, 0.0)
    positive = indices == torch.arange(len(sums), device=sums.device)
    return begins, ends, (positive | (indices != inside)).sum().double()


def _uniform(rows: int, device: torch.device) -> Tensor:
    """What the op draws once it is seeded."""
    generator = _generator(device)
    generator.manual_seed(SEED)
    return torch.rand(rows, dtype=torch.float64, device=device)


def _replayed(query: Tensor, key: Tensor, temperature: float) -> Expected:
    sums = _sums(query, key, temperature)
    uniform = _uniform(len(query), query.device)

    def seen(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        begins, ends, inadmissible = _intervals(sums, found)
        return {"slip": uniform.clamp(begins, ends) - uniform, "inadmissible": inadmissible}

    # Whatever the inputs' dtype: fp32 logits that are rounded at 1 / temperature, and their sums.
    slack = 1e-5 + 1e-6 / temperature
    return Expected(
        values={
            "slip": torch.zeros_like(uniform),
            "inadmissible": torch.zeros((), dtype=torch.float64),
        },
        plain_error={"slip": slack / 2, "inadmissible": 0.0},
        seen=seen,
    )


def _distributed(query: Tensor, key: Tensor, temperature: float) -> Expected:
    sums = _sums(query, key, temperature)

    def seen(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        begins, ends, inadmissible = _intervals(sums, found)
        return {"midpoints": (begins + ends).mean() / 2, "inadmissible": inadmissible}

    # A midpoint varies no more than a uniform number does; the budget is twice the error.
    deviation = math.sqrt(1 / 12 / len(query))
    return Expected(
        values={
            "midpoints": torch.tensor(0.5, dtype=torch.float64),
            "inadmissible": torch.zeros((), dtype=torch.float64),
        },
        plain_error={"midpoints": DEVIATIONS * deviation / 2, "inadmissible": 0.0},
        seen=seen,
    )

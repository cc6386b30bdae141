"""Other ways to compute the sigmoid loss of all pairs: what people run today."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure.harness import Provider, also_compiled

CHUNK = 512
"""Keys at a time, as if each such part came from another rank."""


def providers() -> list[Provider]:
    """Peers of `sigmoid_nce` without ids; inputs are query, key, temperature, bias."""
    return [
        *also_compiled("eager", _eager, "open_clip's formulation"),
        *also_compiled("chunked", _chunked, "open_clip's over ranks: a part of the keys at a time"),
    ]


def _pairs(query: Tensor, key: Tensor, temperature: Tensor, bias: Tensor, first: int) -> Tensor:
    """Summed losses with keys of which the one at i belongs to query ``first + i``."""
    logits = query @ key.T / temperature.to(query.dtype) + bias.to(query.dtype)
    queries, keys = (torch.arange(len(x), device=x.device) for x in (query, key))
    labels = 2 * (queries[:, None] == first + keys).to(logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum()


def _eager(query: Tensor, key: Tensor, temperature: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (_pairs(query, key, temperature, bias, 0) / len(query),)


def _chunked(query: Tensor, key: Tensor, temperature: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    loss = torch.zeros((), device=query.device)
    for first in range(0, len(key), CHUNK):
        loss = loss + _pairs(query, key[first : first + CHUNK], temperature, bias, first)
    return (loss / len(query),)

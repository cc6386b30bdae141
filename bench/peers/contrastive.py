"""Other ways to compute a contrastive loss: what people run today."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure.harness import Function, Provider, Unavailable, also_compiled
from bench.peers import library

CHUNK = 512


def providers(temperature: float, device: torch.device) -> list[Provider]:
    """Peers of `info_nce` in its plain symmetric form; inputs are query, key, temperature."""
    return [
        *also_compiled("eager", _eager, "open_clip's formulation"),
        Provider(
            name="chunked",
            build=lambda: _build_chunked(temperature),
            note="row chunks with one shared exponential, recomputed backward",
        ),
        library.inf_cl(device),
        library.liger(device),
    ]


def _eager(query: Tensor, key: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    logits = query @ key.T / temperature.to(query.dtype)
    labels = torch.arange(len(query), device=query.device)
    return ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2,)


class _Chunked(torch.autograd.Function):
    """4U: products of row chunks, one exponential for both directions, a fixed offset."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
        scale = (1 / temperature).float()
        rows, columns, paired = [], torch.zeros(len(key), device=key.device), []
        for first in range(0, len(query), CHUNK):
            part = query[first : first + CHUNK]
            logits = (part @ key.T).float() * scale
            paired.append(logits.diagonal(first)[: len(part)].clone())
            weights = logits.sub_(scale).exp_()
            rows.append(weights.sum(1))
            columns += weights.sum(0)
        row, pair = torch.cat(rows), torch.cat(paired)
        ctx.save_for_backward(query, key, scale, row, columns)
        return ((row.log() + columns.log()) / 2 + scale - pair).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        query, key, scale, row, columns = ctx.saved_tensors
        factor = grad / (2 * len(query))
        by_row, by_column = 1 / row, 1 / columns
        grads, grad_scale = [], torch.zeros((), device=query.device)
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        for first in range(0, len(query), CHUNK):
            part = query[first : first + CHUNK]
            dots = (part @ key.T).float()
            weights = dots.mul(scale).sub_(scale).exp_()
            weights.mul_(by_row[first : first + CHUNK, None] + by_column)
            weights.diagonal(first)[: len(part)].sub_(2)
            grad_scale += (weights * dots).sum()
            weights = weights.to(query.dtype)
            grads.append(weights @ key)
            grad_key += weights.T @ part
        by_scale = factor * scale
        grad_query = (torch.cat(grads) * by_scale).to(query.dtype)
        return grad_query, (grad_key * by_scale).to(key.dtype), -grad_scale * factor * scale**2


def _build_chunked(temperature: float) -> Function:
    if temperature < 1 / 40:
        raise Unavailable("its fixed offset underflows at this temperature")
    return lambda query, key, t: (_Chunked.apply(query, key, t),)

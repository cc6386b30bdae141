"""The check of attention over so many tokens that fp64 of every head would take minutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import svitt_ops as so
from bench.measure.harness import Expected

ROWS = 1024
"""Queries at a time, so that memory grows as tokens."""


def expected(inputs: Mapping[str, Tensor], upstream: Tensor, layout: so.BlockLayout) -> Expected:
    """What plain SDPA under the layout's mask says, in fp64, of a few heads.

    Heads do not see each other: the first and the last of the first and the last sample are
    checked, outputs and all gradients.

    Args:
        inputs: query, key and value.
        upstream: gradient of the output.
        layout: without leading dimensions.
    """
    few = {name: corners(x) for name, x in inputs.items()}
    mask, grad = layout.to_dense(), corners(upstream)
    found = Expected.of(lambda dtype: _attend(few, grad, mask, dtype), upstream.dtype)

    def seen(found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: corners(x) for name, x in found.items()}

    return replace(found, seen=seen)


def corners(x: Tensor) -> Tensor:
    """The first and the last head of the first and the last sample."""
    batch, heads = ([0, size - 1][: min(size, 2)] for size in x.shape[:2])
    return x.detach()[batch][:, heads]


def _attend(
    inputs: Mapping[str, Tensor], upstream: Tensor, mask: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The output and the gradients, gathered over rows of queries."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    query, key, value = leaves.values()
    found = []
    for start in range(0, len(mask), ROWS):
        rows = slice(start, start + ROWS)
        with sdpa_kernel(SDPBackend.MATH):
            part = F.scaled_dot_product_attention(query[:, :, rows], key, value, mask[rows])
        part.backward(upstream[:, :, rows].to(dtype))
        found.append(part.detach())
    grads = {f"grad_{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    return {"out": torch.cat(found, 2), **grads}

"""What cross-attention is compared with: SDPA, explicit weights, compiled FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench.measure.harness import Function, Provider
from bench.peers import library
from bench.peers.attention import compiled, sdpa


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The op's options."""

    mask: Tensor | None = None
    """Ignored keys, (batch, keys)."""
    saliency: Literal["cls", "mean"] | None = None


def providers(spec: Attention, device: torch.device) -> list[Provider]:
    """The peers of a device, those that cannot run there included."""
    note = "and, for the saliency, the weights of its queries once more" if spec.saliency else ""
    backends: list[tuple[str, SDPBackend | None]] = [("sdpa", None)]
    if device.type == "cuda":
        backends = [
            ("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
            ("sdpa_flash", SDPBackend.FLASH_ATTENTION),
            ("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION),
        ]
    found = [
        Provider(
            name=name,
            note=note,
            build=lambda backend=backend: _sdpa(spec, backend),  # type: ignore[misc]
        )
        for name, backend in backends
    ]
    found += [
        Provider(
            name=name,
            note=note,
            build=lambda name=name: _with_saliency(  # type: ignore[misc]
                spec, library.attention(name, device, spec.mask)
            ),
        )
        for name in library.ATTENTION
    ]
    return [
        *found,
        Provider(
            name="flex_attention",
            note=note,
            compiled=True,
            quick=device.type == "cuda",
            build=lambda: _flex(spec),
            backward="" if device.type == "cuda" else "FlexAttention has no backward on CPUs",
        ),
        Provider(
            name="explicit",
            note="logits, softmax and weights in memory",
            build=lambda: _explicit(spec),
        ),
    ]


def _weights(spec: Attention, query: Tensor, key: Tensor) -> Tensor:
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[-1] ** -0.5
    if spec.mask is not None:
        logits = logits.masked_fill(spec.mask[:, None, None], float("-inf"))
    return logits.softmax(-1)


def _with_saliency(spec: Attention, attention: Callable[..., Tensor]) -> Function:
    """Add the weights that these peers have no way to return."""

    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        out = attention(query, key, value)
        if spec.saliency is None:
            return (out,)
        rows = query.detach()[:, :, :1] if spec.saliency == "cls" else query.detach()
        return out, _weights(spec, rows.float(), key.detach().float()).mean((1, 2))

    return function


def _sdpa(spec: Attention, backend: SDPBackend | None) -> Function:
    seen = None if spec.mask is None else ~spec.mask[:, None, None]

    return _with_saliency(spec, partial(sdpa, mask=seen, backend=backend))


def _explicit(spec: Attention) -> Function:
    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        probs = _weights(spec, query, key)
        out = torch.einsum("bhqk,bhkd->bhqd", probs, value)
        if spec.saliency is None:
            return (out,)
        rows = probs.detach()[:, :, :1] if spec.saliency == "cls" else probs.detach()
        return out, rows.mean((1, 2), dtype=torch.float32)

    return function


def _flex(spec: Attention) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex, ignored = compiled(flex_attention), spec.mask
    masks: dict[tuple[int, ...], Any] = {}

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert ignored is not None
        return ~ignored[b, k]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = None
        if ignored is not None:  # made once, as a layout is
            sizes = (query.shape[0], 1, query.shape[2], key.shape[2])
            if sizes not in masks:
                masks[sizes] = create_block_mask(seen, sizes[0], None, *sizes[2:], query.device)
            mask = masks[sizes]
        return flex(query, key, value, block_mask=mask)

    return _with_saliency(spec, attention)

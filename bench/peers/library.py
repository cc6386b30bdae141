"""Peers from other packages, the extra `peers`: found when a case is built, named where absent."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.measure.harness import Function, Provider, Unavailable

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

ATTENTION = {"flash_attn": "flash-attn", "xformers": "xformers"}
"""Providers of dense attention, and the packages that they come from."""


def load(module: str, package: str, device: torch.device) -> Any:
    """A module of a package whose kernels are for GPUs.

    Raises:
        Unavailable: saying what is missing.
    """
    if device.type != "cuda":
        raise Unavailable(f"{package} needs a GPU")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise Unavailable(f"{package} needs {error.name}, which is not installed") from error
        raise Unavailable(f"{package} is not installed") from error
    except Exception as error:  # a binary that was built for another torch
        raise Unavailable(f"{package} cannot be imported: {error}") from error


def attention(name: str, device: torch.device, ignored: Tensor | None = None) -> Attention:
    """Dense attention on (batch, heads, tokens, head_dim) by a provider of `ATTENTION`.

    Args:
        name: which provider.
        device: where the tensors are.
        ignored: bool (batch, keys), as `cross_attention` takes it.
    """
    build = _flash_attn if name == "flash_attn" else _xformers
    function = build(device, ignored)

    def transposed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    return transposed


def _flash_attn(device: torch.device, ignored: Tensor | None) -> Attention:
    function = load("flash_attn", ATTENTION["flash_attn"], device).flash_attn_func
    if ignored is not None:
        raise Unavailable("flash-attn takes no padding mask")
    return function


def _xformers(device: torch.device, ignored: Tensor | None) -> Attention:
    function = load("xformers.ops", ATTENTION["xformers"], device).memory_efficient_attention
    if ignored is None:
        return function
    biases: dict[Any, Tensor] = {}

    def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape = (len(query), query.shape[2], query.shape[1], key.shape[1])
        if (shape, query.dtype) not in biases:  # made once; rows must begin at multiples of 16 byte
            bias = query.new_zeros(*shape[:3], -(-shape[3] // 8) * 8)[..., : shape[3]]
            bias.masked_fill_(ignored[:, None, None], float("-inf"))
            biases[shape, query.dtype] = bias
        return function(query, key, value, attn_bias=biases[shape, query.dtype])

    return masked


def liger_queue(key: Tensor, queue: Tensor, device: torch.device) -> Provider:
    """Liger's fused linear cross-entropy, its classes being the candidates."""

    def build() -> Function:
        loss = _liger(device)

        def function(query: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
            numbers = torch.arange(len(query), device=query.device)
            scaled = query / temperature.to(query.dtype)
            return (loss(torch.cat([key, queue]), scaled, numbers),)

        return function

    return Provider(name="liger", build=build, note="fused linear cross-entropy of liger-kernel")


def liger(device: torch.device) -> Provider:
    """Liger's fused linear cross-entropy in both directions, classes being the other side."""

    def build() -> Function:
        loss = _liger(device)

        def function(query: Tensor, key: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
            numbers = torch.arange(len(query), device=query.device)
            scale = 1 / temperature.to(query.dtype)
            rows, columns = loss(key, query * scale, numbers), loss(query, key * scale, numbers)
            return ((rows + columns) / 2,)

        return function

    note = "fused linear cross-entropy of liger-kernel, twice"
    return Provider(name="liger", build=build, note=note)


def _liger(device: torch.device) -> Callable[..., Tensor]:
    module = load("liger_kernel.transformers", "liger-kernel", device)
    return module.LigerFusedLinearCrossEntropyLoss()


def inf_cl(device: torch.device) -> Provider:
    """Inf-CL's Triton kernels, once for each direction."""

    def build() -> Function:
        loss = load("inf_cl", "inf-cl", device).cal_flash_loss

        def function(query: Tensor, key: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
            scale = 1 / temperature
            rows, columns = loss(query, key, scale=scale), loss(key, query, scale=scale)
            return ((rows.mean() + columns.mean()) / 2,)

        return function

    return Provider(name="inf_cl", build=build, note="Inf-CL's Triton kernels")

"""Cases of `cross_attention`: text over video, before and after pruning, and images over text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import svitt_ops as so
from bench.measure.harness import DTYPES, Case, Expected, Function, Problem, Provider
from bench.peers import cross_attention as peers
from svitt_ops.testing import cross_attention_results


def cases(device: str) -> list[Case]:
    """32 words over 4, 8 and 16 frames; over pruned ones; the op's options; images over text."""
    return list(_cases(device))


def _cases(device: str) -> Iterator[Case]:
    dtypes = ("bf16",) if device == "cuda" else ("fp32", "bf16")
    batch = 32 if device == "cuda" else 8

    def case(tokens: int, dtype: str, suffix: str = "", **given: Any) -> Case:
        fields: dict[str, Any] = {"batch": batch, "heads": 12, "queries": 32, "tokens": tokens}
        fields |= {"head_dim": 64, "strides": "contiguous", "masked": 0.0, "saliency": ""}
        name = f"n{tokens}-{dtype}" + (f"-{suffix}" if suffix else "")
        quick = tokens == 785 and not given
        return Case(name=name, dtype=dtype, device=device, fields=fields | given, quick=quick)

    for dtype in dtypes:
        for tokens in (785, 1569, 3137):
            yield case(tokens, dtype)
        yield case(1569, dtype, "packed", strides="packed")
        yield case(1569, dtype, "cls", saliency="cls")
        yield case(1569, dtype, "mean", saliency="mean")
        yield case(1569, dtype, "masked", masked=0.3)
        yield case(1569, dtype, "words5", queries=5)
        yield case(1569, dtype, "single", batch=1)
        yield case(386, dtype, "pruned")
        yield case(30, dtype, "image", queries=257, masked=0.3)


def shrunk(case: Case) -> Case:
    """The same case with few keys, one head and one sample."""
    return case.shrunk(tokens=min(case.fields["tokens"], 70), heads=1, batch=1)


def problem(case: Case) -> Problem:
    """Tensors, oracles and providers of a case."""
    f, device, dtype = case.fields, torch.device(case.device), DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(f["tokens"])
    batch, heads, dim = (f[name] for name in ("batch", "heads", "head_dim"))
    queries, tokens = f["queries"], f["tokens"]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    query = randn(batch, queries, heads, dim).transpose(1, 2)
    if f["strides"] == "packed":  # what one projection of keys and values returns, read in place
        key, value = randn(batch, tokens, 2, heads, dim).permute(2, 0, 3, 1, 4)
    else:
        key, value = (randn(batch, heads, tokens, dim) for _ in range(2))
    mask = None
    if f["masked"]:  # padding at the end, 0 to 2 x as much as on average
        share = 2 * f["masked"] * torch.linspace(0, 1, batch) if batch > 1 else f["masked"]
        present = (tokens * (1 - torch.as_tensor(share))).round().reshape(-1, 1)
        mask = (torch.arange(tokens) >= present).to(device)
    spec = peers.Attention(mask=mask, saliency=f["saliency"] or None)
    inputs = {"query": query, "key": key, "value": value}
    upstream = randn(batch, queries, heads, dim).transpose(1, 2)
    attended = batch * tokens if mask is None else int((~mask).sum())
    flops = 4.0 * dim * heads * queries * attended
    side = query.numel() * query.element_size()
    keys = attended * heads * dim * query.element_size()
    grads = 2 * key.numel() * key.element_size()
    lse = batch * heads * queries * 4
    saliency = batch * tokens * 4 if spec.saliency else 0
    return Problem(
        inputs=inputs,
        upstream=upstream,
        outputs=("out", "saliency"),
        oracles={
            "op": lambda: _expected(inputs, upstream, spec),
            "plain": lambda: _expected(inputs, upstream, replace(spec, saliency=None)),
        },
        providers=_providers(spec, device),
        flops={"forward": flops, "forward_backward": 3.5 * flops},
        bytes={
            "forward": 2.0 * side + 2 * keys + lse + saliency,
            "forward_backward": 6.0 * side + 4 * keys + grads + 2 * lse + saliency,
        },
        facts={"queries": queries, "attended": attended / (batch * tokens)},
    )


def _providers(spec: peers.Attention, device: torch.device) -> list[Provider]:
    ours = [Provider(name="svitt_ops", role="ours", build=lambda: _ours(spec))]
    if spec.saliency is not None:
        ours.append(
            Provider(
                name="svitt_ops_plain",
                role="variant",
                oracle="plain",
                build=lambda: _ours(replace(spec, saliency=None)),
                note="this op without saliency",
            )
        )
    return [*ours, *peers.providers(spec, device)]


def _ours(spec: peers.Attention) -> Function:
    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        result = so.cross_attention(
            query, key, value, key_padding_mask=spec.mask, return_saliency=spec.saliency
        )
        return result if isinstance(result, tuple) else (result,)

    return function


def _expected(inputs: dict[str, Tensor], upstream: Tensor, spec: peers.Attention) -> Expected:
    """The reference in fp64, a sample at a time, and the error of its steps in the case's dtype."""
    values: dict[str, list[Tensor]] = {}
    errors: dict[str, float] = {}
    for b in range(upstream.shape[0]):
        sample = [x[b : b + 1] for x in (*inputs.values(), upstream)]
        options: dict[str, Any] = {"return_saliency": spec.saliency or "cls"}
        if spec.mask is not None:
            options["key_padding_mask"] = spec.mask[b : b + 1]
        exact = cross_attention_results(*sample, compute=torch.float64, **options)
        plain = cross_attention_results(*sample, compute=upstream.dtype, **options)
        for name in exact if spec.saliency else [x for x in exact if x != "saliency"]:
            values.setdefault(name, []).append(exact[name])
            error = float((plain[name].double() - exact[name]).abs().max())
            errors[name] = max(errors.get(name, 0.0), error)
    return Expected(values={k: torch.cat(v) for k, v in values.items()}, plain_error=errors)

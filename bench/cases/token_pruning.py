"""Cases of `prune_tokens`: SViTT's sequences at its keep rates, and one launch against two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import svitt_ops as so
from bench.measure.harness import DTYPES, Case, Expected, Function, Problem, Provider, Unavailable
from svitt_ops import _extension, _library


def cases(device: str) -> list[Case]:
    """Sequences of 4, 8 and 16 frames; other keep rates; strided tokens; on a GPU more samples."""
    return list(_cases(device))


def _cases(device: str) -> Iterator[Case]:
    def case(frames: int, dtype: str, suffix: str = "", **given: Any) -> Case:
        fields = {"batch": 32 if device == "cuda" else 8, "tokens": frames * 196 + 1, "dim": 768}
        fields |= {"keep_rate": 0.6, "num_global": 1, "strides": "contiguous"} | given
        name = f"n{fields['tokens']}-{dtype}" + (f"-{suffix}" if suffix else "")
        quick = frames == 4 and not given
        return Case(name=name, dtype=dtype, device=device, fields=fields, quick=quick)

    for dtype in ("fp32", "bf16"):
        for frames in (4, 8, 16):
            yield case(frames, dtype)
        yield case(4, dtype, "q0.7", keep_rate=0.7)
        yield case(8, dtype, "b1", batch=1)
        yield case(8, dtype, "strided", strides="strided")
        if device == "cuda":
            for batch in (127, 128, 256):
                yield case(4, dtype, f"b{batch}", batch=batch)


def shrunk(case: Case) -> Case:
    """The same case with few tokens, columns and samples."""
    return case.shrunk(tokens=33, dim=16, batch=2)


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What is computed; peers take the scores and the number to keep as the op does."""

    scores: Tensor
    keep: int
    num_global: int
    rows: Tensor
    """The rows that are kept, of all samples in one list."""


def problem(case: Case) -> Problem:
    """Tensors, oracles and providers of a case."""
    f, device, dtype = case.fields, torch.device(case.device), DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(f["tokens"])
    batch, length, dim, g = (f[name] for name in ("batch", "tokens", "dim", "num_global"))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    tokens = randn(batch, length, dim)
    if f["strides"] == "strided":  # every second row of a wider tensor
        tokens = torch.stack([tokens, tokens], 2)[:, :, 0]
    num_tokens = length - g
    keep = so.keep_count(f["keep_rate"], num_tokens)
    # fp32 and distinct, so that peers without a rule for ties compute the same function.
    order = torch.rand(batch, num_tokens, generator=generator).argsort(1)
    scores = (order.to(device) / num_tokens).float()
    upstream = randn(batch, g + keep, dim)
    indices = so.reference.select_tokens(scores, keep)
    first = torch.arange(g, device=device).expand(batch, g)
    offsets = torch.arange(batch, device=device)[:, None] * length
    rows = (torch.cat([first, g + indices], 1) + offsets).flatten()
    spec = Pruning(scores=scores, keep=keep, num_global=g, rows=rows)
    row = dim * tokens.element_size()
    kept, all_rows = batch * (g + keep) * row, batch * length * row
    selected = scores.numel() * (4 + 4) + batch * keep * 8
    return Problem(
        inputs={"tokens": tokens},
        upstream=upstream,
        outputs=("out",),
        oracles={
            "op": lambda: _expected(tokens, upstream, spec, ordered=True),
            "copy": lambda: _expected(tokens, upstream, spec, ordered=True),
            "by score": lambda: _expected(tokens, upstream, spec, ordered=False),
        },
        providers=_providers(spec, device),
        flops={"forward": 0.0, "forward_backward": 0.0},
        bytes={
            "forward": 2.0 * kept + selected,
            "forward_backward": 3.0 * kept + all_rows + selected + scores.numel() * 4,
        },
        facts={"keep": keep, "bytes_kept": kept},
    )


def _providers(spec: Pruning, device: torch.device) -> list[Provider]:
    ours = [Provider(name="svitt_ops", role="ours", build=lambda: _ours(spec))]
    if device.type == "cuda":
        note = "the hand-written CUDA kernel, by name"
        ours.append(
            Provider(name="svitt_ops_cuda", role="variant", build=lambda: _cuda(spec), note=note)
        )
    return [
        *ours,
        Provider(
            name="svitt_eager",
            note="SViTT's sequence: topk, sort, gather, cat",
            build=lambda: _sequence(spec, ordered=True),
        ),
        Provider(
            name="svitt_compiled",
            note="torch.compile of SViTT's sequence",
            compiled=True,
            build=lambda: torch.compile(_sequence(spec, ordered=True), fullgraph=True),
        ),
        Provider(
            name="evit_eager",
            oracle="by score",
            note="EViT's sequence: topk, gather, cat; the survivors in the order of their scores",
            build=lambda: _sequence(spec, ordered=False),
        ),
        Provider(
            name="index_select",
            oracle="copy",
            note="the copy alone, of rows that are known beforehand",
            build=lambda: _index_select(spec),
        ),
    ]


def _ours(spec: Pruning) -> Function:
    def function(tokens: Tensor) -> tuple[Tensor, ...]:
        kept = so.prune_tokens(tokens, spec.scores, keep=spec.keep, num_global=spec.num_global)
        return (kept.tokens,)

    return function


class _CudaPrune(torch.autograd.Function):
    """The CUDA extension's ops, which have no autograd of their own."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, scores: Tensor, keep: int, num_global: int) -> Tensor:
        op = _library.cuda_kernel("prune_tokens")
        out, _, inverse, _ = op(tokens, scores, keep, num_global, None)
        ctx.save_for_backward(inverse)
        ctx.num_global = num_global
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        op = _library.cuda_kernel("prune_tokens_backward")
        return op(grads[0], *ctx.saved_tensors, ctx.num_global), None, None, None


def _cuda(spec: Pruning) -> Function:
    if not _extension.load_cuda():
        raise Unavailable(_extension.cuda_reason())
    return lambda tokens: (_CudaPrune.apply(tokens, spec.scores, spec.keep, spec.num_global),)


def _sequence(spec: Pruning, ordered: bool) -> Function:
    g = spec.num_global

    def function(tokens: Tensor) -> tuple[Tensor, ...]:
        indices = spec.scores.topk(spec.keep, dim=1).indices
        if ordered:
            indices = indices.sort(dim=1).values
        rest = tokens[:, g:].gather(1, indices[..., None].expand(-1, -1, tokens.shape[2]))
        return (torch.cat([tokens[:, :g], rest], 1),)

    return function


def _index_select(spec: Pruning) -> Function:
    def function(tokens: Tensor) -> tuple[Tensor, ...]:
        batch, _, dim = tokens.shape
        return (tokens.reshape(-1, dim).index_select(0, spec.rows).view(batch, -1, dim),)

    return function


def _expected(tokens: Tensor, upstream: Tensor, spec: Pruning, ordered: bool) -> Expected:
    """What is copied and its gradient in fp64; plain PyTorch makes no error."""
    leaf = tokens.double().requires_grad_()
    indices = spec.scores.sort(dim=1, descending=True, stable=True).indices[:, : spec.keep]
    if ordered:
        indices = indices.sort(dim=1).values
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    kept = leaf[rows, spec.num_global + indices]
    out = torch.cat([leaf[:, : spec.num_global], kept], 1)
    (grad,) = torch.autograd.grad(out, leaf, upstream.double())
    values = {"out": out.detach(), "grad_tokens": grad}
    return Expected(values=values, plain_error=dict.fromkeys(values, 0.0))

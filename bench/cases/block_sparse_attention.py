"""Cases of `block_sparse_attention`: SViTT's shapes, before and after pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import svitt_ops as so
from bench.measure import sampled_check
from bench.measure.harness import DTYPES, Case, Expected, Function, Problem, Provider
from bench.peers import attention as peers
from svitt_ops.reference.block_sparse_attention import attend

GRID = 14  # rows and columns of patches in a frame
SMALL_TOKENS = 113


def cases(device: str) -> list[Case]:
    """Full sequences of 4, 8 and 16 frames; pruned ones; full layouts; the op's options."""
    return list(_cases(device))


def _cases(device: str) -> Iterator[Case]:
    dtypes = ("bf16",) if device == "cuda" else ("fp32", "bf16")
    batch = 32 if device == "cuda" else 1

    def case(frames: int, dtype: str, suffix: str = "", **given: Any) -> Case:
        fields: dict[str, Any] = {
            "batch": batch,
            "heads": 12,
            "tokens": frames * GRID**2 + 1,
            "head_dim": 64,
        }
        fields |= {"block_size": 56, "num_local": 1, "num_random": 3, "num_global": 1}
        fields |= {"layout": "local_random", "strides": "contiguous", "frames": frames}
        fields |= {"bias": False, "saliency": False} | given
        name = f"n{fields['tokens']}-{dtype}" + (f"-{suffix}" if suffix else "")
        quick = frames == 4 and not given
        return Case(name=name, dtype=dtype, device=device, fields=fields, quick=quick)

    for dtype in dtypes:
        for frames in (4, 8, 16):
            yield case(frames, dtype)
        for frames in (4, 8, 16) if device == "cuda" else (8,):
            yield case(frames, dtype, "packed", strides="packed")
        for frames in (4, 8, 16) if device == "cuda" else (8, 16):
            yield case(frames, dtype, "bias", bias=True)
        yield case(8, dtype, "saliency", saliency=True)
        for tokens in (549, 385, 270):  # keep rate 0.7, three times
            yield case(4, dtype, "pruned", tokens=tokens + 1)
        yield case(4, dtype, "full", layout="full")


def shrunk(case: Case) -> Case:
    """The same case with two blocks of tokens, one head and one sample."""
    return case.shrunk(tokens=SMALL_TOKENS, heads=1, batch=1)


def problem(case: Case) -> Problem:
    """Tensors, oracles and providers of a case."""
    f, device, dtype = case.fields, torch.device(case.device), DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(f["tokens"])
    batch, heads, tokens, dim = (f[name] for name in ("batch", "heads", "tokens", "head_dim"))
    g = f["num_global"]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    if f["strides"] == "packed":  # what a qkv projection returns, read in place
        q, k, v = randn(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind()
    else:
        q, k, v = (randn(batch, heads, tokens, dim) for _ in range(3))
    inputs = {"query": q, "key": k, "value": v}
    codes = None
    if f["bias"]:
        grid = so.position_codes((f["frames"], GRID, GRID))
        # Of a pruned sequence the survivors keep their codes.
        kept = torch.randperm(len(grid), generator=generator)[: tokens - g].sort().values
        codes = grid[kept].to(device)
        offsets = (2 * f["frames"] - 1) * (2 * GRID - 1) ** 2
        table = torch.randn(offsets + 2 * g + g * g, heads, generator=generator)
        inputs["bias_table"] = table.to(device)
    layout, dense = _layout(f, generator, device), _full(f, device)
    spec = peers.Attention(
        layout=layout,
        dtype=dtype,
        position_codes=codes,
        table_rows=inputs["bias_table"].shape[0] if codes is not None else 0,
        saliency=f["saliency"],
    )
    edges = layout.num_edges
    pair = batch * heads * tokens * dim * q.element_size()
    lse = batch * heads * tokens * 4
    upstream = randn(batch, tokens, heads, dim).transpose(1, 2)
    flops = 4.0 * dim * edges * batch * heads

    def oracle(layout: so.BlockLayout, bias: bool, saliency: bool) -> Callable[[], Expected]:
        if f.get("sampled"):
            return lambda: sampled_check.expected(inputs, upstream, layout)
        return lambda: _expected(inputs, upstream, layout, codes if bias else None, saliency)

    return Problem(
        inputs=inputs,
        upstream=upstream,
        outputs=("out", "saliency"),
        oracles={
            "op": oracle(layout, True, spec.saliency),
            "plain": oracle(layout, False, False),
            "dense": oracle(dense, False, spec.saliency),
        },
        providers=_providers(spec, device),
        flops={"forward": flops, "forward_backward": 3.5 * flops},
        bytes={"forward": 4.0 * pair + lse, "forward_backward": 12.0 * pair + 2 * lse},
        facts={"edges": edges, "edge_ratio": tokens**2 / edges, "density": layout.density},
        setup={"layout": lambda: _layout(f, None, device)},
    )


def _providers(spec: peers.Attention, device: torch.device) -> list[Provider]:
    ours = [Provider(name="svitt_ops", role="ours", build=lambda: _ours(spec))]
    if spec.position_codes is not None or spec.saliency:
        bare = replace(spec, position_codes=None, saliency=False)
        note = "this op without the bias table" if spec.position_codes is not None else ""
        note = note or "this op without saliency"
        ours.append(
            Provider(
                name="svitt_ops_plain",
                role="variant",
                oracle="plain",
                build=lambda: _ours(bare),
                note=note,
            )
        )
    return [*ours, *peers.providers(spec, device)]


def _ours(spec: peers.Attention) -> Function:
    def function(query: Tensor, key: Tensor, value: Tensor, *table: Tensor) -> tuple[Tensor, ...]:
        codes = spec.position_codes
        result = so.block_sparse_attention(
            query,
            key,
            value,
            spec.layout,
            bias_table=table[0] if codes is not None else None,
            position_codes=codes,
            return_saliency=spec.saliency,
        )
        return result if isinstance(result, tuple) else (result,)

    return function


def _layout(fields: Any, generator: torch.Generator | None, device: torch.device) -> so.BlockLayout:
    if fields["layout"] == "full":
        return _full(fields, device)
    names = ("block_size", "num_local", "num_random", "num_global")
    given = {name: fields[name] for name in names}
    num_tokens = fields["tokens"] - fields["num_global"]
    return so.BlockLayout.local_random(num_tokens, generator=generator, device=device, **given)


def _full(fields: Any, device: torch.device) -> so.BlockLayout:
    num_tokens, size = fields["tokens"] - fields["num_global"], fields["block_size"]
    blocks = -(-num_tokens // size)
    return so.BlockLayout.from_mask(
        torch.ones(blocks, blocks, dtype=torch.bool, device=device),
        num_tokens=num_tokens,
        block_size=size,
        num_global=fields["num_global"],
    )


def _expected(
    inputs: dict[str, Tensor],
    upstream: Tensor,
    layout: so.BlockLayout,
    codes: Tensor | None,
    saliency: bool,
) -> Expected:
    """The reference in fp64, a head at a time: its memory is quadratic in tokens."""
    heads = upstream.shape[1]
    used = dict(inputs)
    if codes is None:
        used.pop("bias_table", None)
    names = ["out", "saliency"] if saliency else ["out"]
    names += [f"grad_{name}" for name in used]
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    errors = dict.fromkeys(names, 0.0)
    for h in range(heads):
        exact = _head(used, upstream, layout, codes, saliency, h, torch.float64)
        # Over all heads, as a provider's error is: a maximum grows with what it is taken over.
        plain = _head(used, upstream, layout, codes, saliency, h, upstream.dtype)
        for name in names:
            error = (plain[name].double() - exact[name]).abs().max()
            errors[name] = max(errors[name], float(error))
        for name in names:
            columns[name].append(exact[name])
    values = {name: torch.cat(found, 1) for name, found in columns.items()}
    if saliency:
        values["saliency"] = torch.stack(columns["saliency"]).mean(0)
    return Expected(values=values, plain_error=errors)


def _head(
    inputs: dict[str, Tensor],
    upstream: Tensor,
    layout: so.BlockLayout,
    codes: Tensor | None,
    saliency: bool,
    h: int,
    compute: torch.dtype,
) -> dict[str, Tensor]:
    """Outputs and gradients of one head of every sample, every step in the dtype `compute`."""
    table = inputs.get("bias_table")
    leaf_dtype = torch.promote_types(compute, torch.float32)
    column = None if table is None else table[:, h : h + 1].to(leaf_dtype).requires_grad_()
    rows: dict[str, list[Tensor]] = {}
    for b in range(upstream.shape[0]):
        part = (slice(b, b + 1), slice(h, h + 1))
        q, k, v = (
            inputs[name][part].to(compute).detach().requires_grad_()
            for name in ("query", "key", "value")
        )
        leaves = [q, k, v] + ([] if column is None else [column])
        out, _, row = attend(q, k, v, layout, column, codes, None, None, compute)
        grads = torch.autograd.grad(out, leaves, upstream[part].to(compute))
        found = {"out": out.detach(), "saliency": row.detach()}
        found |= {f"grad_{name}": grad for name, grad in zip(inputs, grads, strict=True)}
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    merged = {name: torch.cat(found) for name, found in rows.items() if name in ("out", "saliency")}
    for name in inputs:
        grads_of = rows[f"grad_{name}"]
        shared = name == "bias_table"
        merged[f"grad_{name}"] = torch.stack(grads_of).sum(0) if shared else torch.cat(grads_of)
    if not saliency:
        merged.pop("saliency")
    return merged

"""Attention of SCL's video tower: every [CLS] over all frames, patches over their own.

Ours is two calls of ops without a mask; SDPA does dense work under one. The fact `edges` is what
the mathematics needs: it grows with the frames, where dense work grows with their square.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so
from bench.measure.harness import DTYPES, Case, Expected, Problem, Provider
from svitt_ops.models.parts.video import DENSE_BLOCK
from svitt_ops.models.scl.vision import frame_attention

FRAMES = (1, 2, 4, 8, 16)
FIELDS = {"heads": 12, "head_dim": 64, "patches": 196}  # base model, 224 x 224 in patches of 16


def cases(device: str) -> list[Case]:
    """Clips of the base model, of 1 to 16 frames."""
    return list(_cases(device))


def _cases(device: str) -> Iterator[Case]:
    batch = 8 if device == "cuda" else 1
    for dtype in ("bf16",) if device == "cuda" else ("fp32", "bf16"):
        for frames in FRAMES:
            yield Case(
                name=f"frames{frames}-{dtype}",
                dtype=dtype,
                device=device,
                fields={**FIELDS, "batch": batch, "frames": frames},
                quick=frames == 4,
            )


def shrunk(case: Case) -> Case:
    """The same case with few patches, one head and one sample."""
    return case.shrunk(patches=17, heads=1, batch=1)


def problem(case: Case) -> Problem:
    """Tensors, oracles and providers of a case."""
    f, device, dtype = case.fields, torch.device(case.device), DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(f["frames"])
    batch, heads, dim, frames = (f[name] for name in ("batch", "heads", "head_dim", "frames"))
    size = 1 + f["patches"]

    def randn() -> Tensor:
        shape = (batch, frames * size, heads, dim)
        return torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2)

    inputs, upstream = {name: randn() for name in ("query", "key", "value")}, randn()
    mask = _mask(frames, size, device)
    edges = frames * (size - 1) * size + frames * frames * size
    assert edges == int(mask.sum())
    flops = 4.0 * dim * edges * batch * heads
    tensor = float(upstream.numel() * upstream.element_size())
    lse = batch * heads * frames * size * 4
    return Problem(
        inputs=inputs,
        upstream=upstream,
        outputs=("out",),
        oracles={
            "op": lambda: _expected(inputs, upstream, mask),
            "dense": lambda: _expected(inputs, upstream, torch.ones_like(mask)),
        },
        providers=_providers(frames, size, mask),
        flops={"forward": flops, "forward_backward": 3.5 * flops},
        bytes={"forward": 4 * tensor + lse, "forward_backward": 12 * tensor + 2 * lse},
        facts={"edges": edges, "tokens": frames * size, "density": edges / (frames * size) ** 2},
    )


def _providers(frames: int, size: int, mask: Tensor) -> list[Provider]:
    blocks = -(-(size - 1) // DENSE_BLOCK)
    layout = so.BlockLayout.from_mask(
        torch.ones(blocks, blocks, dtype=torch.bool, device=mask.device),
        num_tokens=size - 1,
        block_size=DENSE_BLOCK,
    )

    def ours(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (frame_attention(query, key, value, layout),)

    def masked(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (F.scaled_dot_product_attention(query, key, value, attn_mask=mask),)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (F.scaled_dot_product_attention(query, key, value),)

    def apart(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        folded = [
            x.unflatten(2, (frames, size)).transpose(1, 2).flatten(0, 1)
            for x in (query, key, value)
        ]
        own = F.scaled_dot_product_attention(*folded).unflatten(0, (-1, frames))
        seen = F.scaled_dot_product_attention(query[:, :, ::size], key, value)
        rows = torch.cat([seen.transpose(1, 2)[:, :, :, None], own[:, :, :, 1:]], 3)
        return (rows.transpose(1, 2).flatten(2, 3),)

    return [
        Provider(name="svitt_ops", role="ours", build=lambda: ours),
        Provider(
            name="sdpa_mask", build=lambda: masked, note="dense work under a materialised mask"
        ),
        Provider(
            name="sdpa_apart",
            build=lambda: apart,
            note="SDPA of frames, and of [CLS] over all",
        ),
        Provider(
            name="sdpa_dense",
            oracle="dense",
            build=lambda: dense,
            note="dense: every token attends every other",
        ),
    ]


def _mask(frames: int, size: int, device: torch.device) -> Tensor:
    """Which token attends which, bool ``(tokens, tokens)``."""
    frame = torch.arange(frames * size, device=device) // size
    is_class = torch.arange(frames * size, device=device) % size == 0
    return (frame[:, None] == frame) | is_class[:, None]


def _expected(inputs: dict[str, Tensor], upstream: Tensor, mask: Tensor) -> Expected:
    """Softmax under the mask, a head of a sample at a time: its memory is quadratic in tokens."""
    rows = torch.cartesian_prod(*map(torch.arange, upstream.shape[:2])).tolist()
    parts = [
        Expected.of(partial(_one, inputs, upstream, mask, part), upstream.dtype) for part in rows
    ]
    shape = upstream.shape
    values = {
        name: torch.stack([part.values[name] for part in parts]).view(shape)
        for name in parts[0].values
    }
    errors = {name: max(part.plain_error[name] for part in parts) for name in values}
    return Expected(values=values, plain_error=errors)


def _one(
    inputs: dict[str, Tensor], upstream: Tensor, mask: Tensor, part: Any, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and gradients of one head of one sample, every step in a dtype."""
    sample, head = part
    leaves = [x[sample, head].to(dtype).detach().requires_grad_() for x in inputs.values()]
    query, key, value = leaves
    logits = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    out = logits.softmax(-1) @ value
    grads = torch.autograd.grad(out, leaves, upstream[sample, head].to(dtype))
    return {"out": out.detach()} | {
        f"grad_{name}": grad for name, grad in zip(inputs, grads, strict=True)
    }

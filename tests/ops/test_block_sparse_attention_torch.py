"""The op as torch's machinery sees it: compile, opcheck, autocast, fakes, FLOPs, no extension."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import svitt_ops as so
from svitt_ops.block_sparse_attention import _lists_4d

LAYOUT = so.BlockLayout.local_random(100, block_size=16)
CODES = so.position_codes((1, 10, 10))


def inputs(**options: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(3, 2, 3, 101, 16, generator=generator)
    return [x.to(**options).requires_grad_() for x in qkv]


def table() -> torch.Tensor:
    return torch.randn(19 * 19 + 3, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler: str) -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Any, bias: Any) -> Any:
        out, saliency = so.block_sparse_attention(
            q * 2, k, v, layout, bias_table=bias, position_codes=CODES, return_saliency=True
        )
        return out.transpose(1, 2).flatten(2) + 1, saliency

    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    for layout in (LAYOUT, so.BlockLayout.local_random(100, block_size=16)):
        results = []
        for function in (run, compiled):
            leaves = [*inputs(), table()]
            out, saliency = function(*leaves[:3], layout, leaves[3])
            results.append((out, saliency, *torch.autograd.grad(out.square().sum(), leaves)))
        for eager, fused in zip(*results, strict=True):
            torch.testing.assert_close(eager, fused)


def test_compiles_for_any_batch() -> None:
    compiled = torch.compile(
        so.block_sparse_attention, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for batch in (2, 3, 5):
        q = torch.randn(batch, 3, 101, 16)
        assert torch.equal(compiled(q, q, q, LAYOUT), so.block_sparse_attention(q, q, q, LAYOUT))


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias: bool) -> None:
    q, k, v = inputs()
    lists = _lists_4d(LAYOUT)
    lengths = torch.tensor([101, 40], dtype=torch.int32)
    options: tuple[Any, ...] = (table(), CODES[None], lengths) if bias else (None, None, None)
    options = (*options, 0.25)
    forward = torch.ops.svitt_ops.block_sparse_attention.default
    torch.library.opcheck(forward, (q, k, v, *lists, 16, 1, *options, bias))
    with torch.no_grad():
        out, lse, _ = forward(q, k, v, *lists, 16, 1, *options, bias)
        plain = [x.detach() for x in (torch.randn_like(out), q, k, v, out, lse)]
        options = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in options)
    torch.library.opcheck(
        torch.ops.svitt_ops.block_sparse_attention_backward.default,
        (*plain, *lists, 16, 1, *options),
    )
    torch.library.opcheck(torch.ops.svitt_ops.draw_block_layout.default, (torch.rand(9, 9), 1, 3))


def test_autocast() -> None:
    q, k, v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = so.block_sparse_attention(q, k.bfloat16(), v, LAYOUT)
    halves = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, so.block_sparse_attention(*halves, LAYOUT))
    out.sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


def test_fake_cuda_tensors() -> None:
    # A torch without CUDA cannot differentiate fake CUDA tensors, so the gradient's op is called.
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (
            torch.empty(2, 101, 3, 16, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(3)
        )
        layout = so.BlockLayout.local_random(100, block_size=16, device="cuda")
        bias = torch.empty(19 * 19 + 3, 3, device="cuda")
        codes = torch.empty(100, dtype=torch.int32, device="cuda")
        lengths = torch.empty(2, dtype=torch.int32, device="cuda")
        options = dict(bias_table=bias, position_codes=codes, key_lengths=lengths)
        out, saliency = so.block_sparse_attention(q, k, v, layout, **options, return_saliency=True)
        assert out.device.type == "cuda" and out.dtype == torch.bfloat16
        assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()
        assert saliency.shape == (2, 100) and saliency.dtype == torch.float32
        lse = torch.empty(2, 3, 101, device="cuda")
        grads = torch.ops.svitt_ops.block_sparse_attention_backward(
            out,
            q,
            k,
            v,
            out,
            lse,
            *_lists_4d(layout),
            16,
            1,
            bias,
            codes.view(1, -1),
            lengths,
            0.25,
        )
        assert [g.shape for g in grads] == [q.shape] * 3 + [bias.shape]
        assert all(g.transpose(1, 2).is_contiguous() for g in grads[:3])
        assert all(g.device.type == "cuda" for g in grads)


@pytest.mark.parametrize("tokens", [96, 100])
def test_flops_count_edges(tokens: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layout = so.BlockLayout.local_random(tokens, block_size=16)
    q, k, v = (x[:, :, : tokens + 1].detach().requires_grad_() for x in inputs())
    useful = 4 * 16 * layout.num_edges * 2 * 3
    with FlopCounterMode(display=False) as counter:
        out = so.block_sparse_attention(q, k, v, layout)
    assert counter.get_total_flops() == useful
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), (q, k, v))
    assert counter.get_total_flops() == useful * 5 // 2


def test_no_second_derivative() -> None:
    q, k, v = inputs()
    out = so.block_sparse_attention(q, k, v, LAYOUT)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is not available"):
        grad.sum().backward()


@pytest.mark.gpu
def test_cuda_graph_capture() -> None:
    q = torch.randn(2, 3, 785, 64, device="cuda", dtype=torch.bfloat16)
    layout = so.BlockLayout.local_random(784, device="cuda")
    expected = so.block_sparse_attention(q, q, q, layout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = so.block_sparse_attention(q, q, q, layout)
    graph.replay()
    assert torch.equal(captured, expected)


def test_without_the_extension() -> None:
    script = """
import warnings
import torch

def refuse(path):
    raise OSError("not today")

torch.ops.load_library = refuse
import svitt_ops as so
layout = so.BlockLayout.local_random(100, block_size=16)
q = torch.randn(1, 2, 101, 16, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        out, saliency = so.block_sparse_attention(q, q, q, layout, return_saliency=True)
        (found,) = torch.autograd.grad(out.square().sum(), q)
assert [str(w.message).startswith("svitt_ops: the compiled CPU") for w in caught] == [True], caught
out = so.reference.block_sparse_attention(q, q, q, layout)
(expected,) = torch.autograd.grad(out.square().sum(), q)
torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
"""
    subprocess.run([sys.executable, "-c", script], check=True)

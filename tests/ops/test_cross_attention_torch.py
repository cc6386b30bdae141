"""cross_attention as torch's machinery sees it: compile, opcheck, autocast, fakes, FLOPs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import svitt_ops as so

MASK = torch.arange(101).expand(2, 101) >= torch.tensor([[101], [40]])


def inputs(**options: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (7, 101, 101)
    return [
        torch.randn(2, 3, n, 16, generator=generator).to(**options).requires_grad_() for n in sizes
    ]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler: str) -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> Any:
        out, saliency = so.cross_attention(
            q * 2, k, v, key_padding_mask=mask, return_saliency="mean"
        )
        return out.transpose(1, 2).flatten(2) + 1, saliency

    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    results = []
    for function in (run, compiled):
        leaves = inputs()
        out, saliency = function(*leaves, MASK)
        results.append((out, saliency, *torch.autograd.grad(out.square().sum(), leaves)))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(eager, fused)


def test_compiles_for_any_size() -> None:
    compiled = torch.compile(so.cross_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, queries, keys in ((2, 5, 30), (3, 7, 50), (5, 9, 20)):
        q, k = (torch.randn(batch, 3, n, 16) for n in (queries, keys))
        assert torch.equal(compiled(q, k, k), so.cross_attention(q, k, k))


@pytest.mark.parametrize("saliency", [0, 1, 2])
def test_opcheck(saliency: int) -> None:
    q, k, v = inputs()
    mask = MASK if saliency else None
    forward = torch.ops.svitt_ops.cross_attention.default
    torch.library.opcheck(forward, (q, k, v, mask, 0.25, saliency))
    with torch.no_grad():
        out, lse, _ = forward(q, k, v, mask, 0.25, saliency)
        plain = [x.detach() for x in (torch.randn_like(out), q, k, v, out, lse)]
    backward = torch.ops.svitt_ops.cross_attention_backward.default
    torch.library.opcheck(backward, (*plain, mask, 0.25))


def test_autocast() -> None:
    q, k, v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = so.cross_attention(q, k.bfloat16(), v)
    assert torch.equal(out, so.cross_attention(*(x.bfloat16() for x in (q, k, v))))
    out.sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


def test_fake_cuda_tensors() -> None:
    # A torch without CUDA cannot differentiate fake CUDA tensors, so the gradient's op is called.
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (
            torch.empty(2, n, 3, 16, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for n in (7, 101, 101)
        )
        mask = torch.empty(2, 101, dtype=torch.bool, device="cuda")
        out, saliency = so.cross_attention(q, k, v, key_padding_mask=mask, return_saliency="cls")
        assert out.device.type == "cuda" and out.dtype == torch.bfloat16
        assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()
        assert saliency.shape == (2, 101) and saliency.dtype == torch.float32
        lse = torch.empty(2, 3, 7, device="cuda")
        grads = torch.ops.svitt_ops.cross_attention_backward(out, q, k, v, out, lse, mask, 0.25)
        assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]
        assert all(g.transpose(1, 2).is_contiguous() for g in grads)
        assert all(g.device.type == "cuda" for g in grads)


def test_flops_count_pairs() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = inputs()
    useful = 4 * 16 * 7 * 101 * 2 * 3
    with FlopCounterMode(display=False) as counter:
        out = so.cross_attention(q, k, v)
    assert counter.get_total_flops() == useful
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), (q, k, v))
    assert counter.get_total_flops() == useful * 5 // 2


def test_no_second_derivative() -> None:
    q, k, v = inputs()
    out = so.cross_attention(q, k, v)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is not available"):
        grad.sum().backward()


@pytest.mark.gpu
def test_cuda_graph_capture() -> None:
    q, k = (torch.randn(2, 3, n, 64, device="cuda", dtype=torch.bfloat16) for n in (32, 785))
    mask = torch.zeros(2, 785, dtype=torch.bool, device="cuda")
    options: Any = dict(key_padding_mask=mask, return_saliency="mean")
    expected = so.cross_attention(q, k, k, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = so.cross_attention(q, k, k, **options)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_without_the_extension() -> None:
    script = """
import warnings
import torch

def refuse(path):
    raise OSError("not today")

torch.ops.load_library = refuse
import svitt_ops as so
q, k = torch.randn(1, 2, 5, 16, requires_grad=True), torch.randn(1, 2, 30, 16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        out, saliency = so.cross_attention(q, k, k, return_saliency="mean")
        (found,) = torch.autograd.grad(out.square().sum(), q)
assert [str(w.message).startswith("svitt_ops: the compiled CPU") for w in caught] == [True], caught
(expected,) = torch.autograd.grad(so.reference.cross_attention(q, k, k).square().sum(), q)
torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
"""
    subprocess.run([sys.executable, "-c", script], check=True)

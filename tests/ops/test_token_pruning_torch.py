"""Token pruning as torch's machinery sees it, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import svitt_ops as so

CODES = torch.arange(30, dtype=torch.int32)


def inputs(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 31, 8, generator=generator).to(**options).requires_grad_()
    return tokens, torch.randn(2, 30, generator=generator)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler: str) -> None:
    def run(tokens: torch.Tensor, scores: torch.Tensor) -> Any:
        kept = so.prune_tokens(
            tokens * 2, scores.softmax(1), keep_rate=0.6, position_codes=CODES.to(tokens.device)
        )
        again = so.select_tokens(kept.tokens[:, 1:, 0], 3)
        return kept.tokens.sin(), kept.indices, kept.position_codes, again

    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    results = []
    for function in (run, compiled):
        tokens, scores = inputs()
        out, *rest = function(tokens, scores)
        results.append((out, *rest, *torch.autograd.grad(out.square().sum(), tokens)))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(eager, fused)


def test_compiles_for_any_length() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def run(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return so.prune_tokens(tokens, scores, keep_rate=0.55).tokens

    compiled = torch.compile(run, backend=count, fullgraph=True, dynamic=True)
    for batch, length in ((2, 12), (3, 21), (5, 40)):
        tokens, scores = torch.randn(batch, length, 5), torch.randn(batch, length - 1)
        assert torch.equal(compiled(tokens, scores), run(tokens, scores))
    assert len(graphs) == 1


def test_opcheck() -> None:
    tokens, scores = inputs()
    op = torch.ops.svitt_ops
    for codes in (None, CODES[None]):
        torch.library.opcheck(op.prune_tokens.default, (tokens, scores, 7, 1, codes))
    torch.library.opcheck(op.select_tokens.default, (scores, 7))
    with torch.no_grad():
        out, _, inverse, _ = op.prune_tokens(tokens, scores, 7, 1, None)
    torch.library.opcheck(op.prune_tokens_backward.default, (out, inverse, 1))


def test_gradcheck_of_the_reference() -> None:
    tokens, scores = inputs(dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda x: so.reference.prune_tokens(x, scores, keep=9, num_global=1).tokens, (tokens,)
    )


def test_gradients_go_to_tokens_alone() -> None:
    tokens, scores = inputs()
    scores.requires_grad_()
    kept = so.prune_tokens(tokens, scores, keep=7)
    assert not kept.indices.requires_grad
    assert not so.prune_tokens(tokens.detach(), scores, keep=7).tokens.requires_grad
    # An upstream gradient whose strides are all 0, and one that is transposed.
    (grad,) = torch.autograd.grad(kept.tokens.sum(), tokens)
    assert grad.sum() == 2 * 8 * 8
    upstream = torch.randn(8, 8, 2).permute(2, 1, 0)
    found, expected = (
        torch.autograd.grad(prune(tokens, scores, keep=7).tokens, tokens, upstream)[0]
        for prune in (so.prune_tokens, so.reference.prune_tokens)
    )
    assert torch.equal(found, expected)


def test_no_second_derivative() -> None:
    tokens, scores = inputs()
    out = so.prune_tokens(tokens, scores, keep=7).tokens
    (grad,) = torch.autograd.grad(out.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is not available"):
        grad.sum().backward()


def test_autocast_casts_nothing() -> None:
    tokens, scores = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        kept = so.prune_tokens(tokens, scores, keep=7)
    assert torch.equal(kept.tokens, so.prune_tokens(tokens, scores, keep=7).tokens)
    kept.tokens.sum().backward()
    assert tokens.grad is not None and tokens.grad.dtype == torch.float32


def test_fake_cuda_tensors() -> None:
    # A torch without CUDA cannot differentiate fake CUDA tensors, so the gradient's op is called.
    with FakeTensorMode(), torch.no_grad():
        tokens = torch.empty(2, 31, 8, device="cuda", dtype=torch.bfloat16)
        scores = torch.empty(2, 30, device="cuda")
        codes = torch.empty(30, dtype=torch.int32, device="cuda")
        kept = so.prune_tokens(tokens, scores, keep_rate=0.6, position_codes=codes)
        assert kept.tokens.shape == (2, 19, 8) and kept.tokens.dtype == torch.bfloat16
        assert kept.indices.shape == (2, 18) and kept.indices.dtype == torch.int64
        assert kept.position_codes is not None
        assert kept.position_codes.shape == (2, 18) and kept.position_codes.dtype == torch.int32
        assert so.select_tokens(scores, 3).shape == (2, 3)
        inverse = torch.empty(2, 30, dtype=torch.int32, device="cuda")
        grad = torch.ops.svitt_ops.prune_tokens_backward(kept.tokens, inverse, 1)
        assert grad.shape == tokens.shape and grad.dtype == tokens.dtype
        assert all(x.device.type == "cuda" for x in (*kept, grad))


def test_no_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    tokens, scores = inputs()
    with FlopCounterMode(display=False) as counter:
        so.prune_tokens(tokens, scores, keep=7).tokens.sum().backward()
    assert counter.get_total_flops() == 0


@pytest.mark.gpu
def test_cuda_graph_capture() -> None:
    for batch in (2, 130):
        tokens = torch.randn(batch, 785, 64, device="cuda", dtype=torch.bfloat16)
        scores = torch.randn(batch, 784, device="cuda")
        expected = so.prune_tokens(tokens, scores, keep=549)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = so.prune_tokens(tokens, scores, keep=549)
        captured.tokens.zero_()
        graph.replay()
        assert torch.equal(captured.tokens, expected.tokens)


def test_without_the_extension() -> None:
    script = """
import warnings
import torch

def refuse(path):
    raise OSError("not today")

torch.ops.load_library = refuse
import svitt_ops as so
tokens = torch.randn(2, 31, 8, requires_grad=True)
scores = torch.randn(2, 30)
codes = torch.arange(30, dtype=torch.int32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    kept = so.prune_tokens(tokens, scores, keep=7, position_codes=codes)
    (found,) = torch.autograd.grad(kept.tokens.square().sum(), tokens)
assert [str(w.message).startswith("svitt_ops: the compiled CPU") for w in caught] == [True], caught
expected = so.reference.prune_tokens(tokens, scores, keep=7, position_codes=codes)
assert all(torch.equal(a, b) for a, b in zip(kept, expected))
assert torch.equal(found, torch.autograd.grad(expected.tokens.square().sum(), tokens)[0])
"""
    subprocess.run([sys.executable, "-c", script], check=True)


TOKENS, SCORES = torch.randn(2, 31, 8), torch.randn(2, 30)
PRUNING: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": (dict(tokens=TOKENS[0]), ValueError, r"tokens must have shape \(batch.*got \(31, 8\)"),
    "no tensor": (dict(tokens=[1.0]), TypeError, "tokens must be a tensor, got list"),
    "fp64": (dict(tokens=TOKENS.double()), TypeError, "tokens must be float32.*got torch.float64"),
    "strides": (
        dict(tokens=TOKENS.mT.contiguous().mT),
        ValueError,
        r"tokens must have a contiguous last dimension, got strides \(248, 1, 31\)",
    ),
    "no scores": (dict(scores=None), TypeError, "scores must be a tensor, got NoneType"),
    "score dtype": (dict(scores=SCORES.long()), TypeError, "scores must be float32.*torch.int64"),
    "score rank": (
        dict(scores=SCORES[0]),
        ValueError,
        r"scores must have shape \(batch, tokens\), got \(30,\)",
    ),
    "score length": (
        dict(scores=torch.randn(2, 31)),
        ValueError,
        r"scores must have shape \(2, 30\), got \(2, 31\)",
    ),
    "score batch": (dict(scores=SCORES[:1]), ValueError, r"scores must have .*got \(1, 30\)"),
    "score device": (dict(scores=SCORES.to("meta")), ValueError, "scores must be on cpu, got meta"),
    "globals": (dict(num_global=-1), ValueError, "num_global must be at least 0, got -1"),
    "many globals": (dict(num_global=32), ValueError, "num_global must be at most 31, got 32"),
    "float globals": (dict(num_global=1.0), TypeError, "num_global must be an int, got float"),
    "no keep": (dict(keep=None), ValueError, "keep or keep_rate must be given, got neither"),
    "both": (dict(keep_rate=0.5), ValueError, "keep or keep_rate must be given, got both"),
    "keep 0": (dict(keep=0), ValueError, "keep must be 1 to 30, got 0"),
    "keep -1": (dict(keep=-1), ValueError, "keep must be 1 to 30, got -1"),
    "keep more": (dict(keep=31), ValueError, "keep must be 1 to 30, got 31"),
    "float keep": (dict(keep=7.0), TypeError, "keep must be an int, got float"),
    "bool keep": (dict(keep=True), TypeError, "keep must be an int, got bool"),
    "rate 0": (
        dict(keep=None, keep_rate=0.0),
        ValueError,
        "keep_rate must be more than 0 and at most 1, got 0.0",
    ),
    "rate 1.1": (dict(keep=None, keep_rate=1.1), ValueError, "keep_rate must be .*got 1.1"),
    "rate nan": (dict(keep=None, keep_rate=float("nan")), ValueError, "keep_rate .*got nan"),
    "rate str": (dict(keep=None, keep_rate="1"), TypeError, "keep_rate must be a number, got str"),
    "code dtype": (
        dict(position_codes=CODES.long()),
        TypeError,
        "position_codes must be int32, got torch.int64",
    ),
    "code shape": (
        dict(position_codes=CODES[:29]),
        ValueError,
        r"position_codes must have shape \(30,\) or .*\(2, 30\), got \(29,\)",
    ),
    "code batch": (
        dict(position_codes=CODES.repeat(3, 1)),
        ValueError,
        r"position_codes must have shape .*got \(3, 30\)",
    ),
    "code device": (
        dict(position_codes=CODES.to("meta")),
        ValueError,
        "position_codes must be on cpu, got meta",
    ),
    "codes list": (
        dict(position_codes=[1]),
        TypeError,
        "position_codes must be a tensor, got list",
    ),
}


@pytest.mark.parametrize("name", PRUNING)
def test_prune_tokens_refuses(name: str) -> None:
    changes, error, message = PRUNING[name]
    arguments: dict[str, Any] = dict(tokens=TOKENS, scores=SCORES, keep=7) | changes
    with pytest.raises(error, match=f"prune_tokens: {message}"):
        so.prune_tokens(**arguments)


@pytest.mark.parametrize(
    ("scores", "keep", "error", "message"),
    [
        (SCORES, 0, ValueError, "keep must be 1 to 30, got 0"),
        (SCORES, 31, ValueError, "keep must be 1 to 30, got 31"),
        (SCORES, 2.0, TypeError, "keep must be an int, got float"),
        (SCORES[0], 3, ValueError, r"scores must have shape \(batch, tokens\), got \(30,\)"),
        (SCORES.double(), 3, TypeError, "scores must be float32.*got torch.float64"),
        ("abc", 3, TypeError, "scores must be a tensor, got str"),
    ],
)
def test_select_tokens_refuses(
    scores: Any, keep: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"select_tokens: {message}"):
        so.select_tokens(scores, keep)


@pytest.mark.parametrize(
    ("rate", "tokens", "error", "message"),
    [
        (0.0, 10, ValueError, "keep_rate must be more than 0 and at most 1, got 0.0"),
        (2, 10, ValueError, "keep_rate must be more than 0 and at most 1, got 2"),
        (True, 10, TypeError, "keep_rate must be a number, got bool"),
        (0.5, -1, ValueError, "num_tokens must be at least 0, got -1"),
        (0.5, 2.5, TypeError, "num_tokens must be an int, got float"),
    ],
)
def test_keep_count_refuses(rate: Any, tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"keep_count: {message}"):
        so.keep_count(rate, tokens)

"""block_sparse_attention against fp64, through every implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import svitt_ops as so
from svitt_ops.testing import assert_within_budget, attention_results, poisoned

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem, small enough for an interpreted kernel unless `large`."""

    tokens: int = 111
    block_size: int = 56
    num_global: int = 1
    head_dim: int = 64
    batch: int = 2
    heads: int = 2
    scale: float = 1.0
    bias: str = ""  # "shared", "per_sample" or "pruned" codes
    lengths: tuple[int, ...] | None = None
    layout: str = "random"
    storage: str = "plain"  # "packed", "expanded", "heads_first"
    large: bool = False

    def __str__(self) -> str:
        changed = (f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case(), k))
        return "-".join(changed) or "default"


CASES = [
    Case(),
    Case(tokens=0, bias="shared"),
    Case(tokens=1, bias="shared", head_dim=8),
    Case(tokens=55, lengths=(56, 0)),
    Case(tokens=56, num_global=0, bias="shared"),
    Case(tokens=57, num_global=3, bias="shared", head_dim=20),
    Case(tokens=57, num_global=0, layout="empty_rows", bias="shared"),
    Case(layout="empty_rows", num_global=1),
    Case(tokens=5, block_size=1, bias="shared", head_dim=32, batch=1),
    Case(tokens=60, block_size=1, bias="shared", head_dim=32, large=True),
    Case(tokens=26, block_size=7, num_global=2, layout="per_head", bias="per_sample"),
    Case(tokens=40, block_size=16, layout="per_sample", storage="packed", lengths=(41, 18)),
    Case(tokens=130, block_size=64, layout="full", head_dim=80, batch=1, heads=1),
    Case(tokens=130, block_size=100, num_global=9, head_dim=96, bias="pruned", batch=1, heads=1),
    Case(tokens=300, block_size=256, head_dim=128, bias="shared", large=True),
    Case(tokens=70, block_size=16, head_dim=256, bias="pruned", lengths=(0, 1)),
    Case(tokens=60, block_size=56, head_dim=33, num_global=8, storage="packed"),
    Case(scale=4.0, bias="per_sample", storage="packed"),
    Case(scale=16.0, storage="expanded"),
    Case(tokens=112, batch=1, heads=3, storage="heads_first", bias="shared", lengths=(100,)),
    Case(tokens=30, block_size=16, num_global=300, large=True, bias="shared"),
    Case(tokens=549, large=True, bias="pruned", layout="local_random"),
    Case(tokens=785, large=True, bias="shared", layout="local_random", storage="packed"),
    Case(tokens=785, large=True, layout="full", lengths=(786, 333), bias="shared"),
    Case(tokens=785, large=True, scale=16.0, layout="local_random", head_dim=96),
]


def build(case: Case, dtype: torch.dtype, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments and keywords of `attention_results`, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(7)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    g, blocks, tokens = case.num_global, -(-case.tokens // case.block_size), case.tokens
    sizes = dict(num_tokens=tokens, block_size=case.block_size, num_global=g)
    lead = {"per_head": (case.heads,), "per_sample": (case.batch, case.heads)}.get(case.layout, ())
    mask = torch.rand(*lead, blocks, blocks, generator=generator) < 0.6
    if case.layout == "full":
        mask.fill_(True)
    elif case.layout == "empty_rows":
        mask[::2] = False
        mask[:, 0] = False
    layout = so.BlockLayout.from_mask(mask, **sizes)
    if case.layout == "local_random":
        layout = so.BlockLayout.local_random(**sizes, generator=generator)
    b, h, n, d = case.batch, case.heads, g + tokens, case.head_dim
    if case.storage == "packed":
        qkv = draw(b, n, 3, h, d).permute(2, 0, 3, 1, 4)
    elif case.storage == "expanded":
        qkv = draw(3, 1, h, n, d).expand(3, b, h, n, d)
    elif case.storage == "heads_first":
        qkv = draw(3, h, b, n, d).transpose(1, 2)
    else:
        qkv = draw(3, b, h, n, d)
    shape = qkv.stride()
    qkv = torch.as_strided(
        (case.scale * qkv.as_strided((qkv.untyped_storage().nbytes() // 4,), (1,))).to(
            device, dtype
        ),
        qkv.shape,
        shape,
    )
    options: dict[str, Any] = {}
    if case.bias:
        grid = (2, 20, 20)
        rows = 3 * 39 * 39 + 2 * g + g * g
        options["bias_table"] = draw(rows, h).to(device)
        codes = so.position_codes(grid)
        if case.bias == "pruned":
            codes = codes[torch.randperm(len(codes), generator=generator)[:tokens].sort().values]
        if case.bias == "per_sample":
            codes = torch.stack([codes[i : i + tokens] for i in range(0, 3 * b, 3)])
        options["position_codes"] = codes[..., :tokens].contiguous().to(device)
    if case.lengths is not None:
        options["key_lengths"] = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    grad_out = draw(b, n, h, d).to(device, dtype).transpose(1, 2)
    return (qkv[0], qkv[1], qkv[2], layout.to(device), grad_out), options


def gradient_terms(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: so.BlockLayout, grad: torch.Tensor
) -> dict[str, float]:
    """Magnitudes of dP = dO V^T times what it multiplies; a row of one key cancels it exactly."""
    if not q.numel():
        return {}
    slope = (grad.float() @ v.float().mT).abs().max().item()
    scale = q.shape[-1] ** -0.5
    return {
        "grad_query": slope * scale * k.abs().max().item(),
        "grad_key": slope * scale * q.abs().max().item(),
        "grad_bias_table": slope,
    }


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(case: Case, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and (case.large or dtype == torch.bfloat16 or case.head_dim > 128):
        pytest.skip("too slow to interpret, or a dtype that the interpreter gets wrong")
    if backend == "reference" and (case.large or dtype != torch.float32):
        pytest.skip("the oracle itself")
    if case.num_global > 256 and backend == "cuda":
        pytest.skip("a CPU case")
    arguments, options = build(case, dtype, "cuda" if backend == "cuda" else "cpu")
    oracle = attention_results(*arguments, compute=torch.float64, **options)
    baseline = attention_results(*arguments, compute=dtype, **options)
    with poisoned():
        found = attention_results(*arguments, **options)
    assert found.keys() == oracle.keys()
    terms = gradient_terms(*arguments)
    for name, result in found.items():
        assert_within_budget(
            result, baseline[name], oracle[name], f"{case} {name}", dtype, terms.get(name, 0.0)
        )
    again = attention_results(*arguments, **options)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absent_tokens_never_leak(dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter gets bf16 wrong")
    case = replace(Case(), lengths=(90, 1), bias="shared", tokens=100)
    (q, k, v, layout, grad), options = build(case, dtype, "cuda" if backend == "cuda" else "cpu")
    clean = attention_results(q, k, v, layout, grad, **options)
    q, k, v, grad = (x.clone() for x in (q, k, v, grad))
    for x in (q, k, v, grad):
        x[0, :, 90:] = float("nan")
        x[1, :, 1:] = float("inf")
    dirty = attention_results(q, k, v, layout, grad, **options)
    for name, result in clean.items():
        assert torch.equal(result, dirty[name]), name
    assert not dirty["out"][0, :, 90:].any() and not dirty["grad_key"][1, :, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_layout_is_dense_attention(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 3, 301, 64).to(dtype).unbind()
    every = so.BlockLayout.local_random(300, num_local=1, num_random=5)  # of 6 blocks
    many = so.BlockLayout.local_random(300, num_local=3, num_random=99)
    ones = so.BlockLayout.from_mask(
        torch.ones(6, 6, dtype=torch.bool), num_tokens=300, block_size=56
    )
    oracle = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with sdpa_kernel(SDPBackend.MATH):  # torch's fast one fails under some ATEN_CPU_CAPABILITY
        dense = F.scaled_dot_product_attention(q, k, v)
    for layout in (every, many, ones):
        assert layout.density == 1.0
        assert_within_budget(so.block_sparse_attention(q, k, v, layout), dense, oracle, "out")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    case = Case(tokens=500, heads=5, bias="pruned", layout="local_random")
    arguments, options = build(case, dtype, "cpu")
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(attention_results(*arguments, **options))
    finally:
        torch.set_num_threads(threads)
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_upstream_gradient(dtype: torch.dtype, backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    (q, k, v, layout, _), _ = build(Case(tokens=60), dtype, device)
    ones = torch.ones_like(q)
    expected = attention_results(q, k, v, layout, ones)
    expanded = attention_results(q, k, v, layout, ones[:1, :1, :1, :1].expand_as(q))
    strided = attention_results(q, k, v, layout, torch.ones(*q.shape[:3], 128).to(q)[..., ::2])
    for name in expected:
        assert torch.equal(expected[name], expanded[name]), name
        assert torch.equal(expected[name], strided[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_sample_and_no_head(dtype: torch.dtype, backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    layout = so.BlockLayout.local_random(60, device=device)
    for shape in ((0, 2, 61, 64), (2, 0, 61, 64)):
        q = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        out, saliency = so.block_sparse_attention(q, q, q, layout, return_saliency=True)
        assert out.shape == shape and saliency.shape == (shape[0], 60)
        out.sum().backward()
        assert q.grad is not None and q.grad.shape == shape


def test_a_token_alone_has_no_slope() -> None:
    q, k, v = (16 * torch.randn(3, 2, 3, 41, 64)).bfloat16().unbind()
    layout = so.BlockLayout.from_mask(
        torch.eye(41, dtype=torch.bool), num_tokens=41, block_size=1, num_global=0
    )
    found = attention_results(q, k, v, layout, torch.randn(q.shape).bfloat16())
    assert not found["grad_query"].any() and not found["grad_key"].any()
    assert found["grad_value"].any()


def test_merging_heads_is_free(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    q = torch.randn(2, 3, 61, 64, device=device)
    out = so.block_sparse_attention(q, q, q, so.BlockLayout.local_random(60, device=device))
    merged = out.transpose(1, 2).reshape(2, 61, 192)
    assert merged.data_ptr() == out.data_ptr()


def test_gradients_of_some_inputs_only() -> None:
    layout = so.BlockLayout.local_random(100)
    q, k, v = torch.randn(3, 1, 2, 101, 64).unbind()
    k.requires_grad_()
    out, saliency = so.block_sparse_attention(q, k, v, layout, return_saliency=True)
    assert not saliency.requires_grad
    out.sum().backward()
    assert k.grad is not None and q.grad is None


def test_saliency_is_the_row_of_the_first_global() -> None:
    q, k, v = torch.randn(3, 2, 3, 103, 64).unbind()
    layout = so.BlockLayout.local_random(100, num_global=3)
    _, saliency = so.block_sparse_attention(q, k, v, layout, return_saliency=True)
    row = (q[:, :, :1] @ k.mT / 8).softmax(-1)[:, :, 0, 3:].mean(1)
    torch.testing.assert_close(saliency, row)


def test_position_codes_index_the_beit_table() -> None:
    frames, height, width = grid = (3, 4, 2)
    tokens = frames * height * width
    sizes = (2 * frames - 1, 2 * height - 1, 2 * width - 1)
    rows = sizes[0] * sizes[1] * sizes[2]
    # BEiT's index written out: query minus key coordinates, and three more rows for the CLS.
    index = torch.empty(tokens + 1, tokens + 1, dtype=torch.long)
    where = [(t, h, w) for t in range(frames) for h in range(height) for w in range(width)]
    for i, q in enumerate(where):
        for j, k in enumerate(where):
            shifted = [a - b + n - 1 for a, b, n in zip(q, k, grid, strict=True)]
            index[i + 1, j + 1] = (shifted[0] * sizes[1] + shifted[1]) * sizes[2] + shifted[2]
    index[0, :], index[:, 0], index[0, 0] = rows, rows + 1, rows + 2
    table = torch.randn(rows + 3, 2)
    q, k, v = torch.randn(3, 1, 2, tokens + 1, 8).unbind()
    layout = so.BlockLayout.local_random(tokens, block_size=tokens)
    found = so.block_sparse_attention(
        q, k, v, layout, bias_table=table, position_codes=so.position_codes(grid)
    )
    bias = table[index].permute(2, 0, 1)[None]
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


@pytest.mark.parametrize("bias", [False, True])
def test_reference_passes_gradcheck(bias: bool) -> None:
    layout = so.BlockLayout.local_random(7, block_size=3, num_random=1, num_global=1)
    inputs = [torch.randn(1, 2, 8, 4, dtype=torch.double, requires_grad=True) for _ in range(3)]
    codes = so.position_codes((1, 1, 7))
    table = torch.randn(13 + 3, 2, dtype=torch.double, requires_grad=True)

    def run(*x: torch.Tensor) -> torch.Tensor:
        rest = dict(bias_table=x[3], position_codes=codes) if bias else {}
        out = so.reference.block_sparse_attention(*x[:3], layout, **rest)
        assert isinstance(out, torch.Tensor)
        return out

    assert torch.autograd.gradcheck(run, (*inputs, table) if bias else tuple(inputs))

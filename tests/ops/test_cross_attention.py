"""cross_attention against fp64, through every implementation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import svitt_ops as so
from svitt_ops.testing import assert_within_budget, cross_attention_results, poisoned

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem, small enough for an interpreted kernel unless `large`."""

    queries: int = 32
    keys: int = 111
    head_dim: int = 64
    batch: int = 2
    heads: int = 2
    magnitude: float = 1.0
    scale: float | None = None
    mask: str = ""  # "tail", "random", "all" (of sample 0), "none"
    saliency: str = "cls"
    storage: str = "plain"  # "packed", "expanded", "heads_first"
    large: bool = False

    def __str__(self) -> str:
        changed = (f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case(), k))
        return "-".join(changed) or "default"


CASES = [
    Case(),
    Case(saliency="mean", mask="tail"),
    Case(queries=1, keys=1, head_dim=8, saliency="mean"),
    Case(queries=1, keys=55, storage="packed"),
    Case(queries=0, keys=20, saliency="mean"),
    Case(queries=5, keys=0, mask="none"),
    Case(queries=0, keys=0),
    Case(queries=5, keys=56, head_dim=33, mask="random", saliency="mean"),
    Case(queries=5, keys=57, head_dim=20, mask="all"),
    Case(queries=40, keys=33, storage="heads_first", mask="random", saliency="mean"),
    Case(queries=17, keys=1, mask="all", saliency="mean", head_dim=16),
    Case(queries=70, keys=1, head_dim=32, mask="all"),
    Case(queries=64, keys=64, head_dim=32, saliency="mean", storage="packed", mask="random"),
    Case(queries=65, keys=30, head_dim=32, mask="tail", saliency="mean"),
    Case(queries=129, keys=30, batch=1, heads=1, saliency="mean"),
    Case(queries=33, keys=70, head_dim=80, storage="heads_first", scale=-0.3),
    Case(queries=20, keys=65, head_dim=96, batch=1, scale=0.0, saliency="mean"),
    Case(queries=20, keys=66, head_dim=128, mask="random", storage="packed"),
    Case(queries=9, keys=40, head_dim=256, mask="tail", saliency="mean"),
    Case(magnitude=4.0, mask="random", storage="packed", saliency="mean"),
    Case(magnitude=16.0, storage="expanded"),
    Case(keys=300, batch=1, heads=1, mask="random", saliency="mean"),
    Case(keys=385, large=True, mask="random"),
    Case(keys=785, large=True, saliency="mean", storage="packed", mask="tail"),
    Case(keys=1569, large=True, batch=1, heads=12, saliency="mean", mask="random"),
    Case(queries=5, keys=3137, large=True, batch=1, heads=1, saliency="mean"),
    Case(queries=5, keys=3137, large=True, batch=1, heads=3),
    Case(queries=257, keys=30, large=True, batch=9, heads=8, saliency="mean", mask="tail"),
    Case(queries=257, keys=300, large=True, heads=1, saliency="mean", mask="all"),
    Case(queries=300, keys=333, large=True, batch=5, heads=13, head_dim=32, saliency="mean"),
    Case(keys=785, large=True, magnitude=16.0, head_dim=96, saliency="mean"),
    Case(queries=100, keys=97, large=True, magnitude=16.0, storage="packed", mask="all"),
]


def build(case: Case, dtype: torch.dtype, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments and keywords of `cross_attention_results`, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(7)

    def draw(*size: int) -> torch.Tensor:
        return (case.magnitude * torch.randn(*size, generator=generator)).to(device, dtype)

    b, h, d = case.batch, case.heads, case.head_dim
    query = draw(b, case.queries, h, d).transpose(1, 2)
    if case.storage == "packed":  # as one projection leaves keys and values
        key, value = draw(b, case.keys, 2, h, d).permute(2, 0, 3, 1, 4)
    elif case.storage == "expanded":
        key, value = draw(2, 1, h, case.keys, d).expand(2, b, h, case.keys, d)
    elif case.storage == "heads_first":
        key, value = draw(2, h, b, case.keys, d).transpose(1, 2)
    else:
        key, value = draw(2, b, h, case.keys, d)
    options: dict[str, Any] = dict(scale=case.scale, return_saliency=case.saliency)
    if case.mask:
        mask = torch.zeros(b, case.keys, dtype=torch.bool)
        if case.mask == "tail":
            for i in range(b):
                mask[i, case.keys * (i + 1) // (i + 2) :] = True
        elif case.mask == "random":
            mask = torch.rand(b, case.keys, generator=generator) < 0.4
        elif case.mask == "all":
            mask[0] = True
        options["key_padding_mask"] = mask.to(device)
    grad_out = torch.randn(b, case.queries, h, d, generator=generator).to(device, dtype)
    return (query, key, value, grad_out.transpose(1, 2)), options


def rounded_terms(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    scale: float | None,
    oracle: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Magnitudes of dP = dO V^T times what it multiplies; a row of one key cancels it exactly.

    And of a logit's terms times what its weight multiplies: how well their sum comes out in fp32 is
    a matter of its order, which a kernel has one of and a processor's BLAS another.
    """
    if not q.numel() or not k.numel():
        return {}
    scale = abs(q.shape[-1] ** -0.5 if scale is None else scale)
    slope = scale * (grad.float() @ v.float().mT).abs().max().item()
    logits = scale * (q.float().abs() @ k.float().abs().mT).max().item()
    return {
        **{name: logits * x.abs().max().item() for name, x in oracle.items()},
        "grad_query": slope * k.abs().max().item(),
        "grad_key": slope * q.abs().max().item(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(case: Case, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and (case.large or dtype == torch.bfloat16 or case.head_dim > 128):
        pytest.skip("too slow to interpret, or a dtype that the interpreter gets wrong")
    if backend == "reference" and (case.large or dtype != torch.float32):
        pytest.skip("the oracle itself")
    arguments, options = build(case, dtype, "cuda" if backend == "cuda" else "cpu")
    oracle = cross_attention_results(*arguments, compute=torch.float64, **options)
    baseline = cross_attention_results(*arguments, compute=dtype, **options)
    with poisoned():
        found = cross_attention_results(*arguments, **options)
    assert found.keys() == oracle.keys()
    terms = rounded_terms(*arguments, case.scale, oracle)
    for name, result in found.items():
        assert_within_budget(
            result, baseline[name], oracle[name], f"{case} {name}", dtype, terms.get(name, 0.0)
        )
    again = cross_attention_results(*arguments, **options)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "saliency"), [(32, "cls"), (32, "mean"), (66, "mean")])
def test_ignored_keys_never_leak(
    queries: int, saliency: str, dtype: torch.dtype, backend: str
) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter gets bf16 wrong")
    case = Case(queries=queries, keys=70, heads=1, mask="random", saliency=saliency)
    (q, k, v, grad), options = build(case, dtype, "cuda" if backend == "cuda" else "cpu")
    ignored = options["key_padding_mask"]
    ignored[1] = True
    clean = cross_attention_results(q, k, v, grad, **options)
    k, v = k.clone(), v.clone()
    for x in (k, v):
        x.transpose(1, 2)[ignored] = float("nan")
        x[1] = float("inf")
    dirty = cross_attention_results(q, k, v, grad, **options)
    for name, result in clean.items():
        assert torch.equal(result, dirty[name]), name
    assert not dirty["saliency"][ignored].any()
    assert not dirty["grad_key"].transpose(1, 2)[ignored].any()
    assert not dirty["out"][1].any() and not dirty["grad_query"][1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [5, 70])
def test_nan_is_not_hidden(queries: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, n, 32).to(dtype) for n in (queries, 70, 70))
    q[0, 0, 3] = k[0, 1, 9] = float("nan")
    out = so.cross_attention(q, k, v).isnan()
    assert out[0, 1].all() and out[0, 0, 3].all()
    assert not out[0, 0, :3].any() and not out[0, 0, 4:].any()


@pytest.mark.parametrize("keys", [1, 70])
def test_one_key_leaves_no_slope(keys: int) -> None:
    case = Case(queries=37, keys=keys, magnitude=16.0)
    (q, k, v, grad), options = build(case, torch.bfloat16, "cpu")
    mask = torch.arange(keys) != keys // 2
    options["key_padding_mask"] = mask.expand(case.batch, keys).contiguous()
    found = cross_attention_results(q, k, v, grad, **options)
    assert not found["grad_query"].any() and not found["grad_key"].any()
    assert found["grad_value"][:, :, keys // 2].all()


def test_a_mask_equals_leaving_keys_out(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    (q, k, v, grad), _ = build(Case(keys=70, batch=1), torch.float32, device)
    mask = torch.zeros(1, 70, dtype=torch.bool, device=device)
    mask[:, 50:] = True
    masked = cross_attention_results(q, k, v, grad, key_padding_mask=mask)
    short = cross_attention_results(q, k[:, :, :50], v[:, :, :50], grad)
    for name, keys in (("out", None), ("grad_query", None), ("grad_key", 50), ("grad_value", 50)):
        torch.testing.assert_close(masked[name][:, :, :keys], short[name])
    torch.testing.assert_close(masked["saliency"][:, :50], short["saliency"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("saliency", ["cls", "mean"])
def test_equals_dense_attention(dtype: torch.dtype, saliency: Any) -> None:
    q, k, v = (torch.randn(2, 3, n, 64).to(dtype) for n in (30, 301, 301))
    out, received = so.cross_attention(q, k, v, return_saliency=saliency)
    oracle = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert_within_budget(out, F.scaled_dot_product_attention(q, k, v), oracle, "out")
    probs = (q.double() @ k.double().mT / 8).softmax(-1)
    rows = probs[:, :, :1] if saliency == "cls" else probs
    torch.testing.assert_close(received.double(), rows.mean((1, 2)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(keys=900, heads=5, mask="random", saliency="mean"),
        Case(keys=900, batch=1, heads=1, saliency="mean"),
        Case(queries=257, keys=30, heads=5),
    ],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    arguments, options = build(case, dtype, "cpu")
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(cross_attention_results(*arguments, **options))
    finally:
        torch.set_num_threads(threads)
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_upstream_gradient(dtype: torch.dtype, backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    (q, k, v, _), _ = build(Case(queries=7, keys=40), dtype, device)
    ones = torch.ones_like(q)
    expected = cross_attention_results(q, k, v, ones)
    expanded = cross_attention_results(q, k, v, ones[:1, :1, :1, :1].expand_as(q))
    strided = cross_attention_results(q, k, v, torch.ones(*q.shape[:3], 128).to(q)[..., ::2])
    for name in expected:
        assert torch.equal(expected[name], expanded[name]), name
        assert torch.equal(expected[name], strided[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_sample_and_no_head(dtype: torch.dtype, backend: str) -> None:
    options: dict[str, Any] = dict(device="cuda" if backend == "cuda" else "cpu", dtype=dtype)
    for batch, heads in ((0, 2), (2, 0)):
        q = torch.randn(batch, heads, 5, 64, requires_grad=True, **options)
        k = torch.randn(batch, heads, 30, 64, requires_grad=True, **options)
        out, saliency = so.cross_attention(q, k, k, return_saliency="mean")
        assert out.shape == q.shape and saliency.shape == (batch, 30)
        assert not saliency.any()
        out.sum().backward()
        assert k.grad is not None and k.grad.shape == k.shape


def test_merging_heads_is_free(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    q, k = (torch.randn(2, 3, n, 64, device=device) for n in (5, 61))
    out = so.cross_attention(q, k, k)
    merged = out.transpose(1, 2).reshape(2, 5, 192)
    assert merged.data_ptr() == out.data_ptr()


def test_gradients_of_some_inputs_only() -> None:
    q, k, v = (torch.randn(1, 2, n, 64) for n in (5, 101, 101))
    k.requires_grad_()
    out, saliency = so.cross_attention(q, k, v, return_saliency="cls")
    assert not saliency.requires_grad
    out.sum().backward()
    assert k.grad is not None and q.grad is None


def test_saliency_changes_nothing_else() -> None:
    for heads, queries in ((2, 5), (200, 5), (2, 70)):  # keys split over threads, and not
        q, k, v = (torch.randn(1, heads, n, 32) for n in (queries, 700, 700))
        plain = so.cross_attention(q, k, v)
        for which in ("cls", "mean"):
            assert torch.equal(plain, so.cross_attention(q, k, v, return_saliency=which)[0])


@pytest.mark.parametrize("masked", [False, True])
def test_reference_passes_gradcheck(masked: bool) -> None:
    q, k, v = (torch.randn(2, 2, n, 4, dtype=torch.double, requires_grad=True) for n in (3, 5, 5))
    mask = torch.tensor([[True] * 5, [False, True, False, False, True]]) if masked else None

    def run(*x: torch.Tensor) -> torch.Tensor:
        out = so.reference.cross_attention(*x, key_padding_mask=mask)
        assert isinstance(out, torch.Tensor)
        return out

    assert torch.autograd.gradcheck(run, (q, k, v))

"""info_nce against fp64, through every implementation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so
from svitt_ops.testing import assert_same, assert_within_budget, contrast_terms, poisoned


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem, small enough for an interpreted kernel unless `large`."""

    rows: int = 33
    dim: int = 48
    temperature: float = 0.07
    kind: str = "random"  # "converged", "cone", "duplicates"
    ids: str = ""  # "few", "equal"
    weighted: bool = False
    symmetric: bool = True
    label_smoothing: float = 0.0
    large: bool = False

    def __str__(self) -> str:
        changed = (f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case(), k))
        return "-".join(changed) or "default"


CASES = [
    Case(),
    Case(rows=1, dim=1),
    Case(rows=1, dim=48, symmetric=False, label_smoothing=0.2),
    Case(rows=2, dim=256, temperature=1.0),
    Case(rows=31, dim=48, temperature=0.01, ids="few"),
    Case(rows=33, dim=1, temperature=0.5),
    Case(rows=33, dim=640, symmetric=False),
    Case(rows=127, dim=64, ids="few", label_smoothing=0.1),
    Case(rows=127, dim=48, temperature=0.001),
    Case(rows=40, dim=32, ids="equal"),
    Case(rows=40, dim=32, ids="equal", symmetric=False, label_smoothing=0.3, temperature=0.01),
    Case(rows=65, kind="converged", temperature=0.05),
    Case(rows=65, kind="converged", ids="few"),
    Case(rows=65, kind="cone", temperature=0.01),
    Case(rows=65, kind="cone", temperature=0.07, ids="few", label_smoothing=0.1),
    Case(rows=65, kind="duplicates", temperature=0.02),
    Case(rows=65, ids="few", weighted=True),
    Case(rows=65, kind="converged", ids="few", weighted=True, label_smoothing=0.1),
    Case(rows=127, dim=33, ids="few", weighted=True, temperature=0.01, symmetric=False),
    Case(rows=40, dim=32, ids="equal", weighted=True),
    Case(rows=90, dim=33, kind="converged", temperature=0.01, label_smoothing=0.1),
    Case(rows=300, dim=20, temperature=0.02, large=True),
    Case(rows=545, dim=95, temperature=0.005, ids="few", large=True),
    Case(rows=1000, dim=256, large=True),
    Case(rows=1000, dim=100, ids="few", weighted=True, large=True),
    Case(rows=1000, dim=768, ids="few", temperature=0.01, large=True),
    Case(rows=1025, dim=640, temperature=0.001, symmetric=False, large=True),
    Case(rows=4097, dim=48, label_smoothing=0.1, large=True),
]


def build(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Query, key and ids, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(3)

    def draw() -> Tensor:
        return torch.randn(case.rows, case.dim, generator=generator)

    query, key = draw(), draw()
    if case.kind == "converged":
        key = query + 0.02 * key
    elif case.kind == "cone":
        query, key = 1 + 0.05 * query, 1 + 0.05 * key
    elif case.kind == "duplicates":
        query[1::2], key[1::2] = query[::2][: case.rows // 2], key[::2][: case.rows // 2]
    query, key = (F.normalize(x, dim=1).to(device, dtype) for x in (query, key))
    ids = None
    if case.ids:
        high = 1 if case.ids == "equal" else max(1, case.rows // 3)
        ids = torch.randint(high, (case.rows,), generator=generator).to(device) - 5
    return query, key, ids


def weights_of(case: Case, query: Tensor) -> Tensor | None:
    """Weights up to 2, if the case has some: each third is 1."""
    if not case.weighted:
        return None
    weights = 2 * torch.rand(case.rows, generator=torch.Generator().manual_seed(4))
    weights[::3] = 1
    return weights.to(query.device)


def results(
    case: Case, query: Tensor, key: Tensor, ids: Tensor | None, compute: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Loss and gradients: of the op, or of the reference with every step in a dtype."""
    function = so.info_nce if compute is None else so.reference.info_nce
    q, k = (x.detach().to(compute or x.dtype).requires_grad_() for x in (query, key))
    # fp32 even in the plain computation: a bf16 temperature would be another problem.
    t = torch.tensor(case.temperature, device=query.device)
    t = t.to(torch.promote_types(compute or torch.float32, torch.float32)).requires_grad_()
    loss = function(
        q, k, t, ids=ids, weights=weights_of(case, query), symmetric=case.symmetric,
        label_smoothing=case.label_smoothing,
    )  # fmt: skip
    found = dict(
        zip(
            ("grad_query", "grad_key", "grad_temperature"),
            torch.autograd.grad(loss, (q, k, t)),
            strict=True,
        )
    )
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case: Case, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and (case.large or dtype == torch.bfloat16):
        pytest.skip("too large for the interpreter, or bf16, which it multiplies wrongly")
    if backend == "reference" and case.rows > 2000:
        pytest.skip("seconds of plain PyTorch that prove nothing more")
    if case.large and dtype == torch.float16:
        pytest.skip("fp16 differs from bf16 in its conversion alone")
    problem = build(case, dtype, "cuda" if backend == "cuda" else "cpu")
    oracle = results(case, *problem, compute=torch.float64)
    plain = results(case, *problem, compute=dtype)
    with poisoned():
        actual = results(case, *problem)
    terms = contrast_terms(case.temperature, case.rows)
    for name, value in actual.items():
        assert value.dtype == (dtype if name in ("grad_query", "grad_key") else torch.float32)
        assert_within_budget(value, plain[name], oracle[name], name, terms=terms[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rerun_gives_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bf16 wrongly, and slowly")
    case = Case(rows=150 if backend == "triton" else 1100, dim=40, ids="few", label_smoothing=0.1)
    problem = build(case, dtype, "cuda" if backend == "cuda" else "cpu")
    first, second = results(case, *problem), results(case, *problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [130, 1100])
def test_any_number_of_threads_gives_the_same_bits(rows: int, dtype: torch.dtype) -> None:
    case = Case(rows=rows, dim=70, temperature=0.01)
    problem = build(case, dtype, "cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(case, *problem))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_converged_pairs_keep_their_digits(temperature: float, backend: str) -> None:
    """Orthogonal pairs: the loss is log1p((B - 1) exp(-1 / t)), which 1 - softmax would lose."""
    device = "cuda" if backend == "cuda" else "cpu"
    rows = 16
    q = torch.eye(rows, device=device).requires_grad_()
    loss = so.info_nce(q, q.detach(), temperature)
    exact = math.log1p((rows - 1) * math.exp(-1 / temperature))
    assert loss.item() == pytest.approx(exact, rel=1e-5, abs=1e-37)
    (grad,) = torch.autograd.grad(loss, q)
    share = math.exp(-1 / temperature) / (1 + (rows - 1) * math.exp(-1 / temperature))
    wanted = -(rows - 1) * share / temperature / rows
    assert grad[3, 3].item() == pytest.approx(wanted, rel=1e-5, abs=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [24, 25, 64])
def test_packed_rows_are_read_in_place(dim: int, dtype: torch.dtype, backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    both = F.normalize(torch.randn(40, 2, dim, generator=torch.Generator().manual_seed(0)), dim=2)
    q, k = both.to(device, dtype).unbind(1)
    wanted = so.info_nce(q.contiguous(), k.contiguous(), 0.1)
    assert_same(so.info_nce(q, k, 0.1), wanted)
    swapped = q.T.contiguous().T  # not even its last dimension is contiguous
    assert_same(so.info_nce(swapped, k, 0.1), wanted)


def test_weights_are_shares_of_the_targets(backend: str) -> None:
    """Equal ones change nothing, nor does a factor; what weighs nothing is no target."""
    device = "cuda" if backend == "cuda" else "cpu"
    case = Case(rows=30, ids="few")
    query, key, ids = build(case, torch.float32, device)
    assert ids is not None
    weights = weights_of(Case(rows=30, weighted=True), query)
    assert weights is not None

    def loss(weights: Tensor | None, ids: Tensor | None = ids) -> Tensor:
        return so.info_nce(query, key, 0.1, ids=ids, weights=weights, symmetric=False)

    torch.testing.assert_close(loss(torch.full_like(weights, 3)), loss(None))
    torch.testing.assert_close(loss(weights * 4), loss(weights))
    assert not torch.allclose(loss(weights), loss(None), rtol=1e-3)
    assert torch.equal(loss(weights, None), loss(None, None))
    log_share = (query @ key.T / 0.1).log_softmax(1)
    own = ids == ids[:, None]
    first = torch.where(own, torch.arange(30, device=device), 30).amin(1)  # of its id
    chosen = torch.zeros_like(weights)
    chosen[first] = 0.3
    torch.testing.assert_close(loss(chosen), -log_share.gather(1, first[:, None]).mean())

    q = query.clone().requires_grad_()
    none = torch.where(ids == ids[4], 0, weights)
    broken = so.info_nce(q, key, 0.1, ids=ids, weights=none)
    assert broken.isnan() and torch.autograd.grad(broken, q)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_strip_is_a_part_of_the_whole(dtype: torch.dtype, backend: str) -> None:
    """Rows of some queries against all keys: what each rank of a group computes."""
    device = "cuda" if backend == "cuda" else "cpu"
    query, key, ids = build(Case(rows=60, dim=24, ids="few"), dtype, device)
    t = torch.tensor(0.1, device=device)
    some_weights = weights_of(Case(rows=60, weighted=True), query)
    for given, weights in ((None, None), (ids, None), (ids, some_weights)):
        _, rows, columns = torch.ops.svitt_ops.info_nce(
            query, key, t, given, given, *[weights] * 2, 0, True, 0.1
        )
        parts = []
        for first in (0, 20, 40):
            some = None if given is None else given[first : first + 20]
            part = query[first : first + 20]
            of_part = None if weights is None else weights[first : first + 20]
            ids_and_weights = (some, given, of_part, weights)
            parts.append(
                torch.ops.svitt_ops.info_nce(part, key, t, *ids_and_weights, first, True, 0.1)
            )
        torch.testing.assert_close(torch.cat([x[1] for x in parts], 1), rows)
        stacked = torch.stack([x[2] for x in parts])
        torch.testing.assert_close(stacked[:, :2].logsumexp(0), columns[:2])
        torch.testing.assert_close(stacked[:, 2:].sum(0), columns[2:], rtol=1e-5, atol=1e-5)


def test_small_numbers_remain_afterwards() -> None:
    """The kernels flush denormals, but only their own."""
    query, key, _ = build(Case(temperature=0.001), torch.bfloat16, "cpu")
    so.info_nce(query.requires_grad_(), key, 0.001).backward()
    so.queue_info_nce(query, key, key, 0.001)
    assert (torch.full((64,), 1e-38) / 10 > 0).all()


def test_memory_is_linear_in_rows() -> None:
    """What autograd keeps: the embeddings and a few numbers a row, no matrix."""
    kept: dict[int, int] = {}
    for rows in (256, 512, 1024):
        q, k = (torch.randn(rows, 16, requires_grad=True) for _ in range(2))
        sizes = []

        def pack(x: Any, sizes: list[int] = sizes) -> Any:
            sizes.append(x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            so.info_nce(q, k, 0.1)
        kept[rows] = sum(sizes)
    assert kept[512] <= 2 * kept[256] and kept[1024] <= 2 * kept[512]
    assert kept[1024] < 1024 * 1024

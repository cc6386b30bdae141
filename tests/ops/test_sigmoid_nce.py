"""sigmoid_nce against fp64, through every implementation; torch's machinery; bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import svitt_ops as so
from svitt_ops.testing import assert_same, assert_within_budget, poisoned

INPUTS = ("query", "key", "temperature", "bias")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem, small enough for an interpreted kernel unless `large`."""

    rows: int = 33
    dim: int = 48
    temperature: float = 0.1
    bias: float = -10.0
    kind: str = "random"  # "converged", "cone"
    ids: str = ""  # "few", "equal"
    large: bool = False

    def __str__(self) -> str:
        changed = (f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case(), k))
        return "-".join(changed) or "default"


CASES = [
    Case(),
    Case(rows=1, dim=1),
    Case(rows=1, dim=48, ids="equal", bias=3.0),
    Case(rows=2, dim=256, temperature=1.0, bias=0.0),
    Case(rows=31, dim=48, temperature=0.01, bias=-50.0, ids="few"),
    Case(rows=33, dim=640, bias=-3.0),
    Case(rows=127, dim=64, ids="few", bias=1.5),
    Case(rows=127, dim=48, temperature=0.001, bias=-200.0),
    Case(rows=40, dim=32, ids="equal"),
    Case(rows=65, dim=33, kind="converged", bias=-8.0),
    Case(rows=65, kind="cone", temperature=0.01, bias=-99.0, ids="few"),
    Case(rows=65, kind="cone", temperature=0.02, bias=500.0),
    Case(rows=300, dim=20, temperature=0.02, bias=-40.0, large=True),
    Case(rows=545, dim=95, temperature=0.01, ids="few", large=True),
    Case(rows=1000, dim=256, large=True),
    Case(rows=1025, dim=768, ids="few", bias=-5.0, large=True),
]


def build(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Query, key and ids, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, case.rows, case.dim, generator=generator)
    if case.kind == "converged":
        key = query + 0.02 * key
    elif case.kind == "cone":
        query, key = 1 + 0.05 * query, 1 + 0.05 * key
    query, key = (F.normalize(x, dim=1).to(device, dtype) for x in (query, key))
    ids = None
    if case.ids:
        high = 1 if case.ids == "equal" else max(1, case.rows // 3)
        ids = torch.randint(high, (case.rows,), generator=generator).to(device) - 5
    return query, key, ids


def results(
    case: Case, query: Tensor, key: Tensor, ids: Tensor | None, compute: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Loss and gradients: of the op, or of the reference with every step in a dtype."""
    function = so.sigmoid_nce if compute is None else so.reference.sigmoid_nce
    # fp32 even in the plain computation: a bf16 temperature would be another problem.
    wide = torch.promote_types(compute or torch.float32, torch.float32)
    leaves = [x.detach().to(compute or x.dtype).requires_grad_() for x in (query, key)]
    leaves += [
        torch.tensor(x, device=query.device, dtype=torch.float32).to(wide).requires_grad_()
        for x in (case.temperature, case.bias)
    ]
    loss = function(*leaves, ids=ids)
    grads = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach()} | dict(zip(INPUTS, grads, strict=True))


def terms(case: Case, found: dict[str, Tensor]) -> dict[str, float]:
    """What a rounding of the logits' terms moves: losses by as much, weights by up to a quarter."""
    scale, wrong = 1 / case.temperature, max(1.0, float(found["loss"]))
    logit = scale + abs(case.bias)
    weight = logit / 4 * min(wrong, case.rows)
    rows = weight * scale / case.rows
    return {
        "loss": logit * min(wrong, case.rows),
        "query": rows,
        "key": rows,
        "temperature": weight * scale * scale,
        "bias": weight,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case: Case, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and (case.large or dtype == torch.bfloat16):
        pytest.skip("too large for the interpreter, or bf16, which it multiplies wrongly")
    if case.large and dtype == torch.float16:
        pytest.skip("fp16 differs from bf16 in its conversion alone")
    problem = build(case, dtype, "cuda" if backend == "cuda" else "cpu")
    oracle = results(case, *problem, compute=torch.float64)
    plain = results(case, *problem, compute=dtype)
    with poisoned():
        actual = results(case, *problem)
    budget = terms(case, oracle)
    for name, value in actual.items():
        assert value.dtype == (dtype if name in ("query", "key") else torch.float32)
        assert_within_budget(value, plain[name], oracle[name], name, terms=budget[name])


def test_logits_of_any_size_keep_their_digits(backend: str) -> None:
    """Softplus of -700 to 700, of pairs that are right and that are wrong."""
    device = "cuda" if backend == "cuda" else "cpu"
    one = torch.ones(1, 1, device=device)
    for logit in (-700.0, -80.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 80.0, 700.0):
        bias = torch.tensor(logit - 1.0, device=device, requires_grad=True)
        logit = float(bias.detach()) + 1.0  # what fp32 makes of it
        for other in (False, True):  # one pair that belongs together; or one that does not beside
            pair = one.expand(2, 1) if other else one
            loss = so.sigmoid_nce(pair, pair, 1.0, bias)
            (grad,) = torch.autograd.grad(loss, bias)
            small = math.exp(-abs(logit))
            softplus = {sign: max(sign * logit, 0.0) + math.log1p(small) for sign in (-1, 1)}
            share = {sign: (1.0 if sign * logit >= 0 else small) / (1 + small) for sign in (-1, 1)}
            wanted = softplus[-1] + other * softplus[1]
            assert loss.item() == pytest.approx(wanted, rel=1e-6, abs=1e-37)
            slope = -share[-1] + other * share[1]
            assert grad.item() == pytest.approx(slope, rel=1e-6, abs=1e-37 + other * 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rerun_and_threads_give_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bf16 wrongly, and slowly")
    case = Case(rows=150 if backend == "triton" else 1100, dim=40, ids="few", bias=-4.0)
    problem = build(case, dtype, "cuda" if backend == "cuda" else "cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, before, before):
            torch.set_num_threads(threads)
            found.append(results(case, *problem))
    finally:
        torch.set_num_threads(before)
    # Plain PyTorch splits its sums by the number of threads: there, only the rerun is the same.
    for other in found[-2:-1] if backend == "reference" else found[:-1]:
        assert all(torch.equal(found[-1][name], other[name]) for name in other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [24, 25, 64])
def test_packed_rows_are_read_in_place(dim: int, dtype: torch.dtype, backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    both = F.normalize(torch.randn(40, 2, dim, generator=torch.Generator().manual_seed(0)), dim=2)
    q, k = both.to(device, dtype).unbind(1)
    wanted = so.sigmoid_nce(q.contiguous(), k.contiguous(), 0.1, -2.0)
    assert_same(so.sigmoid_nce(q, k, 0.1, -2.0), wanted)
    swapped = q.T.contiguous().T  # not even its last dimension is contiguous
    assert_same(so.sigmoid_nce(swapped, k, 0.1, -2.0), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strips_add_up_to_the_whole(dtype: torch.dtype, backend: str) -> None:
    """Rows of some queries against all keys: what each rank of a group computes."""
    device = "cuda" if backend == "cuda" else "cpu"
    query, key, ids = build(Case(rows=60, dim=24, ids="few"), dtype, device)
    t, b = (torch.tensor(x, device=device) for x in (0.1, -3.0))
    for given in (None, ids):
        op = torch.ops.svitt_ops.sigmoid_nce
        loss, grad_query, *sums = op(query, key, t, b, given, given, 0, True)
        parts = []
        for first in (0, 20, 40):
            some = slice(first, first + 20)
            of = None if given is None else given[some]
            parts.append(op(query[some], key, t, b, of, given, first, True))
        tolerance = dict(rtol=2e-2, atol=1e-3) if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(torch.cat([x[1] for x in parts]), grad_query, **tolerance)
        for i, whole in zip((0, 2, 3, 4), (loss, *sums), strict=True):
            torch.testing.assert_close(sum(x[i] for x in parts), whole, **tolerance)


@pytest.mark.parametrize("ids", [None, torch.arange(20) // 3])
def test_torch_machinery(ids: Tensor | None) -> None:
    q, k, _ = build(Case(rows=20, dim=16), torch.float32, "cpu")
    leaves = [x.requires_grad_() for x in (q, k, torch.tensor(0.1), torch.tensor(-2.0))]
    op = torch.ops.svitt_ops.sigmoid_nce
    torch.library.opcheck(op.default, (*leaves, ids, ids, 0, True))
    plain = [x.detach() for x in leaves]
    torch.library.opcheck(op.default, (*plain, ids, ids, 0, False))
    loss, *grads = op(*plain, ids, ids, 0, True)
    backward = torch.ops.svitt_ops.sigmoid_nce_backward.default
    torch.library.opcheck(backward, (torch.ones_like(loss), *plain, *grads))

    with torch.autocast("cpu", torch.bfloat16):
        loss = so.sigmoid_nce(*leaves, ids=ids)
    assert torch.equal(loss, so.sigmoid_nce(q.bfloat16(), k.bfloat16(), *leaves[2:], ids=ids))
    assert torch.autograd.grad(loss, q)[0].dtype == torch.float32
    with FlopCounterMode(display=False) as counter:
        so.sigmoid_nce(*leaves).backward()
    assert counter.get_total_flops() == 3 * 2 * 20 * 20 * 16
    with FlopCounterMode(display=False) as counter:
        assert not so.sigmoid_nce(*plain).requires_grad
    assert counter.get_total_flops() == 2 * 20 * 20 * 16
    assert torch.equal(
        so.sigmoid_nce(q, k, 0.07, -2), so.sigmoid_nce(q, k, torch.tensor([0.07]), leaves[3])
    )
    (first,) = torch.autograd.grad(so.sigmoid_nce(*leaves), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()
    with FakeTensorMode(), torch.no_grad():
        q, k = (torch.empty(33, 24, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        t, b = (torch.empty((), device="cuda") for _ in range(2))
        loss, *grads = op(q, k, t, b, None, None, 0, True)
        assert [tuple(x.shape) for x in grads] == [(33, 24), (33, 24), (), ()]
        assert all(x.dtype == torch.float32 and x.device.type == "cuda" for x in (loss, *grads))
        found = torch.ops.svitt_ops.sigmoid_nce_backward(loss, q, k, t, b, *grads)
        assert [x.dtype for x in found] == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_compiles_as_one_graph() -> None:
    ids = torch.arange(20) // 2

    def run(q: Tensor, k: Tensor, t: Tensor, b: Tensor) -> Tensor:
        return so.sigmoid_nce(q * 1.5, k, t.exp(), b * 3, ids=ids) * 2

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    q, k, _ = build(Case(rows=20, dim=16), torch.float32, "cpu")
    found = []
    for function in (run, compiled):
        given = (q, k, torch.tensor(-2.0), torch.tensor(-1.0))
        leaves = [x.clone().requires_grad_() for x in given]
        loss = function(*leaves)
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    for eager, fused in zip(*found, strict=True):
        torch.testing.assert_close(eager, fused)


def test_gradcheck_of_the_reference() -> None:
    q, k, _ = build(Case(rows=6, dim=5), torch.float64, "cpu")
    leaves = [q, k, *(torch.tensor(x, dtype=torch.float64) for x in (0.3, -1.0))]
    ids = torch.tensor([0, 1, 1, 2, 0, 0])
    leaves = [x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(lambda *x: so.reference.sigmoid_nce(*x, ids=ids), leaves)


def test_memory_is_linear_in_rows() -> None:
    """What autograd keeps: the embeddings and their gradients, no matrix."""
    kept: dict[int, int] = {}
    for rows in (256, 512, 1024):
        q, k = (torch.randn(rows, 16, requires_grad=True) for _ in range(2))
        sizes = []

        def pack(x: Any, sizes: list[int] = sizes) -> Any:
            sizes.append(x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            so.sigmoid_nce(q, k, 0.1, -10.0)
        kept[rows] = sum(sizes)
    assert kept[512] <= 2 * kept[256] and kept[1024] <= 2 * kept[512]
    assert kept[1024] < 1024 * 1024


RANKS = """
import torch.nn.functional as F
import svitt_ops as so
ranks = 2
generator = torch.Generator().manual_seed(0)
whole = [F.normalize(torch.randn(24, 16, generator=generator), dim=1) for _ in range(2)]
scalars = [torch.tensor(0.1), torch.tensor(-3.0)]
part = slice(rank * 24 // ranks, (rank + 1) * 24 // ranks)
for dtype in (torch.float32, torch.bfloat16):
    for ids in (None, torch.randint(7, (24,), generator=generator)):
        leaves = [x.to(dtype).requires_grad_() for x in whole]
        leaves += [x.clone().requires_grad_() for x in scalars]
        wanted = so.sigmoid_nce(*leaves, ids=ids)
        exact = torch.autograd.grad(wanted, leaves)
        local = [x[part].to(dtype).clone().requires_grad_() for x in whole]
        local += [x.clone().requires_grad_() for x in scalars]
        some = None if ids is None else ids[part]

        def of(*args):
            return so.sigmoid_nce(*args, ids=some, group=dist.group.WORLD)

        loss = of(*local)
        found = torch.autograd.grad(loss, local, retain_graph=True)
        near = {} if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(loss, wanted.detach())
        for i in (0, 1):
            assert found[i].dtype == dtype
            torch.testing.assert_close(found[i] / ranks, exact[i][part], **near)
        torch.testing.assert_close(found[2:], exact[2:])
        with torch.no_grad():
            assert torch.equal(of(*local), loss) and not of(*local).requires_grad
        by_func = torch.func.grad(of, argnums=(0, 1, 2, 3))(*local)
        assert all(torch.equal(a, b) for a, b in zip(by_func, found))
        if rank == 1:
            local[0].data[0, 0] = float("nan")  # is known on both
        broken = of(*local)
        assert broken.isnan()
        assert all(x.isnan().all() for x in torch.autograd.grad(broken, local))
for refused, word in (
    (lambda: torch.func.jvp(of, tuple(local), tuple(local)), "a forward-mode derivative (jvp)"),
    (lambda: torch.func.vmap(of, in_dims=(0, None, None, None))(local[0][None], *local[1:]),
     "vmap (and so jacrev)"),
    (lambda: torch.func.grad(lambda x: torch.func.grad(of)(x, *local[1:]).sum())(local[0]),
     "a second derivative"),
):
    try:
        refused()
    except NotImplementedError as error:
        assert str(error).startswith(f"sigmoid_nce: {word} is not available"), error
    else:
        raise AssertionError(word)
try:
    rows = torch.ones(5 + rank, 4)
    so.sigmoid_nce(rows, rows, 0.1, 0.0, group=dist.group.WORLD)
except ValueError as error:
    assert "as many rows on every rank, got [5, 6]" in str(error), error
else:
    raise AssertionError("ranks of unequal size")
dist.destroy_process_group()
loss.backward()  # all that crosses ranks did so forward
"""


def test_two_ranks_compute_the_loss_of_one(
    tmp_path: Path, on_two_ranks: Callable[..., None]
) -> None:
    on_two_ranks(RANKS, tmp_path)


GOOD = torch.full((4, 8), 8**-0.5)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "query must be a tensor, got list", {"query": [1.0]}),
        (TypeError, "query must be float32, float16 or bfloat16", {"query": GOOD.double()}),
        (ValueError, r"must have shape \(rows, D\), got \(4, 0\)", {"query": GOOD[:, :0]}),
        (ValueError, "at least one row", {"query": GOOD[:0], "key": GOOD[:0]}),
        (ValueError, r"key must have shape \(4, 8\), got \(3, 8\)", {"key": GOOD[:3]}),
        (TypeError, "key must be torch.float32 as query is", {"key": GOOD.half()}),
        (ValueError, "temperature must be positive and finite, got 0.0", {"temperature": 0.0}),
        (ValueError, "bias must be finite, got nan", {"bias": float("nan")}),
        (ValueError, "bias must be finite, got -inf", {"bias": -float("inf")}),
        (TypeError, "bias must be a float or a tensor, got NoneType", {"bias": None}),
        (ValueError, "bias must be a float or .* of one element, got", {"bias": torch.ones(2)}),
        (ValueError, "bias must be on cpu, got meta", {"bias": torch.ones((), device="meta")}),
        (TypeError, "ids must be int64 or int32, got torch.float32", {"ids": torch.ones(4)}),
        (ValueError, r"ids must have shape \(4,\), got \(3,\)", {"ids": torch.arange(3)}),
        (ValueError, "group must be of an initialised torch.distributed", {"group": object()}),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    given = {"query": GOOD, "key": GOOD, "temperature": 0.1, "bias": -10.0} | arguments
    positional = [given.pop(name) for name in INPUTS]
    with pytest.raises(error, match="sigmoid_nce: .*" + message):
        so.sigmoid_nce(*positional, **given)

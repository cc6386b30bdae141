"""queue_info_nce against fp64, through every implementation; torch's machinery; bad input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import svitt_ops as so
from svitt_ops.testing import assert_same, assert_within_budget, contrast_terms, poisoned


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem, small enough for an interpreted kernel unless `large`."""

    rows: int = 33
    queue: int = 150
    dim: int = 48
    temperature: float = 0.07
    alpha: float = 0.0
    kind: str = "random"  # "converged", "cone"
    ids: str = ""  # "few", "equal", "batch" (queue without ids), "none" (no positives at all)
    large: bool = False

    def __str__(self) -> str:
        changed = (f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case(), k))
        return "-".join(changed) or "default"


CASES = [
    Case(),
    Case(alpha=0.4),
    Case(rows=1, queue=1, dim=1),
    Case(rows=1, queue=1, dim=8, ids="equal"),
    Case(rows=2, queue=65, dim=256, temperature=1.0, alpha=1.0),
    Case(rows=31, queue=127, temperature=0.01, ids="few"),
    Case(rows=31, queue=127, temperature=0.05, ids="few", alpha=0.4),
    Case(rows=33, queue=7, dim=640, alpha=0.3),
    Case(rows=40, queue=90, temperature=0.001),
    Case(rows=40, queue=90, temperature=0.001, ids="few", alpha=0.5),
    Case(rows=40, queue=60, dim=32, ids="equal", alpha=0.4),
    Case(rows=40, queue=60, dim=32, ids="batch"),
    Case(rows=20, queue=60, dim=32, ids="none", alpha=0.4),
    Case(rows=20, queue=60, dim=32, ids="none"),
    Case(rows=65, kind="converged", temperature=0.05),
    Case(rows=65, kind="converged", temperature=0.02, alpha=0.4),
    Case(rows=65, kind="converged", ids="few", alpha=0.4),
    Case(rows=65, kind="cone", temperature=0.01),
    Case(rows=65, kind="cone", temperature=0.02, ids="few", alpha=0.4),
    Case(rows=35, queue=300, dim=33, alpha=0.4, ids="few", temperature=0.005),
    Case(rows=32, queue=8192, dim=256, alpha=0.4, large=True),
    Case(rows=600, queue=3000, dim=100, ids="few", alpha=0.2, temperature=0.01, large=True),
    Case(rows=1000, queue=500, dim=768, large=True),
]

Problem = dict[str, Tensor | None]


def build(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """The op's tensors, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(3)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, case.dim, generator=generator)

    query, key, teacher, queue = draw(case.rows), draw(case.rows), draw(case.rows), draw(case.queue)
    if case.kind == "converged":
        key, teacher = query + 0.02 * key, query + 0.02 * teacher
    elif case.kind == "cone":
        query, key, teacher, queue = (1 + 0.05 * x for x in (query, key, teacher, queue))
    else:
        teacher = query + 0.5 * teacher
    made: Problem = {
        name: F.normalize(x, dim=1).to(device, dtype)
        for name, x in (("query", query), ("key", key), ("queue", queue))
    }
    if case.alpha > 0:
        made["teacher_query"] = F.normalize(teacher, dim=1).to(device, dtype)
    if case.ids:
        high = 1 if case.ids == "equal" else max(1, case.rows // 3)
        numbers = torch.randint(high, (case.rows + case.queue,), generator=generator).to(device) - 5
        made["query_ids"] = numbers[: case.rows]
        if case.ids == "none":
            made["key_ids"] = numbers[: case.rows] + 1000
        if case.ids != "batch":
            made["queue_ids"] = numbers[case.rows :] + (1000 if case.ids == "none" else 0)
    return made


def results(case: Case, problem: Problem, compute: torch.dtype | None = None) -> dict[str, Tensor]:
    """Loss and gradients: of the op, or of the reference with every step in a dtype."""
    function = so.queue_info_nce if compute is None else so.reference.queue_info_nce
    given = {
        name: x.to(compute) if compute is not None and x is not None and "ids" not in name else x
        for name, x in problem.items()
    }
    query = given.pop("query")
    assert query is not None
    query = query.detach().requires_grad_()
    # fp32 even in the plain computation: a bf16 temperature would be another problem.
    t = torch.tensor(case.temperature, device=query.device)
    t = t.to(torch.promote_types(compute or torch.float32, torch.float32)).requires_grad_()
    loss = function(query, given.pop("key"), given.pop("queue"), t, alpha=case.alpha, **given)
    grads = torch.autograd.grad(loss, (query, t))
    return {"loss": loss.detach(), "grad_query": grads[0], "grad_temperature": grads[1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case: Case, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and (case.large or dtype == torch.bfloat16):
        pytest.skip("too large for the interpreter, or bf16, which it multiplies wrongly")
    if case.large and dtype == torch.float16:
        pytest.skip("fp16 differs from bf16 in its conversion alone")
    problem = build(case, dtype, "cuda" if backend == "cuda" else "cpu")
    oracle = results(case, problem, compute=torch.float64)
    plain = results(case, problem, compute=dtype)
    with poisoned():
        actual = results(case, problem)
    terms = contrast_terms(case.temperature, case.rows)
    for name, value in actual.items():
        assert value.dtype == (dtype if name == "grad_query" else torch.float32)
        assert_within_budget(value, plain[name], oracle[name], name, terms=terms[name])


def test_an_old_key_counts_like_a_new_one(backend: str) -> None:
    """The queue is more candidates: half a batch's keys may come from it."""
    device = "cuda" if backend == "cuda" else "cpu"
    problem = build(Case(rows=24, queue=40), torch.float32, device)
    query, key, queue = (problem[name] for name in ("query", "key", "queue"))
    assert query is not None and key is not None and queue is not None
    ids = torch.arange(24, device=device)
    none = torch.full_like(ids, -1)
    wanted = so.queue_info_nce(query, key, queue, 0.1)
    swapped = so.queue_info_nce(
        query, queue[:24], torch.cat([key, queue[24:]]), 0.1, query_ids=ids, key_ids=none,
        queue_ids=torch.cat([ids, none[:16]]),
    )  # fmt: skip
    torch.testing.assert_close(swapped, wanted)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_converged_pairs_keep_their_digits(temperature: float, backend: str) -> None:
    """Orthogonal candidates: the loss is log1p((n - 1) exp(-1 / t)), which 1 - softmax loses."""
    device = "cuda" if backend == "cuda" else "cpu"
    eye = torch.eye(48, device=device)
    q = eye[:16].clone().requires_grad_()
    exact = math.log1p(47 * math.exp(-1 / temperature))
    share = math.exp(-1 / temperature) / (1 + 47 * math.exp(-1 / temperature))
    for teacher in ({}, {"teacher_query": eye[:16], "alpha": 0.5}):
        loss = so.queue_info_nce(q, eye[:16], eye[16:], temperature, **teacher)
        (grad,) = torch.autograd.grad(loss, q)
        if teacher:  # the student is the teacher: what is learnt is the other half
            extra = 0.5 * 47 * share / temperature
            assert loss.item() == pytest.approx(exact + extra, rel=1e-5, abs=1e-37)
        else:
            assert loss.item() == pytest.approx(exact, rel=1e-5, abs=1e-37)
        wanted = -47 * share / temperature / 16 * (0.5 if teacher else 1.0)
        assert grad[3, 3].item() == pytest.approx(wanted, rel=1e-4, abs=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rerun_and_threads_give_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bf16 wrongly, and slowly")
    case = Case(rows=70, queue=2000 if backend != "triton" else 90, ids="few", alpha=0.4)
    problem = build(case, dtype, "cuda" if backend == "cuda" else "cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, before, before):
            torch.set_num_threads(threads)
            found.append(results(case, problem))
    finally:
        torch.set_num_threads(before)
    # Plain PyTorch splits its sums by the number of threads: there, only the rerun is the same.
    for other in found[-2:-1] if backend == "reference" else found[:-1]:
        assert all(torch.equal(found[-1][name], other[name]) for name in other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [24, 25, 64])
def test_strided_rows_are_read_in_place(dim: int, dtype: torch.dtype, backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    wide = F.normalize(torch.randn(40, 4, dim, generator=torch.Generator().manual_seed(0)), dim=2)
    q, k, m, other = wide.to(device, dtype).unbind(1)
    queue = torch.cat([other, k])[::2]
    contiguous = [x.contiguous() for x in (q, k, queue, m)]

    def run(q: Tensor, k: Tensor, queue: Tensor, m: Tensor) -> Tensor:
        return so.queue_info_nce(q, k, queue, 0.1, teacher_query=m, alpha=0.3)

    wanted = run(*contiguous)
    assert_same(run(q, k, queue, m), wanted)
    swapped = [x.T.contiguous().T for x in contiguous]  # not even the last dimension is contiguous
    assert_same(run(*swapped), wanted)


def test_only_query_and_temperature_are_learnt() -> None:
    problem = build(Case(alpha=0.4), torch.float32, "cpu")
    leaves = {name: x.clone().requires_grad_() for name, x in problem.items() if x is not None}
    q, k, queue = (leaves.pop(name) for name in ("query", "key", "queue"))
    t = torch.tensor(0.1, requires_grad=True)
    so.queue_info_nce(q, k, queue, t, alpha=0.4, **leaves).backward()
    assert q.grad is not None and t.grad is not None
    assert k.grad is None and queue.grad is None and leaves["teacher_query"].grad is None
    with torch.no_grad():
        assert not so.queue_info_nce(q, k, queue, t).requires_grad
    assert torch.equal(
        so.queue_info_nce(q, k, queue, t).detach(),
        so.queue_info_nce(q.detach(), k, queue, 0.1, **leaves),
    )
    (first,) = torch.autograd.grad(so.queue_info_nce(q, k, queue, t), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


def test_torch_machinery() -> None:
    problem = build(Case(rows=9, queue=20, dim=16, alpha=0.4, ids="few"), torch.float32, "cpu")
    q, k, queue, m = (problem[name] for name in ("query", "key", "queue", "teacher_query"))
    assert q is not None and k is not None and queue is not None and m is not None
    q.requires_grad_()
    t = torch.tensor(0.1, requires_grad=True)
    ids = [problem[name] for name in ("query_ids", "query_ids", "queue_ids")]
    op = torch.ops.svitt_ops.queue_info_nce.default
    torch.library.opcheck(op, (q, k, queue, t, m, 0.4, *ids, True))
    torch.library.opcheck(
        op, (q.detach(), k, queue, t.detach(), None, 0.0, None, None, None, False)
    )

    def run(q: Tensor, t: Tensor) -> Tensor:
        return so.queue_info_nce(q, k, queue, t, teacher_query=m, alpha=0.4)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    wanted = torch.autograd.grad(run(q, t), (q, t))
    for one, other in zip(torch.autograd.grad(compiled(q, t), (q, t)), wanted, strict=True):
        assert torch.equal(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(q, t)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, so.queue_info_nce(
        q.bfloat16(), k.bfloat16(), queue.bfloat16(), t, teacher_query=m.bfloat16(), alpha=0.4
    ))  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        run(q, t).backward()
    assert counter.get_total_flops() == 4 * 2 * 9 * 29 * 16
    with FakeTensorMode(), torch.no_grad():
        fake = [torch.empty(5, 8, device="cuda") for _ in range(3)]
        assert so.queue_info_nce(*fake, 0.1).device.type == "cuda"
        given = (*fake, torch.empty((), device="cuda"), None, 0.0, None, None, None, True)
        loss, grad, grad_t = op(*given)
        assert grad.shape == (5, 8) and grad.dtype == torch.float32 and grad_t.shape == ()


def test_memory_is_linear() -> None:
    """What autograd keeps does not depend on the queue."""
    sizes = []

    def pack(x: Any) -> Any:
        sizes.append(x.numel() * x.element_size())
        return x

    for queue in (100, 10000):
        q, k = (torch.randn(50, 16, requires_grad=True) for _ in range(2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            so.queue_info_nce(q, k, torch.randn(queue, 16), 0.1)
    half = len(sizes) // 2
    assert sizes[:half] == sizes[half:] and sum(sizes[:half]) < 4 * 50 * 16 * 4


GOOD = torch.full((4, 8), 8**-0.5)
IDS = torch.arange(4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "query must be a tensor, got int", {"query": 1}),
        (TypeError, "query must be float32, float16 or bfloat16", {"query": GOOD.double()}),
        (ValueError, "query must have at least one row", {"query": GOOD[:0], "key": GOOD[:0]}),
        (ValueError, r"key must have shape \(4, 8\), got \(3, 8\)", {"key": GOOD[:3]}),
        (TypeError, "key must be torch.float32 as query is", {"key": GOOD.half()}),
        (ValueError, r"queue must have at least one row, got \(0, 8\)", {"queue": GOOD[:0]}),
        (ValueError, "queue must have 8 columns", {"queue": GOOD[:, :7]}),
        (TypeError, "queue must be torch.float32 as query is", {"queue": GOOD.bfloat16()}),
        (ValueError, "queue must be on cpu, got meta", {"queue": GOOD.to("meta")}),
        (ValueError, "temperature must be positive", {"temperature": 0.0}),
        (ValueError, r"alpha must be in \[0, 1\], got 1.1", {"alpha": 1.1}),
        (ValueError, r"alpha must be in \[0, 1\], got -0.1", {"alpha": -0.1}),
        (ValueError, "teacher_query must be given where alpha > 0", {"alpha": 0.4}),
        (TypeError, "teacher_query must be a tensor", {"teacher_query": [1.0]}),
        (
            ValueError,
            r"teacher_query must have shape \(4, 8\), got \(3, 8\)",
            {"teacher_query": GOOD[:3], "alpha": 0.4},
        ),
        (ValueError, r"query_ids must have shape \(4,\)", {"query_ids": IDS[:3]}),
        (ValueError, "query_ids must be given with key_ids", {"key_ids": IDS}),
        (ValueError, "query_ids must be given with key_ids", {"queue_ids": IDS}),
        (ValueError, r"key_ids must have shape \(4,\)", {"query_ids": IDS, "key_ids": IDS[:3]}),
        (TypeError, "queue_ids must be int64", {"query_ids": IDS, "queue_ids": GOOD[0, :4]}),
        (ValueError, r"queue_ids must have shape \(4,\)", {"query_ids": IDS, "queue_ids": IDS[:3]}),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    given = {"query": GOOD, "key": GOOD, "queue": GOOD, "temperature": 0.1} | arguments
    positional = [given.pop(name) for name in ("query", "key", "queue", "temperature")]
    with pytest.raises(error, match="queue_info_nce: .*" + message):
        so.queue_info_nce(*positional, **given)

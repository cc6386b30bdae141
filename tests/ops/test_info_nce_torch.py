"""info_nce as torch's machinery sees it, over several ranks, and with bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import svitt_ops as so


def inputs(rows: int = 20, dim: int = 16, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [F.normalize(torch.randn(rows, dim, generator=generator), dim=1) for _ in range(2)]
    return [x.to(**options).requires_grad_() for x in made]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler: str) -> None:
    ids = torch.arange(20) // 2

    def run(q: Tensor, k: Tensor, t: Tensor) -> Tensor:
        return so.info_nce(q * 1.5, k, t.exp(), ids=ids, label_smoothing=0.1) * 2

    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    found = []
    for function in (run, compiled):
        leaves = [*inputs(), torch.tensor(-2.0, requires_grad=True)]
        loss = function(*leaves)
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    for eager, fused in zip(*found, strict=True):
        torch.testing.assert_close(eager, fused)


def test_compiles_for_any_size() -> None:
    compiled = torch.compile(so.info_nce, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, dim in ((5, 8), (7, 9), (40, 24)):
        q, k = (x.detach() for x in inputs(rows, dim))
        assert torch.equal(compiled(q, k, 0.2), so.info_nce(q, k, 0.2))


@pytest.mark.parametrize("ids", [None, torch.arange(20) // 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(ids: Tensor | None, symmetric: bool) -> None:
    q, k = inputs()
    t = torch.tensor(0.1, requires_grad=True)
    weights = None if ids is None else torch.arange(20.0)
    forward = torch.ops.svitt_ops.info_nce.default
    torch.library.opcheck(forward, (q, k, t, ids, ids, weights, weights, 0, symmetric, 0.1))
    with torch.no_grad():
        loss, rows, columns = forward(q, k, t, ids, ids, weights, weights, 0, symmetric, 0.1)
    plain = [x.detach() for x in (torch.ones_like(loss), q, k, t)]
    backward = torch.ops.svitt_ops.info_nce_backward.default
    torch.library.opcheck(
        backward, (*plain, ids, ids, weights, weights, 0, rows, columns, 0.1, True)
    )


def test_gradcheck_of_the_reference() -> None:
    q, k = inputs(6, 5, dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ids, weights = torch.tensor([0, 1, 1, 2, 0, 0]), torch.tensor([1.0, 2, 3, 4, 0, 5])

    def run(*x: Tensor) -> Tensor:
        return so.reference.info_nce(*x, ids=ids, weights=weights, label_smoothing=0.1)

    assert torch.autograd.gradcheck(run, (q, k, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_on_cuda(dtype: torch.dtype) -> None:
    with FakeTensorMode(), torch.no_grad():
        q, k = (torch.empty(33, 24, device="cuda", dtype=dtype) for _ in range(2))
        t = torch.empty((), device="cuda")
        op = torch.ops.svitt_ops.info_nce
        loss, rows, columns = op(q, k, t, None, None, None, None, 0, True, 0.0)
        assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == "cuda"
        assert rows.shape == columns.shape == (6, 33) and rows.dtype == torch.float64
        for wide, wanted in ((False, dtype), (True, torch.float32)):
            *grads, grad_t = torch.ops.svitt_ops.info_nce_backward(
                loss, q, k, t, None, None, None, None, 0, rows, columns, 0.0, wide
            )
            assert [x.dtype for x in grads] == [wanted] * 2 and grad_t.shape == ()


def test_autocast_takes_its_dtype() -> None:
    q, k = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = so.info_nce(q, k, 0.1)
    assert torch.equal(loss, so.info_nce(q.bfloat16(), k.bfloat16(), 0.1))
    assert torch.autograd.grad(loss, q)[0].dtype == torch.float32


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, k = inputs(20, 16)
    with FlopCounterMode(display=False) as counter:
        so.info_nce(q, k, 0.1).backward()
    assert counter.get_total_flops() == 4 * 2 * 20 * 20 * 16


def test_a_float_is_the_same_as_a_tensor() -> None:
    q, k = inputs()
    assert torch.equal(so.info_nce(q, k, 0.07), so.info_nce(q, k, torch.tensor([0.07])))


RANKS = """
import torch.nn.functional as F
import svitt_ops as so
ranks = 2
generator = torch.Generator().manual_seed(0)
whole = [F.normalize(torch.randn(24, 16, generator=generator), dim=1) for _ in range(2)]
weights = torch.rand(24, generator=generator)
for ids in (None, torch.randint(7, (24,), generator=generator)):
    for options in (
        {}, {"symmetric": False, "label_smoothing": 0.2},
        {"label_smoothing": 0.1, "weights": weights},
    ):
        q, k = (x.clone().requires_grad_() for x in whole)
        t = torch.tensor(0.1, requires_grad=True)
        if "weights" in options:
            options["weights"] = weights
        wanted = so.info_nce(q, k, t, ids=ids, **options)
        exact = torch.autograd.grad(wanted, (q, k, t))
        part = slice(rank * 24 // ranks, (rank + 1) * 24 // ranks)
        a, b = (x[part].clone().requires_grad_() for x in whole)
        s = torch.tensor(0.1, requires_grad=True)
        some = None if ids is None else ids[part]
        if "weights" in options:
            options["weights"] = weights[part]
        loss = so.info_nce(a, b, s, ids=some, group=dist.group.WORLD, **options)
        found = torch.autograd.grad(loss, (a, b, s), retain_graph=True)
        torch.testing.assert_close(loss, wanted.detach())
        torch.testing.assert_close(found[0] / ranks, exact[0][part])
        torch.testing.assert_close(found[1] / ranks, exact[1][part])
        torch.testing.assert_close(found[2], exact[2])

        def of(a, s):
            return so.info_nce(a, b, s, ids=some, group=dist.group.WORLD, **options)

        by_func = torch.func.grad(of, argnums=(0, 1))(a, s)
        assert torch.equal(by_func[0], found[0]) and torch.equal(by_func[1], found[2])
        if rank == 1:
            a.data[0, 0] = float("nan")  # is known on both
        broken = so.info_nce(a, b, s, ids=some, group=dist.group.WORLD, **options)
        assert broken.isnan()
        assert all(x.isnan().all() for x in torch.autograd.grad(broken, (a, b, s)))
for refused, word in (
    (lambda: torch.func.jvp(of, (a, s), (a, s)), "a forward-mode derivative (jvp)"),
    (lambda: torch.func.jacrev(of)(a, s), "vmap (and so jacrev)"),
    (lambda: torch.func.vmap(of, in_dims=(0, None))(a[None], s), "vmap (and so jacrev)"),
    (lambda: torch.func.grad(lambda x: torch.func.grad(of)(x, s).sum())(a), "a second derivative"),
):
    try:
        refused()
    except NotImplementedError as error:
        assert str(error).startswith(f"info_nce: {word} is not available"), error
    else:
        raise AssertionError(word)
try:
    rows = 5 + rank
    so.info_nce(torch.ones(rows, 4), torch.ones(rows, 4), 0.1, group=dist.group.WORLD)
except ValueError as error:
    assert "as many rows on every rank, got [5, 6]" in str(error), error
else:
    raise AssertionError("ranks of unequal size")
dist.destroy_process_group()
try:
    loss.backward()
except RuntimeError as error:
    assert "group must exist until the backward" in str(error), error
else:
    raise AssertionError("a destroyed group")
"""


def test_two_ranks_compute_the_loss_of_one(
    tmp_path: Path, on_two_ranks: Callable[..., None]
) -> None:
    on_two_ranks(RANKS, tmp_path)


GOOD = torch.full((4, 8), 8**-0.5)
ONES = torch.ones(4, dtype=torch.int64)
WEIGHTED = {"ids": ONES}


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "query must be a tensor, got list", {"query": [1.0]}),
        (TypeError, "query must be float32, float16 or bfloat16", {"query": GOOD.double()}),
        (ValueError, r"query must have shape \(rows, D\), got \(4,\)", {"query": GOOD[:, 0]}),
        (ValueError, r"must have shape \(rows, D\), got \(4, 0\)", {"query": GOOD[:, :0]}),
        (ValueError, "at least one row", {"query": GOOD[:0], "key": GOOD[:0]}),
        (ValueError, r"key must have shape \(4, 8\), got \(3, 8\)", {"key": GOOD[:3]}),
        (ValueError, "key must have 8 columns as query has", {"key": GOOD[:, :7]}),
        (TypeError, "key must be torch.float32 as query is", {"key": GOOD.half()}),
        (ValueError, "key must be on cpu, got meta", {"key": GOOD.to("meta")}),
        (ValueError, "temperature must be positive and finite, got 0.0", {"temperature": 0.0}),
        (ValueError, "temperature must be positive and finite, got -1", {"temperature": -1}),
        (
            ValueError,
            "temperature must be positive and finite, got nan",
            {"temperature": float("nan")},
        ),
        (TypeError, "temperature must be a float or a tensor, got str", {"temperature": "1"}),
        (TypeError, "temperature must be a float or a tensor, got bool", {"temperature": True}),
        (ValueError, "one element, got torch.float32 of shape", {"temperature": torch.ones(2)}),
        (
            ValueError,
            "one element, got torch.int64",
            {"temperature": torch.ones((), dtype=torch.int64)},
        ),
        (TypeError, "ids must be a tensor, got list", {"ids": [0, 1, 2, 3]}),
        (TypeError, "ids must be int64 or int32, got torch.float32", {"ids": torch.ones(4)}),
        (ValueError, r"ids must have shape \(4,\), got \(3,\)", {"ids": torch.arange(3)}),
        (TypeError, "weights must be float32 or .*, got torch.int64", WEIGHTED | {"weights": ONES}),
        (
            ValueError,
            r"weights must have shape \(4,\), got \(3,\)",
            WEIGHTED | {"weights": GOOD[0, :3]},
        ),
        (
            ValueError,
            "weights must be at least 0 and finite, got -0.35",
            WEIGHTED | {"weights": -GOOD[0, :4]},
        ),
        (
            ValueError,
            "weights must be at least 0 and finite, got inf",
            WEIGHTED | {"weights": GOOD[0, :4] / 0},
        ),
        (ValueError, r"label_smoothing must be in \[0, 1\), got 1", {"label_smoothing": 1.0}),
        (ValueError, r"label_smoothing must be in \[0, 1\), got -0.1", {"label_smoothing": -0.1}),
        (ValueError, "group must be of an initialised torch.distributed", {"group": object()}),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    given = {"query": GOOD, "key": GOOD, "temperature": 0.1} | arguments
    with pytest.raises(error, match="info_nce: .*" + message):
        so.info_nce(given.pop("query"), given.pop("key"), given.pop("temperature"), **given)


def test_second_derivative_is_refused() -> None:
    q, k = inputs()
    (grad,) = torch.autograd.grad(so.info_nce(q, k, 0.1), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()

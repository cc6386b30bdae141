"""Every Triton kernel touches its own memory alone; what would not is seen. All interpreted."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("interprets kernels", allow_module_level=True)
import triton.language as tl  # noqa: E402
from watched_memory import watched_memory  # noqa: E402

import svitt_ops as so  # noqa: E402
from svitt_ops.kernels import block_layout, cross_attention, retrieval_ranks  # noqa: E402
from svitt_ops.testing import (  # noqa: E402
    attention_results,
    cross_attention_results,
    poisoned,
    route_to,
)

WRONG = triton.runtime.interpreter.InterpreterError


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    with watched_memory():
        yield


@triton.jit
def _copy_kernel(x_ptr, out_ptr, columns, step, limit, out_limit, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    places = tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row * step + places, mask=places < limit, other=0.0)
    tl.store(out_ptr + row * columns + places, x, mask=places < out_limit)


def copied(x: Tensor, limit: int = 11, out_limit: int = 11, step: int | None = None) -> Tensor:
    """Rows of 11, the first `limit` of each loaded and `out_limit` stored."""
    out = torch.zeros(len(x), 11)
    step = x.stride(0) if step is None else step
    _copy_kernel[(len(x),)](x, out, 11, step, limit, out_limit, COLUMNS=16)
    return out


STRIDED = torch.arange(60.0).reshape(3, 20)[:, 5:16]


@pytest.mark.parametrize("x", [torch.randn(3, 11), STRIDED, torch.randn(11).expand(3, 11)])
def test_what_is_inside_passes_and_comes_back(x: Tensor) -> None:
    assert torch.equal(copied(x), x)
    assert torch.equal(copied(x, limit=7)[:, :7], x[:, :7])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"x": torch.ones(3, 11), "limit": 12}, r"\(2, 0, 0\) loads 33 elements from the start"),
        ({"x": torch.ones(3, 11), "step": -1}, r"\(1, 0, 0\) loads -1 elements"),
        ({"x": STRIDED, "limit": 12}, r"\(0, 0, 0\) loads 11 elements from the start of x_ptr"),
        (
            {"x": torch.ones(1, 11), "out_limit": 12},
            r"\(0, 0, 0\) stores 11 elements from the start",
        ),
        (
            {"x": torch.ones(3, 11), "out_limit": 12},
            r"\(1, 0, 0\) stores element 11 of out_ptr, as",
        ),
    ],
)
def test_a_planted_access_out_of_bounds_is_an_error(how: dict[str, Any], said: str) -> None:
    with pytest.raises(WRONG, match=f"_copy_kernel {said}"):
        copied(**how)


@triton.jit
def _neighbour_kernel(x_ptr, ATOMIC: tl.constexpr, STORES: tl.constexpr, LAST: tl.constexpr):
    program = tl.program_id(0)
    if ATOMIC:
        tl.atomic_add(x_ptr, 1.0)
    if STORES:
        tl.store(x_ptr + program, 1.0)
    if program == LAST:
        tl.store(x_ptr + 8, tl.load(x_ptr))


@pytest.mark.parametrize(
    ("atomic", "stores", "last", "said"),
    [
        (False, True, 1, "loads element 0"),
        (True, False, 1, "loads element 0"),
        (True, True, 3, "stores element 0"),
        (False, False, 1, None),
        (True, False, 3, None),
        (False, True, 0, None),
    ],
)
def test_a_planted_race_of_programs_is_an_error(
    atomic: bool, stores: bool, last: int, said: str | None
) -> None:
    def launch() -> None:
        _neighbour_kernel[(3,)](torch.zeros(9), ATOMIC=atomic, STORES=stores, LAST=last)

    if said is None:
        launch()
    else:
        with pytest.raises(WRONG, match=f"{said} of x_ptr, as another program does"):
            launch()


class OneKeyMore:
    """A launch of the ranks that has one key more than there are."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.kernel[grid](*args[:7], args[7] + 1, *args[8:], **options)

        return launch


def test_a_bound_that_is_off_by_one_in_a_real_kernel_is_an_error() -> None:
    real = retrieval_ranks._ranks_kernel
    with (
        mock.patch.object(retrieval_ranks, "_ranks_kernel", OneKeyMore(real)),
        pytest.raises(WRONG, match=r"_ranks_kernel .* loads 380 elements from the start of"),
    ):
        retrieval_ranks.retrieval_ranks(torch.randn(19, 20), torch.randn(19, 20), None, None)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """In rows that are wider than it."""
    *rest, width = shape
    return torch.randn(*rest, width + 3).to(dtype)[..., 1:-2].requires_grad_()


def attention(batch: int, heads: int, bias: bool, size: int, num_global: int) -> None:
    dim, tokens = 20, 2 * size + 3
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]]).bool()
    layout = so.BlockLayout.from_mask(
        mask, num_tokens=tokens, block_size=size, num_global=num_global
    )
    rows = [leaf(batch, num_global + tokens, heads, dim).transpose(1, 2) for _ in range(4)]
    given: dict[str, Tensor] = {}
    if bias:
        entries = 9 + 2 * num_global + num_global**2
        given["bias_table"] = torch.randn(entries, heads)
        given["position_codes"] = torch.randint(0, 5, (batch, tokens), dtype=torch.int32)
        given["key_lengths"] = torch.tensor([tokens, size + 1], dtype=torch.int32)
    attention_results(*rows[:3], layout, rows[3].detach(), **given)


def cross(batch: int, heads: int, queries: int, keys: int, dim: int, mask: bool) -> None:
    query, key, value, grad = (
        leaf(batch, n, heads, dim).transpose(1, 2).detach() for n in (queries, keys, keys, queries)
    )
    padding = torch.rand(batch, keys) < 0.3 if mask else None
    with mock.patch.object(cross_attention, "LEAST_KEYS", 32):
        cross_attention_results(query, key, value, grad, key_padding_mask=padding)


def contrast(op: Callable[..., Tensor], rows: int, dim: int, *given: Any, **options: Any) -> None:
    temperature = torch.tensor(0.1, requires_grad=True)
    op(leaf(rows, dim), leaf(rows, dim), *given, temperature, **options).backward()


def prune(tokens: int, keep: int, dim: int, codes: bool) -> None:
    places = torch.randint(0, 9, (tokens,), dtype=torch.int32) if codes else None
    scores = torch.randn(2, tokens + 3)[:, 1:-2]
    kept = so.prune_tokens(
        leaf(2, 1 + tokens, dim), scores, keep=keep, num_global=1, position_codes=places
    )
    kept.tokens.sum().backward()


IDS = torch.arange(19) // 2
CASES: dict[str, list[Callable[[], object]]] = {
    "block_layout": [lambda: block_layout.draw_block_layout(torch.rand(5, 5), 1, 2)],
    "block_sparse_attention": [
        lambda: attention(1, 2, False, 7, 1),
        lambda: attention(2, 1, True, 17, 3),
    ],
    "cross_attention": [
        lambda: cross(2, 3, 5, 7, 20, False),
        lambda: cross(1, 1, 70, 70, 33, True),
    ],
    "info_nce": [
        lambda: contrast(so.info_nce, 19, 20),
        lambda: contrast(so.info_nce, 19, 33, ids=IDS, weights=torch.rand(19)),
    ],
    "sigmoid_nce": [
        lambda: contrast(lambda q, k, t, **rest: so.sigmoid_nce(q, k, t, -1.0, **rest), 19, 20),
    ],
    "queue_info_nce": [
        lambda: contrast(so.queue_info_nce, 19, 20, torch.randn(45, 20)),
        lambda: contrast(
            so.queue_info_nce, 19, 33, torch.randn(45, 33), teacher_query=torch.randn(19, 33),
            alpha=0.4, query_ids=IDS, key_ids=IDS, queue_ids=torch.arange(45),
        ),
    ],
    "sample_hard_negatives": [
        lambda: so.sample_hard_negatives(leaf(19, 20), leaf(19, 20), 0.1, ids=IDS),
    ],
    "retrieval_ranks": [
        lambda: so.retrieval_ranks(leaf(19, 20), leaf(37, 20)),
        lambda: so.retrieval_ranks(leaf(19, 33), leaf(19, 33), query_ids=IDS, key_ids=IDS),
    ],
    "token_pruning": [
        lambda: prune(23, 9, 11, False),
        lambda: prune(23, 23, 1, True),
    ],
}  # fmt: skip


def kernels_of(stem: str) -> dict[str, Any]:
    """The kernels of an op's modules, by module and name."""
    folder = Path(block_layout.__file__).parent
    found = {}
    for path in folder.glob(f"{stem}*.py"):
        module = importlib.import_module(f"svitt_ops.kernels.{path.stem}")
        for name, value in vars(module).items():
            if name.endswith("_kernel") and value.fn.__module__ == module.__name__:
                found[f"{path.stem}.{name}"] = value
    return found


@pytest.mark.parametrize("stem", CASES)
def test_kernels_touch_what_is_their_own(stem: str) -> None:
    assert {*so.OPS, "block_layout"} == CASES.keys()
    run_before = triton.runtime.interpreter.InterpretedFunction.run
    launched = []

    def run(self: Any, *args: Any, **options: Any) -> None:
        launched.append(self)
        run_before(self, *args, **options)

    torch.manual_seed(0)
    with (
        mock.patch.object(triton.runtime.interpreter.InterpretedFunction, "run", run),
        route_to("triton"),
        poisoned(),
    ):
        for call in CASES[stem]:
            call()
    expected = kernels_of(stem)
    assert expected
    assert [name for name, kernel in expected.items() if kernel not in launched] == []

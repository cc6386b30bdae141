"""retrieval_ranks against a full comparison, through every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import svitt_ops as so
from svitt_ops.testing import poisoned


def draw(rows: int, keys: int, dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + keys)
    query, key = (torch.randn(n, dim, generator=generator) for n in (rows, keys))
    return tuple(F.normalize(x, dim=1).to(device, dtype) for x in (query, key))  # type: ignore[return-value]


def exact(query: Tensor, key: Tensor, same: Tensor) -> Tensor:
    """Ranks in fp64, which has no ties among random numbers."""
    dots = query.double() @ key.double().T
    best = dots.masked_fill(~same, float("-inf")).amax(1, keepdim=True)
    return torch.where(same.any(1), (dots > best).sum(1), key.shape[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "keys", "dim"), [(1, 1, 1), (2, 5, 48), (33, 33, 64), (31, 127, 100), (150, 260, 20)]
)
def test_against_fp64(rows: int, keys: int, dim: int, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bf16 wrongly")
    device = "cuda" if backend == "cuda" else "cpu"
    query, key = draw(rows, keys, dim, dtype, device)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(keys // 2 + 1, (n,), generator=generator).to(device) for n in (rows, keys)]
    with poisoned():
        plain = so.retrieval_ranks(query, key)
        by_id = so.retrieval_ranks(query, key, query_ids=ids[0], key_ids=ids[1].int())
    eye = torch.eye(rows, keys, dtype=torch.bool, device=device)
    # Rounding may swap neighbours: a rank apart on a row or two, never more.
    for found, same in ((plain, eye), (by_id, ids[0][:, None] == ids[1][None, :])):
        wanted = exact(query, key, same)
        assert found.dtype == torch.int64 and (found - wanted).abs().max() <= 1
        assert (found != wanted).sum() <= 2


def test_duplicates_of_the_positive_tie(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    query, key = draw(20, 20, 50, torch.float32, device)
    many = torch.cat([key, key, key])
    assert torch.equal(so.retrieval_ranks(query, many), 3 * so.retrieval_ranks(query, key))
    alike = key[:1].expand(20, -1)
    assert so.retrieval_ranks(query, alike).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positives_everywhere(dtype: torch.dtype, backend: str) -> None:
    """More than similarities are kept of; small whole numbers, so that ranks are exact."""
    if backend == "triton":
        pytest.skip("takes long in the interpreter")
    device = "cuda" if backend == "cuda" else "cpu"
    generator = torch.Generator().manual_seed(5)
    query, key = (
        torch.randint(-8, 9, (n, 40), generator=generator).to(device, dtype) for n in (70, 3000)
    )
    ids = [torch.randint(60, (n,), generator=generator).to(device) for n in (70, 3000)]
    found = so.retrieval_ranks(query, key, query_ids=ids[0], key_ids=ids[1])
    assert torch.equal(found, exact(query, key, ids[0][:, None] == ids[1][None, :]))


def test_a_query_without_a_positive_is_last(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    query, key = draw(4, 7, 8, torch.float32, device)
    ids = torch.arange(4, device=device)
    ranks = so.retrieval_ranks(
        query, key, query_ids=ids, key_ids=torch.full((7,), 2, device=device)
    )
    assert ranks.tolist()[:2] == [7, 7] and ranks[2] == 0 and ranks[3] == 7


def test_no_rows_and_no_keys() -> None:
    assert so.retrieval_ranks(torch.empty(0, 4), torch.randn(3, 4)).shape == (0,)
    ids = torch.arange(3)
    ranks = so.retrieval_ranks(torch.randn(3, 4), torch.empty(0, 4), query_ids=ids, key_ids=ids[:0])
    assert ranks.tolist() == [0, 0, 0]


def test_torch_machinery() -> None:
    query, key = draw(9, 12, 16, torch.float32, "cpu")
    op = torch.ops.svitt_ops.retrieval_ranks.default
    torch.library.opcheck(op, (query, key, None, None))
    compiled = torch.compile(so.retrieval_ranks, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(query, key), so.retrieval_ranks(query, key))
    swapped = key.T.contiguous().T
    assert torch.equal(so.retrieval_ranks(query, swapped), so.retrieval_ranks(query, key))
    with FakeTensorMode():
        fake = [torch.empty(5, 8, device="cuda") for _ in range(2)]
        assert so.retrieval_ranks(*fake).device.type == "cuda"


GOOD = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "query must be a tensor, got int", {"query": 1}),
        (ValueError, r"query must have shape \(rows, D\)", {"query": GOOD[0]}),
        (ValueError, "key must have 8 columns", {"key": GOOD[:, :3]}),
        (TypeError, "key must be torch.float32", {"key": GOOD.half()}),
        (ValueError, "key must have at least 4 rows", {"key": GOOD[:3]}),
        (ValueError, "key_ids must be given when query_ids is", {"query_ids": torch.arange(4)}),
        (ValueError, "query_ids must be given when key_ids is", {"key_ids": torch.arange(4)}),
        (
            ValueError,
            r"key_ids must have shape \(4,\), got \(5,\)",
            {"query_ids": torch.arange(4), "key_ids": torch.arange(5)},
        ),
        (
            TypeError,
            "query_ids must be int64 or int32",
            {"query_ids": torch.ones(4), "key_ids": torch.arange(4)},
        ),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    given = {"query": GOOD, "key": GOOD} | arguments
    with pytest.raises(error, match="retrieval_ranks: .*" + message):
        so.retrieval_ranks(given.pop("query"), given.pop("key"), **given)

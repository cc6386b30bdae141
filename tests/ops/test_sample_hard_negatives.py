"""sample_hard_negatives: its distribution, what it never returns, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import svitt_ops as so
from svitt_ops.testing import poisoned


def draw(rows: int, dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    made = [torch.randn(rows, dim, generator=generator) for _ in range(2)]
    return [F.normalize(x, dim=1).to(device, dtype) for x in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.001])
@pytest.mark.parametrize("rows", [1, 2, 33, 150])
def test_inverts_the_distribution(
    rows: int, temperature: float, dtype: torch.dtype, backend: str
) -> None:
    """The weights up to the sampled key reach the uniform share, those before it do not."""
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bf16 wrongly")
    device = "cuda" if backend == "cuda" else "cpu"
    query, key = draw(rows, 40, dtype, device)
    ids = torch.randint(max(1, rows // 3), (rows,), generator=torch.Generator().manual_seed(2))
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    uniform[0] = 0.0
    uniform = uniform.to(device)
    for given in (None, ids.to(device)):
        with poisoned():
            found = torch.ops.svitt_ops.sample_hard_negatives(
                query, key, torch.tensor(temperature, device=device), given, given, uniform
            )
        same = torch.eye(rows, dtype=torch.bool, device=device)
        if given is not None:
            same = given[:, None] == given[None, :]
        logits = (query.double() @ key.double().T / temperature).masked_fill(same, -math.inf)
        weights = logits.softmax(1).nan_to_num(0.0)
        reached = weights.cumsum(1)
        for i, j in enumerate(found.tolist()):
            if bool(same[i].all()):
                assert j == -1
                continue
            assert not same[i, j] and weights[i, j] > 0
            # Of shares: fp32 weights of logits that are rounded at 1 / temperature.
            slack = 1e-5 + 1e-6 / temperature
            assert reached[i, j] >= uniform[i] - slack
            assert reached[i, j] - weights[i, j] <= uniform[i] + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_keys(dtype: torch.dtype, backend: str) -> None:
    """More than similarities are kept of, so that some are computed twice."""
    if backend == "triton":
        pytest.skip("takes long in the interpreter")
    device = "cuda" if backend == "cuda" else "cpu"
    generator = torch.Generator().manual_seed(4)
    query, key = (
        F.normalize(torch.randn(n, 24, generator=generator), dim=1).to(device, dtype)
        for n in (70, 6000)
    )
    temperature = torch.tensor(0.07, device=device)
    uniform = torch.rand(70, generator=generator, dtype=torch.float64).to(device)
    found = torch.ops.svitt_ops.sample_hard_negatives(query, key, temperature, None, None, uniform)
    logits = query.double() @ key.double().T / 0.07
    weights = logits.fill_diagonal_(-math.inf).softmax(1)
    reached, chosen = weights.cumsum(1), found[:, None]
    assert (reached.gather(1, chosen)[:, 0] >= uniform - 1e-5).all()
    assert ((reached - weights).gather(1, chosen)[:, 0] <= uniform + 1e-5).all()
    assert (found > 4500).any()


def test_follows_the_softmax() -> None:
    """Chi-square over many draws of one query's distribution."""
    rows, draws = 12, 400
    query, key = draw(rows, 6, torch.float32, "cpu")
    ids = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 7, 8, 9, 1])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(rows, rows)
    for _ in range(draws):
        found = so.sample_hard_negatives(query, key, 0.5, ids=ids, generator=generator)
        counts[torch.arange(rows), found] += 1
    same = ids[:, None] == ids[None, :]
    expected = (query @ key.T / 0.5).masked_fill(same, -math.inf).softmax(1) * draws
    assert counts[same].eq(0).all()
    square = ((counts - expected).square() / expected.clamp(min=1e-9))[~same].sum().item()
    freedom = int((~same).sum()) - rows
    # Mean `freedom`, variance twice that: five deviations.
    assert abs(square - freedom) < 5 * math.sqrt(2 * freedom)


def test_no_negative_gives_minus_one(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    query, key = draw(5, 8, torch.float32, device)
    ids = torch.zeros(5, dtype=torch.int64, device=device)
    assert so.sample_hard_negatives(query, key, 0.1, ids=ids).tolist() == [-1] * 5
    assert so.sample_hard_negatives(query[:1], key[:1], 0.1).tolist() == [-1]
    assert so.sample_hard_negatives(query[:0], key[:0], 0.1).shape == (0,)


def test_generators_and_reruns() -> None:
    query, key = draw(60, 16, torch.float32, "cpu")

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return so.sample_hard_negatives(query, key, 0.3, generator=generator)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    torch.manual_seed(5)
    first = so.sample_hard_negatives(query, key, 0.3)
    torch.manual_seed(5)
    assert torch.equal(first, so.sample_hard_negatives(query, key, torch.tensor(0.3)))


def test_torch_machinery() -> None:
    query, key = draw(9, 16, torch.float32, "cpu")
    uniform = torch.rand(9, dtype=torch.float64)
    op = torch.ops.svitt_ops.sample_hard_negatives.default
    torch.library.opcheck(op, (query, key, torch.tensor(0.1), None, None, uniform))
    compiled = torch.compile(so.sample_hard_negatives, backend="aot_eager", fullgraph=True)
    assert compiled(query, key, 0.1).shape == (9,)
    leaf = query.clone().requires_grad_()
    assert not so.sample_hard_negatives(leaf, key, 0.1).requires_grad
    with FakeTensorMode():
        fake = [torch.empty(5, 8, device="cuda") for _ in range(2)]
        assert so.sample_hard_negatives(*fake, 0.1).device.type == "cuda"


GOOD = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "query must be a tensor, got int", {"query": 1}),
        (ValueError, r"key must have shape \(4, 8\), got \(3, 8\)", {"key": GOOD[:3]}),
        (TypeError, "key must be torch.float32", {"key": GOOD.half()}),
        (ValueError, "temperature must be positive", {"temperature": 0}),
        (ValueError, r"ids must have shape \(4,\), got \(5,\)", {"ids": torch.arange(5)}),
        (TypeError, "ids must be int64 or int32", {"ids": torch.ones(4)}),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    given = {"query": GOOD, "key": GOOD, "temperature": 0.1} | arguments
    with pytest.raises(error, match="sample_hard_negatives: .*" + message):
        so.sample_hard_negatives(
            given.pop("query"), given.pop("key"), given.pop("temperature"), **given
        )

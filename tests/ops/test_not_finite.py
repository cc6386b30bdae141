"""What NaN, infinities and similarities beyond fp32 become: the same in every implementation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so

# Numpy, by which Triton is interpreted, warns of what is the point here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]

NAN, INF = float("nan"), float("inf")
ROWS, DIM = 6, 16
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(backend: str, dtype: torch.dtype, rows: int = ROWS, seed: int = 0) -> Tensor:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bf16 wrongly")
    x = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=1).to("cuda" if backend == "cuda" else "cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("whole", [True, False])
def test_ranks(value: float, whole: bool, dtype: torch.dtype, backend: str) -> None:
    """A score that is no number counts against the query, a positive's too."""
    query, key = (draw(backend, dtype, seed=seed) for seed in (1, 2))
    clean = so.retrieval_ranks(query, key)
    dots = query.double() @ key.double().T
    broken = query.clone()
    broken[2, slice(None) if whole else 3] = value
    wanted = clean.clone()
    wanted[2] = ROWS
    assert torch.equal(so.retrieval_ranks(broken, key), wanted)
    broken = key.clone()
    broken[4, slice(None) if whole else 3] = value
    own = dots.diagonal()[:, None]
    worse = dots > own
    worse[:, 4] = True
    wanted = worse.sum(1)
    wanted[4] = ROWS
    assert torch.equal(so.retrieval_ranks(query, broken), wanted)
    # Of several positives the finite ones count, and the others are against the query.
    ids = torch.arange(ROWS, device=query.device) // 2
    found = so.retrieval_ranks(query, broken, query_ids=ids, key_ids=ids)
    dots[:, 4] = -INF
    best = dots.masked_fill(ids[:, None] != ids, -INF).amax(1, keepdim=True)
    assert torch.equal(found, 1 + (dots > best).sum(1))
    broken[:] = value
    assert so.retrieval_ranks(query, broken).eq(ROWS).all()
    assert so.retrieval_ranks(broken, key).eq(ROWS).all()


def test_ranks_of_similarities_beyond_fp32(backend: str) -> None:
    query, key = (draw(backend, torch.float32, seed=seed) * 1e20 for seed in (1, 2))
    assert so.retrieval_ranks(query, key).eq(ROWS).all()
    key[0], query[0] = 0, 0
    assert so.retrieval_ranks(query, key).tolist() == [0] + [ROWS] * (ROWS - 1)


def test_ranks_of_collapsed_embeddings_are_0(backend: str) -> None:
    query = draw(backend, torch.float32, rows=1)
    assert so.retrieval_ranks(query.expand(5, -1), query.expand(9, -1)).tolist() == [0] * 5
    assert so.retrieval_ranks(query, query).tolist() == [0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype: torch.dtype, backend: str) -> None:
    """Keys without a finite logit are never drawn; -1 is for queries that have no other."""
    query, key = (draw(backend, dtype, seed=seed) for seed in (1, 2))

    def drawn(q: Tensor, k: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
        found = []
        for seed in range(8):
            generator = torch.Generator(q.device).manual_seed(seed)
            found.append(so.sample_hard_negatives(q, k, temperature, generator=generator))
        return torch.stack(found)

    clean = drawn(query, key)
    for value in (NAN, INF, -INF):
        for place in (slice(None), 3):
            broken = query.clone()
            broken[2, place] = value
            found = drawn(broken, key)
            others = torch.arange(ROWS, device=query.device) != 2
            assert found[:, 2].eq(-1).all() and torch.equal(found[:, others], clean[:, others])
            broken = key.clone()
            broken[[1, 4], place] = value
            found = drawn(query, broken)
            assert not (found.eq(1) | found.eq(4)).any() and found.ge(0).all()
        assert drawn(query, torch.full_like(key, value)).eq(-1).all()
    for temperature in (NAN, INF, 0.0, -0.1):
        tensor = torch.tensor(temperature, device=query.device)
        assert drawn(query, key, tensor).eq(-1).all()
    assert drawn(query[:1], key[:1]).eq(-1).all()
    # All alike: each negative is drawn, a positive never.
    found = drawn(query[:1].expand(ROWS, -1), key[:1].expand(ROWS, -1))
    assert found.ge(0).all() and not found.eq(torch.arange(ROWS, device=query.device)).any()
    if dtype == torch.float32:
        assert drawn(1e20 * query, 1e20 * key).eq(-1).all()


def poison(x: Tensor, value: float, place: slice | int) -> Tensor:
    x = x.clone()
    x[2, place] = value
    return x


SPOILT: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda x: poison(x, NAN, slice(None)),
    "one_nan": lambda x: poison(x, NAN, 3),
    "inf": lambda x: poison(x, INF, slice(None)),
    "one_inf": lambda x: poison(x, INF, 3),
    "one_minus_inf": lambda x: poison(x, -INF, 3),
    "huge": lambda x: poison(x, NAN if x.dtype == torch.float16 else 1e20, 3),
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses(dtype: torch.dtype, symmetric: bool, backend: str) -> None:
    """Loss and all gradients are NaN: nothing finite comes of what is no number."""
    clean = [draw(backend, dtype, seed=seed) for seed in (1, 2)]
    ids = torch.arange(ROWS, device=clean[0].device) // 2

    def check(query: Tensor, key: Tensor, temperature: float, given: Tensor | None) -> None:
        leaves = [
            x.clone().requires_grad_()
            for x in (query, key, torch.tensor(temperature, device=query.device))
        ]
        loss = so.info_nce(*leaves, symmetric=symmetric, ids=given)
        loss.backward()
        assert loss.isnan() and all(x.grad.isnan().all() for x in leaves)  # type: ignore[union-attr]

    for given in (None, ids):
        for spoil in SPOILT.values():
            check(spoil(clean[0]), clean[1], 0.1, given)
            check(clean[0], spoil(clean[1]), 0.1, given)
        for temperature in (NAN, INF, 0.0, -0.1):
            check(clean[0], clean[1], temperature, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_of_pairs(dtype: torch.dtype, backend: str) -> None:
    """As above, and of a bias that is no number."""
    clean = [draw(backend, dtype, seed=seed) for seed in (1, 2)]
    ids = torch.arange(ROWS, device=clean[0].device) // 2

    def check(query: Tensor, key: Tensor, temperature: float, bias: float) -> None:
        for given in (None, ids):
            scalars = (torch.tensor(x, device=query.device) for x in (temperature, bias))
            leaves = [x.clone().requires_grad_() for x in (query, key, *scalars)]
            loss = so.sigmoid_nce(*leaves, ids=given)
            loss.backward()
            assert loss.isnan() and all(x.grad.isnan().all() for x in leaves)  # type: ignore[union-attr]

    for spoil in SPOILT.values():
        check(spoil(clean[0]), clean[1], 0.1, -2.0)
        check(clean[0], spoil(clean[1]), 0.1, -2.0)
    for temperature in (NAN, INF, 0.0, -0.1):
        check(*clean, temperature, -2.0)
    for bias in (NAN, INF, -INF, 1e20):
        check(*clean, 0.1, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["plain", "teacher", "ids"])
def test_losses_against_a_queue(mode: str, dtype: torch.dtype, backend: str) -> None:
    """As above; a row's gradient is its own, so what spoils one query leaves the others theirs."""
    inputs = {"query": ROWS, "key": ROWS, "queue": 9}
    options: dict[str, float | Tensor] = {}
    if mode == "teacher":
        inputs["teacher_query"], options["alpha"] = ROWS, 0.4
    given = {n: draw(backend, dtype, rows, seed) for seed, (n, rows) in enumerate(inputs.items())}
    device = given["query"].device
    if mode == "ids":
        options["query_ids"] = torch.arange(ROWS, device=device) // 2
        options["queue_ids"] = torch.arange(9, device=device)

    def run(temperature: float, **changed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaves = given | changed
        query = leaves.pop("query").clone().requires_grad_()
        scalar = torch.tensor(temperature, device=device, requires_grad=True)
        loss = so.queue_info_nce(query, temperature=scalar, **leaves, **options)  # type: ignore[arg-type]
        loss.backward()
        assert query.grad is not None and scalar.grad is not None
        return loss.detach(), query.grad, scalar.grad

    clean = run(0.1)
    assert all(x.isfinite().all() for x in clean)
    for spoil in SPOILT.values():
        for which in inputs:
            loss, grad, grad_temperature = run(0.1, **{which: spoil(given[which])})
            assert loss.isnan() and grad_temperature.isnan()
            if "query" in which:
                assert grad[2].isnan().all()
                others = torch.arange(ROWS, device=device) != 2
                assert torch.equal(grad[others], clean[1][others])
            else:
                assert grad.isnan().all()
    for temperature in (NAN, INF, 0.0, -0.1):
        assert all(x.isnan().all() for x in run(temperature))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("sparse", [True, False])
def test_attention_hides_nothing(
    sparse: bool, value: float, dtype: torch.dtype, backend: str
) -> None:
    """What attends it is not finite either, and where that is easily told, nothing else."""
    tokens, block = 33, 8
    inputs = [draw(backend, dtype, tokens, seed)[None, None] for seed in range(4)]
    mask = torch.eye(4, dtype=torch.bool, device=inputs[0].device)
    layout = so.BlockLayout.from_mask(mask, num_tokens=32, block_size=block, num_global=1)

    def run(*changed: Tensor) -> dict[str, Tensor]:
        q, k, v = (x.clone().requires_grad_() for x in changed)
        if sparse:
            out, saliency = so.block_sparse_attention(q, k, v, layout, return_saliency=True)
        else:
            out, saliency = so.cross_attention(q, k, v, return_saliency="mean")
        grads = torch.autograd.grad(out, (q, k, v), inputs[3])
        return dict(zip(("q", "k", "v"), grads, strict=True)) | {"out": out, "saliency": saliency}

    clean = run(*inputs[:3])
    of_block = torch.zeros(tokens, dtype=torch.bool, device=inputs[0].device)
    of_block[0] = of_block[9:17] = True  # the global token and block 1
    all_rows = torch.ones_like(of_block)
    attending = of_block if sparse else all_rows
    for which in range(3):
        for token in (0, 12):
            broken = list(inputs[:3])
            broken[which] = broken[which].clone()
            broken[which][:, :, token] = value
            found = run(*broken)
            rows = torch.arange(tokens, device=of_block.device) == token
            if which > 0:
                rows = all_rows if token == 0 else attending
            out = found["out"][0, 0]
            assert not out[rows].isfinite().any()
            if not (backend == "reference" and which == 2):  # dense: 0 times NaN
                assert torch.equal(out[~rows], clean["out"][0, 0, ~rows])
            if which < 2 and (token == 0 or which == 1 or not sparse):
                assert found["saliency"].isnan().all()
            # Gradients: of the queries that attend, and of the keys that are attended.
            assert which == 2 or found[("q", "k", "v")[which]][0, 0, token].isnan().all()
            if which == 0:
                keys = all_rows if token == 0 else attending
                assert found["k"][0, 0, keys].isnan().all() and found["v"][0, 0, keys].isnan().all()
            else:
                assert not found["q"][0, 0, rows].isfinite().any()

"""select_tokens and prune_tokens against full sorts and gathers, through every implementation."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import pytest
import torch

import svitt_ops as so
from svitt_ops.testing import poisoned

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem; a row is a program or less of an interpreted kernel, so these are small."""

    tokens: int = 111
    keep: int = 67
    num_global: int = 1
    dim: int = 64
    batch: int = 3
    scores: str = "normal"
    codes: str = ""  # "shared" or "per_sample"
    storage: str = "plain"  # "strided", "transposed", "expanded", "narrow"

    def __str__(self) -> str:
        changed = (f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case(), k))
        return "-".join(changed) or "default"


CASES = [
    Case(),
    Case(tokens=1, keep=1, dim=8, codes="shared"),
    Case(tokens=1, keep=1, num_global=0, dim=1),
    Case(tokens=55, keep=1, dim=5, scores="ties"),
    Case(tokens=55, keep=55, num_global=3, codes="per_sample"),
    Case(tokens=56, keep=55, scores="equal", codes="shared", dim=55),
    Case(tokens=57, keep=20, scores="special", num_global=0, codes="per_sample", storage="strided"),
    Case(tokens=57, keep=50, scores="special", storage="transposed"),
    Case(tokens=57, keep=30, scores="nan", batch=2, codes="shared", storage="expanded"),
    Case(tokens=57, keep=9, scores="subnormal", storage="narrow", dim=33),
    Case(tokens=385, keep=270, dim=768, batch=1, scores="ties", codes="shared"),
    Case(tokens=549, keep=385, dim=96, scores="ties", storage="strided"),
    Case(tokens=785, keep=550, dim=72, batch=2, codes="per_sample", scores="special"),
    Case(tokens=57, keep=40, dim=1001, batch=1),
    Case(tokens=3137, keep=1883, dim=40, batch=2, num_global=2, codes="per_sample"),
    Case(tokens=4099, keep=4098, dim=8, batch=1, scores="ties"),
    Case(tokens=9000, keep=2500, dim=3, batch=2, scores="special", codes="shared"),
    Case(batch=0, codes="shared"),
    Case(dim=0),
    Case(tokens=0, keep=0, num_global=2, codes="shared"),
    Case(tokens=0, keep=0, num_global=0),
    Case(batch=130, tokens=20, keep=7, dim=16, scores="ties", codes="per_sample"),  # one launch
]


def score(case: Case, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Scores with what makes selection hard, in the storage of the case."""
    shape = (case.batch, case.tokens)
    x = torch.randn(shape, generator=generator)
    if case.scores == "ties":
        x = (2 * x).round() / 2  # 0 and -0 among them
    elif case.scores == "equal":
        x = torch.full(shape, 0.25)
    elif case.scores in ("special", "nan"):
        kinds = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 65504.0, 1.0])
        kind = torch.randint(0, len(kinds) + 2, shape, generator=generator)
        x = torch.where(kind < len(kinds), kinds[kind.clamp(max=len(kinds) - 1)], x)
        x = torch.where(kind == len(kinds), -kinds[0], x)  # the other sign of NaN
        if case.scores == "nan":
            x = torch.full(shape, float("nan")).where(kind > 1, x)
    elif case.scores == "subnormal":
        tiny = torch.randint(-3, 4, shape, generator=generator)
        x = tiny * torch.tensor(torch.finfo(dtype).smallest_normal / 8, dtype=torch.float64)
    x = x.to(dtype)
    if case.storage == "transposed":
        return x.t().contiguous().t()
    if case.storage == "strided":
        return torch.stack([x, -x], 1)[:, 0]
    return x


def build(case: Case, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor | None]:
    """Arguments of `prune_tokens` and an upstream gradient, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(3)
    rows = case.num_global + case.tokens
    shape = (case.batch, rows, case.dim)
    scores = score(case, dtype, generator).to(device)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    if case.storage == "transposed":
        tokens = draw(rows, case.batch, case.dim).transpose(0, 1)
    elif case.storage == "strided":
        tokens = draw(case.batch, 2 * rows, case.dim)[:, ::2]
    elif case.storage == "expanded":
        tokens = draw(1, rows, case.dim).expand(shape)
    elif case.storage == "narrow":
        tokens = draw(case.batch, rows, case.dim + 3)[..., 2:-1]
    else:
        tokens = draw(*shape)
    assert tokens.shape == shape
    codes = None
    if case.codes:
        size = (case.tokens,) if case.codes == "shared" else (case.batch, case.tokens)
        codes = torch.randint(-(2**31), 2**31, size, generator=generator).int().to(device)
    upstream = draw(case.batch, case.num_global + case.keep, case.dim)
    return dict(tokens=tokens, scores=scores, codes=codes, upstream=upstream)


def results(
    function: object, given: dict[str, torch.Tensor | None], case: Case
) -> dict[str, torch.Tensor]:
    """What a function keeps, and the gradient of the tokens."""
    tokens, upstream = given["tokens"], given["upstream"]
    assert tokens is not None and upstream is not None and callable(function)
    leaf = tokens.detach().requires_grad_()
    kept = function(
        leaf,
        given["scores"],
        keep=case.keep,
        num_global=case.num_global,
        position_codes=given["codes"],
    )
    (grad,) = torch.autograd.grad(kept.tokens, leaf, upstream)
    found = dict(tokens=kept.tokens.detach(), indices=kept.indices, grad_tokens=grad)
    assert (kept.position_codes is None) == (given["codes"] is None)
    return found if kept.position_codes is None else found | dict(codes=kept.position_codes)


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_as_sort_and_gather(case: Case, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and case.batch > 100:
        pytest.skip("too slow to interpret")
    given = build(case, dtype, device_of(backend))
    expected = results(so.reference.prune_tokens, given, case)
    with poisoned():
        found = results(so.prune_tokens, given, case)
    assert found.keys() == expected.keys()
    for name, result in found.items():
        assert result.dtype == expected[name].dtype, name
        assert torch.equal(result, expected[name]), name
        assert result.is_contiguous(), name
    scores = given["scores"]
    assert isinstance(scores, torch.Tensor)
    assert torch.equal(so.select_tokens(scores, case.keep), expected["indices"])
    again = results(so.prune_tokens, given, case)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_the_reference_is_a_stable_descending_sort() -> None:
    scores = torch.tensor([[0.0, -0.0, 3.0, float("nan"), -float("inf"), 3.0, 0.0, float("nan")]])
    order = [2, 5, 0, 1, 6, 4, 3, 7]
    for select in (so.reference.select_tokens, so.select_tokens):
        for keep in range(1, 9):
            assert select(scores, keep).tolist() == [sorted(order[:keep])]
    ties = torch.randn(2, 785).bfloat16()
    kept = ties.sort(dim=1, descending=True, stable=True).indices[:, :549].sort(dim=1).values
    assert torch.equal(so.select_tokens(ties, 549), kept)


@given(data=st.data(), tokens=st.integers(1, 40))
def test_any_scores(data: st.DataObject, tokens: int) -> None:
    """Against a sort by Python of every 16-bit pattern and of fp32 with few distinct values."""
    dtype = data.draw(st.sampled_from(DTYPES))
    bits = 32 if dtype == torch.float32 else 16
    integer = torch.int32 if bits == 32 else torch.int16
    patterns = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    few = data.draw(st.lists(patterns, min_size=1, max_size=6))
    chosen = data.draw(st.lists(st.sampled_from(few), min_size=tokens, max_size=tokens))
    scores = torch.tensor([chosen], dtype=integer).view(dtype)
    keep = data.draw(st.integers(1, tokens))
    values = scores[0].double().tolist()

    def place(i: int) -> tuple[bool, float, int]:
        missing = values[i] != values[i]
        return missing, 0.0 if missing else -values[i], i

    order = sorted(range(tokens), key=place)
    if any(x != x for x in values):  # NaN does not order
        order = sorted(
            range(tokens), key=lambda i: (1, 0, i) if values[i] != values[i] else (0, -values[i], i)
        )
    assert so.select_tokens(scores, keep).tolist() == [sorted(order[:keep])]


def test_flushing_denormals_changes_nothing() -> None:
    scores = torch.arange(64, dtype=torch.int16).flip(0)[None]
    try:
        torch.set_flush_denormal(True)
        for dtype in (torch.bfloat16, torch.float16):
            assert so.select_tokens(scores.view(dtype), 9).tolist() == [list(range(9))]
        found = so.select_tokens(scores.int().view(torch.float32), 9)
        assert found.tolist() == [list(range(9))]
    finally:
        torch.set_flush_denormal(False)


def test_rows_are_copied_bit_for_bit(backend: str) -> None:
    tokens = torch.randn(2, 9, 16, device=device_of(backend))
    tokens[:, ::2] = float("nan")
    tokens[:, 1] = -0.0
    tokens.requires_grad_()
    scores = torch.arange(16.0, device=tokens.device).view(2, 8)
    kept = so.prune_tokens(tokens, scores, keep=5)
    expected = torch.cat([tokens[:, :1], tokens[:, 4:]], 1)
    assert torch.equal(kept.tokens.view(torch.int32), expected.view(torch.int32))
    upstream = torch.full_like(kept.tokens, float("inf"))
    (grad,) = torch.autograd.grad(kept.tokens, tokens, upstream)
    # What was dropped has the gradient 0, whatever the others have; never 0 * inf.
    assert not grad[:, 1:4].any() and bool(grad[:, 4:].isinf().all() and grad[:, 0].isinf().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    case = Case(tokens=3000, keep=1800, batch=7, dim=64, scores="ties", codes="per_sample")
    given = build(case, dtype, "cpu")
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(results(so.prune_tokens, given, case))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_large_results_are_written_whole() -> None:
    """Memory of large results is asked for in huge pages."""
    tokens = torch.ones(2, 4097, 1100, requires_grad=True)
    kept = so.prune_tokens(tokens, torch.rand(2, 4096), keep=4000)
    assert bool((kept.tokens == 1).all())
    kept.tokens.sum().backward()
    assert tokens.grad is not None and tokens.grad.sum() == kept.tokens.numel()


def test_triton_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples longer than a tile, and the copy in the launch of the selection."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton is not interpreted here")
    module = importlib.import_module("svitt_ops.kernels.token_pruning")
    case = Case(tokens=300, keep=170, scores="special", codes="per_sample", num_global=2)
    for dtype in DTYPES:
        given = build(case, dtype, "cpu")
        arguments = [given[name] for name in ("tokens", "scores")] + [case.keep, 2, given["codes"]]
        expected = module.prune_tokens(*arguments)
        for name, value in (("SELECT_TILE", 64), ("FUSED_BATCH", 1)):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, value)
                found = module.prune_tokens(*arguments)
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("rate", "tokens", "count"),
    [
        (0.7, 784, 549),
        (0.7, 549, 385),
        (0.7, 385, 270),
        (0.6, 1568, 941),
        (0.55, 100, 55),
        (0.1, 30, 3),
        (1, 7, 7),
        (1.0, 0, 0),
        (0.5, 1, 1),
        (1e-9, 10, 1),
    ],
)
def test_keep_count(rate: float, tokens: int, count: int) -> None:
    assert so.keep_count(rate, tokens) == count


@given(keep=st.integers(1, 5000), more=st.integers(0, 5000))
def test_keep_count_has_no_float_noise(keep: int, more: int) -> None:
    assert so.keep_count(keep / (keep + more), keep + more) == keep


def test_keep_rate_and_keep_agree() -> None:
    tokens, scores = torch.randn(2, 101, 4), torch.randn(2, 100)
    by_rate = so.prune_tokens(tokens, scores, keep_rate=0.55)
    by_count = so.prune_tokens(tokens, scores, keep=55)
    assert torch.equal(by_rate.tokens, by_count.tokens)
    assert by_rate.position_codes is None and isinstance(by_rate, so.PrunedTokens)

"""The Triton kernels against dense attention in fp64, on a GPU or through the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read when a kernel's module is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from svitt_ops.kernels import (  # noqa: E402
    block_layout,
    block_sparse_attention,
    block_sparse_attention_backward,
)
from svitt_ops.layout import BlockLayout  # noqa: E402
from svitt_ops.reference.block_sparse_attention import attend  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem; the defaults are small enough for the interpreter."""

    heads: int = 2
    tokens: int = 111
    block_size: int = 56
    num_global: int = 1
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    bias: str | None = None
    lengths: tuple[int, ...] | None = None
    layout: str = "random"
    packed: bool = False
    batch: int = 2
    tile: tuple[int, int] | None = None
    """Rows and columns other than the table's."""

    @property
    def seq_len(self) -> int:
        return self.num_global + self.tokens


def make(case: Case) -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments of `attend` and an upstream gradient, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.heads, case.seq_len, case.head_dim)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    blocks = -(-case.tokens // case.block_size)
    lead = {"per_head": (case.heads,), "per_sample": (case.batch, case.heads)}.get(case.layout, ())
    mask = torch.rand(*lead, blocks, blocks, generator=generator) < 0.5
    if case.layout == "full":
        mask.fill_(True)
    elif case.layout == "empty_rows" and blocks:
        mask[..., ::2, :] = False
        mask[..., :, 0] = False
    elif case.layout == "local_random":
        mask = torch.eye(blocks, dtype=torch.bool) | mask
    layout = BlockLayout.from_mask(
        mask, num_tokens=case.tokens, block_size=case.block_size, num_global=case.num_global
    ).to(DEVICE)
    if case.packed:
        # As a qkv projection leaves them: (batch, tokens, 3, heads, head_dim).
        packed = case.scale * draw(case.batch, case.seq_len, 3, case.heads, case.head_dim)
        qkv = packed.to(DEVICE, case.dtype).permute(2, 0, 3, 1, 4)
    else:
        qkv = (case.scale * draw(3, *shape)).to(DEVICE, case.dtype)
    table = codes = lengths = None
    if case.bias is not None:
        g, offsets = case.num_global, 41
        table = draw(offsets + 2 * g + g * g, case.heads).to(DEVICE)
        size = (case.batch if case.bias == "per_sample" else 1, case.tokens)
        codes = torch.randint(0, 21, size, generator=generator).int().to(DEVICE)
    if case.lengths is not None:
        lengths = torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE)
    arguments = dict(
        query=qkv[0], key=qkv[1], value=qkv[2], layout=layout, bias_table=table,
        position_codes=codes, key_lengths=lengths, scale=case.head_dim**-0.5,
    )  # fmt: skip
    return arguments, draw(*shape).to(DEVICE, case.dtype)


def dense(arguments: dict[str, Any], grad_out: torch.Tensor, compute: torch.dtype) -> list[Any]:
    """out, lse, saliency, dq, dk, dv, dtable of dense masked attention, every step in `compute`."""
    leaves = [arguments[name].to(compute) for name in ("query", "key", "value")]
    if arguments["bias_table"] is not None:
        leaves.append(arguments["bias_table"].to(torch.promote_types(compute, torch.float32)))
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    rest = {**arguments, "bias_table": leaves[3] if len(leaves) == 4 else None, "compute": compute}
    for name, leaf in zip(("query", "key", "value"), leaves, strict=False):
        rest[name] = leaf
    out, lse, saliency = attend(**rest)
    grads = torch.autograd.grad(out, leaves, grad_out.to(out.dtype), allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return [out.detach(), lse.detach(), saliency.detach(), *grads]


def run(arguments: dict[str, Any], grad_out: torch.Tensor) -> list[torch.Tensor]:
    """The same results from the launchers; saliency is asked for wherever it may be."""
    layout = arguments["layout"]
    lists = [
        x.reshape((1,) * (4 - dim) + x.shape).contiguous()
        for x, dim in (
            (layout.key_counts, layout.key_blocks.dim()),
            (layout.key_blocks, layout.key_blocks.dim()),
            (layout.query_counts, layout.query_blocks.dim()),
            (layout.query_blocks, layout.query_blocks.dim()),
        )
    ]
    inputs = [arguments[name] for name in ("query", "key", "value")]
    tail = [layout.block_size, layout.num_global] + [
        arguments[name] for name in ("bias_table", "position_codes", "key_lengths", "scale")
    ]
    out, lse, saliency = block_sparse_attention.block_sparse_attention(
        *inputs, *lists, *tail, layout.num_global > 0
    )
    grads = block_sparse_attention_backward.block_sparse_attention_backward(
        grad_out, *inputs, out, lse, *lists, *tail
    )
    return [out, lse, saliency, *grads]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element nobody writes shows."""

    def poison(make_tensor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = make_tensor(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else 77)

        return wrapped

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


CASES = {
    "svitt": Case(layout="local_random", tokens=230, heads=1),
    "svitt_half": Case(
        layout="local_random", tokens=230, heads=1, dtype=torch.float16, bias="shared"
    ),
    "no_global": Case(num_global=0, layout="per_sample"),
    "three_globals": Case(num_global=3, bias="per_sample", layout="per_head"),
    "one_token": Case(tokens=1),
    "no_token": Case(tokens=0, num_global=3),
    "nothing": Case(tokens=0, num_global=0),
    "tokens_55": Case(tokens=55, bias="shared", packed=True),
    "tokens_56": Case(tokens=56, packed=True),
    "tokens_57": Case(tokens=57, dtype=torch.float16, layout="full"),
    "dim_8": Case(head_dim=8, bias="shared"),
    "dim_20": Case(head_dim=20, dtype=torch.float16),
    "dim_80": Case(head_dim=80, packed=True, batch=1),
    "dim_128": Case(head_dim=128, dtype=torch.float16, batch=1),
    "dim_256": Case(head_dim=256, tokens=57, batch=1),
    "block_1": Case(block_size=1, tokens=9, bias="shared", num_global=3),
    "block_7": Case(block_size=7, tokens=55, layout="per_head", batch=1),
    "block_16": Case(block_size=16, tokens=57, num_global=3, dtype=torch.float16, bias="shared"),
    "block_64": Case(block_size=64, tokens=150, bias="shared", batch=1, layout="full"),
    "block_100": Case(block_size=100, tokens=230, num_global=3, heads=1, bias="shared"),
    "many_globals": Case(num_global=70, tokens=57, bias="shared", batch=1),
    "empty_rows": Case(layout="empty_rows", num_global=0, tokens=230, heads=1, bias="shared"),
    "empty_rows_global": Case(layout="empty_rows", tokens=230, heads=1),
    "lengths": Case(lengths=(0, 1, 75, 200), batch=4, heads=1, bias="per_sample"),
    "lengths_no_global": Case(lengths=(0, 57), num_global=0, bias="shared"),
    "lengths_globals": Case(lengths=(2, 5), num_global=3, dtype=torch.float16),
    "scale_4": Case(scale=4.0, dtype=torch.float16, layout="full", bias="shared"),
    "scale_16": Case(scale=16.0, dtype=torch.float16),
    "scale_16_single": Case(scale=16.0, bias="shared"),
}
# Every way to walk: parts of a block or several blocks a step; the globals beside or before them.
SMALL = Case(head_dim=16, heads=1, batch=1, tokens=60)
CASES |= {
    f"{name}_of_{columns}": replace(case, tile=(rows, columns))
    for name, rows, columns, case in (
        ("parts", 16, 16, replace(SMALL, block_size=20, num_global=3, bias="shared")),
        ("parts_alone", 16, 16, replace(SMALL, block_size=33, num_global=0)),
        ("parts_led", 32, 16, replace(SMALL, block_size=32, num_global=2, bias="shared")),
        ("parts_lack", 16, 16, replace(SMALL, block_size=28, layout="empty_rows")),
        ("parts_biased", 16, 16, replace(
            SMALL, block_size=28, layout="empty_rows", batch=2, lengths=(3, 50), bias="per_sample",
        )),
        ("parts_led_biased", 32, 16, replace(SMALL, block_size=32, bias="shared")),
        ("blocks", 16, 32, replace(SMALL, block_size=7, tokens=40, num_global=3, bias="shared")),
        ("blocks", 16, 128, replace(SMALL, block_size=28, tokens=80, dtype=torch.float16)),
        ("blocks_led", 16, 32, replace(SMALL, block_size=16, num_global=9)),
        ("blocks_lack", 16, 64, replace(SMALL, block_size=20, layout="empty_rows")),
        ("blocks_ragged", 16, 64, replace(
            SMALL, block_size=16, tokens=45, num_global=2, batch=2, lengths=(1, 21),
            layout="per_sample", bias="per_sample",
        )),
        ("parts_ragged", 16, 16, replace(
            SMALL, block_size=28, num_global=3, batch=2, lengths=(2, 50),
            layout="per_sample", bias="per_sample",
        )),
    )
}  # fmt: skip
NAMES = ("out", "lse", "saliency", "grad_query", "grad_key", "grad_value", "grad_bias_table")


@pytest.mark.parametrize("name", CASES)
def test_matches_dense_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    if case.tile is not None:
        rows, columns = case.tile
        table = block_sparse_attention.attention_tile
        for module in (block_sparse_attention, block_sparse_attention_backward):
            monkeypatch.setattr(
                module, "attention_tile", lambda *x: replace(table(*x), rows=rows, columns=columns)
            )
    arguments, grad_out = make(case)
    if case.lengths is not None:
        # Tokens that do not exist hold anything.
        for i, length in enumerate(case.lengths):
            for x in (arguments["query"], arguments["key"], arguments["value"], grad_out):
                x[i, :, length:] = 0
    exact = dense(arguments, grad_out, torch.float64)
    plain = dense(arguments, grad_out, case.dtype)
    if case.lengths is not None:
        for i, length in enumerate(case.lengths):
            for x in (arguments["query"], arguments["key"], arguments["value"], grad_out):
                x[i, :, length:] = float("nan")
    got = run(arguments, grad_out)
    # Sums of many products that cancel: dense softmax has exact zeros where a row has a single key.
    floor = 4 * torch.finfo(case.dtype).eps + 32 * torch.finfo(torch.float32).eps
    for what, ours, best, usual in zip(NAMES, got, exact, plain, strict=False):
        assert ours.shape == best.shape, what
        finite = best.isfinite()
        assert torch.equal(ours[~finite].double(), best[~finite]), what
        ours, best, usual = ours[finite].double(), best[finite], usual[finite].double()
        if best.numel() == 0:
            continue
        assert ours.isfinite().all(), what
        budget = 2 * (usual - best).abs().max() + floor * best.abs().max()
        error = (ours - best).abs().max()
        assert error <= budget, f"{what}: error {error:.3e}, budget {budget:.3e}"


@pytest.mark.parametrize("block_size", [20, 56])
@pytest.mark.parametrize("num_global", [0, 1])
def test_a_nan_reaches_the_rows_that_see_it(num_global: int, block_size: int) -> None:
    """Columns that do not exist read tokens that do, which these rows see anyway."""
    length = num_global + 2 * block_size + 4
    case = replace(
        SMALL,
        num_global=num_global, block_size=block_size, layout="local_random", lengths=(length,),
        tokens=2 * block_size + 8,
    )  # fmt: skip
    for place in (block_size - 1, block_size, 2 * block_size - 1, 2 * block_size + 3):
        arguments, grad_out = make(case)
        arguments["value"][0, 0, num_global + place] = float("nan")
        rows = torch.arange(length)
        blocks = (rows - num_global) // block_size
        mask = arguments["layout"].to_mask().cpu()
        assert not mask.all()
        seen = (rows < num_global) | mask[blocks, place // block_size]
        out = run(arguments, grad_out)[0][0, 0, :length].cpu()
        assert torch.equal(out.isnan().all(1), seen)
        assert torch.equal(out.isnan().any(1), seen)


def test_wide_offsets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, grad_out = make(CASES["three_globals"])
    narrow = run(arguments, grad_out)
    for module in (block_sparse_attention, block_sparse_attention_backward):
        monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
    for first, second in zip(narrow, run(arguments, grad_out), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("which", "scale"), [("query", 0.25), ("key", 0.0)])
def test_infinities_show(which: str, scale: float) -> None:
    arguments, grad_out = make(replace(SMALL, tokens=9, block_size=4, layout="full"))
    arguments["key"].abs_().neg_()  # all logits of an infinite query are -inf
    arguments[which][0, 0, 2, 1] = float("inf")
    arguments["scale"] = scale
    exact, got = dense(arguments, grad_out, torch.float64), run(arguments, grad_out)
    assert exact[0].isnan().any()
    for k in (0, 3):
        assert not got[k][exact[k].isnan()].isfinite().any(), NAMES[k]


def test_reads_no_list_of_no_blocks() -> None:
    arguments, grad_out = make(CASES["no_token"])
    sizes = (0, 56, 3)
    counts, lists = (torch.empty(size, dtype=torch.int32, device=DEVICE) for size in ((0,), (0, 5)))
    wide = {**arguments, "layout": BlockLayout(*sizes, counts, lists, counts, lists)}
    for first, second in zip(run(arguments, grad_out), run(wide, grad_out), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("num_global", [0, 1, 2])
def test_only_differences_of_codes_count(num_global: int) -> None:
    arguments, grad_out = make(replace(SMALL, num_global=num_global, bias="shared"))
    wanted = run(arguments, grad_out)
    for offset in (2**31 - 21, -(2**31)):
        moved = arguments | {"position_codes": arguments["position_codes"] + offset}
        for first, second in zip(wanted, run(moved, grad_out), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("num_global", [0, 1, 2])
def test_codes_too_far_apart_read_the_table(num_global: int) -> None:
    arguments, grad_out = make(replace(SMALL, num_global=num_global, bias="shared"))
    arguments["bias_table"].fill_(0.5)
    wanted = run(arguments, grad_out)
    arguments["position_codes"][:, ::2] = -(2**31)
    arguments["position_codes"][:, 1::3] = 2**31 - 1
    for first, second in zip(wanted[:-1], run(arguments, grad_out), strict=False):
        assert torch.equal(first, second)


def test_reads_no_code_of_no_token() -> None:
    arguments, grad_out = make(Case(tokens=0, bias="shared"))
    for ours, exact in zip(
        run(arguments, grad_out), dense(arguments, grad_out, torch.float64), strict=False
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_global", [0, 1, 2])
def test_keys_that_do_not_exist_add_nothing_to_the_table(num_global: int) -> None:
    """Their logits are 0, and those of the other keys here so far below that 2^128 is too small."""
    case = replace(
        SMALL, num_global=num_global, tokens=21, block_size=20, layout="full", bias="shared"
    )
    arguments, grad_out = make(case)
    arguments["query"].fill_(8)
    arguments["key"].mul_(0.05).sub_(8)
    exact, got = dense(arguments, grad_out, torch.float64)[-1], run(arguments, grad_out)[-1]
    assert (got - exact).abs().max() < 1e-4 * exact.abs().max()


def test_a_global_that_attends_to_itself_keeps_the_gradient_of_its_bias() -> None:
    """Its contributions add up to 0 only as far as its rounded output is right."""
    case = replace(SMALL, tokens=111, layout="full", bias="shared", dtype=torch.float16)
    arguments, grad_out = make(case)
    arguments["bias_table"][-1] += 9
    exact = dense(arguments, grad_out, torch.float64)[-1][-3]
    usual = dense(arguments, grad_out, case.dtype)[-1][-3]
    got = run(arguments, grad_out)[-1][-3]
    assert (got - exact).abs().max() <= 2 * (usual - exact).abs().max()


@pytest.mark.parametrize("name", ["svitt_half", "three_globals", "block_100"])
def test_rerun_is_bitwise_equal(name: str) -> None:
    """What runs at once decides nothing; interpreted programs run one by one, and few will do."""
    case = CASES[name]
    arguments, grad_out = make(case if DEVICE == "cuda" else replace(case, batch=1))
    for first, second in zip(run(arguments, grad_out), run(arguments, grad_out), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("lead", "blocks", "num_local", "num_random", "levels"),
    [
        ((), 14, 1, 3, 0),
        ((), 1, 1, 3, 0),
        ((), 0, 1, 3, 0),
        ((2, 3), 5, 3, 1, 0),
        ((3,), 7, 2, 0, 0),
        ((), 9, 0, 4, 3),
        ((2,), 33, 4, 5, 4),
        ((), 6, 0, 0, 0),
        ((), 6, 9, 2, 0),
        ((), 10, 3, 20, 2),
    ],
)
def test_draws_the_largest_noise(
    lead: tuple[int, ...], blocks: int, num_local: int, num_random: int, levels: int
) -> None:
    noise = torch.rand(*lead, blocks, blocks, generator=torch.Generator().manual_seed(1))
    if levels:
        # Few distinct values, zero among them: ties decide.
        noise = (noise * levels).floor() / levels
    got = block_layout.draw_block_layout(noise.to(DEVICE), num_local, num_random)
    mask = torch.zeros(*lead, blocks, blocks, dtype=torch.bool)
    flat_noise, flat_mask = (
        noise.flatten(0, -3) if lead else noise[None],
        mask.flatten(0, -3) if lead else mask[None],
    )
    for draw, row in ((a, b) for a in range(len(flat_noise)) for b in range(blocks)):
        window = range(row - num_local // 2, row + (num_local - 1) // 2 + 1)
        local = {number % blocks for number in window}
        others = sorted(set(range(blocks)) - local, key=lambda n: (-flat_noise[draw, row, n], n))
        flat_mask[draw, row, sorted(local) + others[:num_random]] = True
    width = min(num_local + num_random, blocks)
    for relation, counts, lists, columns in (
        (mask, got[0], got[1], width),
        (mask.mT, got[2], got[3], blocks),
    ):
        assert counts.dtype == lists.dtype == torch.int32
        assert torch.equal(counts.cpu(), relation.sum(-1).int())
        assert lists.shape == (*lead, blocks, columns)
        number = torch.arange(blocks).expand(relation.shape)
        ascending = number.masked_fill(~relation, blocks).sort(-1).values[..., :columns]
        assert torch.equal(lists.cpu(), ascending.masked_fill(ascending == blocks, 0).int())

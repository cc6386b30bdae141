"""Differentiation other than by `backward`: the same gradient, or an error that names the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import svitt_ops as so
from svitt_ops.testing import Backend

LAYOUT = so.BlockLayout.local_random(
    20, block_size=4, num_random=1, generator=torch.Generator().manual_seed(5)
)
CODES = so.position_codes((1, 4, 5))
IDS = torch.tensor([0, 1, 1, 2])
SCORES = torch.randn(2, 8, generator=torch.Generator().manual_seed(6))
DIFFERENTIABLE = (
    "block_sparse_attention",
    "cross_attention",
    "info_nce",
    "queue_info_nce",
    "sigmoid_nce",
    "prune_tokens",
)


def case(op: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A scalar function through an op, and its arguments; the function depends on them all."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = torch.randn(3, 2, 2, 21, 8, generator=generator)
    a, b, c = (F.normalize(x, dim=1) for x in torch.randn(3, 4, 6, generator=generator))
    table = torch.randn(7 * 9 + 3, 2, generator=generator)
    temperature = torch.tensor(0.2)

    def sparse(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        out = so.block_sparse_attention(q, k, v, LAYOUT, bias_table=table, position_codes=CODES)
        assert isinstance(out, Tensor)
        return out.sin().sum()

    def cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = so.cross_attention(q, k, v, return_saliency="mean")
        return out.sin().sum()

    def queue(q: Tensor, temperature: Tensor) -> Tensor:
        return so.queue_info_nce(q, b, c, temperature, teacher_query=a, alpha=0.3)

    found: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "block_sparse_attention": (sparse, (q, k, v, table)),
        "cross_attention": (cross, (q[:, :, :5], k, v)),
        "info_nce": (lambda q, k, t: so.info_nce(q, k, t, ids=IDS), (a, b, temperature)),
        "queue_info_nce": (queue, (a, temperature)),
        "sigmoid_nce": (
            lambda q, k, t, b: so.sigmoid_nce(q, k, t, b, ids=IDS),
            (a, b, temperature, torch.tensor(-1.5)),
        ),
        "prune_tokens": (
            lambda x: so.prune_tokens(x, SCORES, keep=3).tokens.sin().sum(),
            (torch.randn(2, 9, 4, generator=generator),),
        ),
    }
    return found[op]


def backward(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients as `backward` gives them."""
    leaves = [x.detach().clone().requires_grad_() for x in args]
    return torch.autograd.grad(function(*leaves), leaves)


every_op = pytest.mark.parametrize("op", DIFFERENTIABLE)


def all_equal(found: Any, wanted: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@every_op
def test_gradients_are_those_of_backward(op: str) -> None:
    function, args = case(op)
    wanted, numbers = backward(function, args), tuple(range(len(args)))
    assert all_equal(grad(function, numbers)(*args), wanted)
    assert all_equal(jacrev(function, numbers)(*args), wanted)
    assert all_equal(vjp(function, *args)[1](torch.ones(())), wanted)
    leaves = tuple(x.clone().requires_grad_() for x in args)
    with torch.no_grad():
        assert all_equal(grad(function, numbers)(*leaves), wanted)
    for vectorize in (False, True):
        found = torch.autograd.functional.jacobian(function, args, vectorize=vectorize)
        assert all_equal(found, wanted)
    twice = torch.autograd.grad(
        function(*leaves), leaves, torch.tensor([1.0, 2.0]), is_grads_batched=True
    )
    assert all_equal([x[0] for x in twice], wanted)
    for number in numbers:  # of one argument alone
        assert torch.equal(grad(function, number)(*args), wanted[number])
        single = [x.clone().requires_grad_(i == number) for i, x in enumerate(args)]
        assert torch.equal(
            torch.autograd.grad(function(*single), single[number])[0], wanted[number]
        )


@pytest.mark.parametrize("op", ["block_sparse_attention", "cross_attention", "prune_tokens"])
def test_jacobian_of_many_outputs(op: str) -> None:
    layout = so.BlockLayout.local_random(8, block_size=4)
    scores = torch.arange(8.0).view(1, 8)
    ops: dict[str, Callable[[Tensor], Any]] = {
        "block_sparse_attention": lambda x: so.block_sparse_attention(x, x, x, layout),
        "cross_attention": lambda x: so.cross_attention(x, x, x),
        "prune_tokens": lambda x: so.prune_tokens(x[0], scores, keep=3).tokens,
    }
    x = torch.randn(1, 1, 9, 8)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacrev(ops[op])(x), jacobian(ops[op], x))


@every_op
def test_a_map_is_a_loop(op: str) -> None:
    function, args = case(op)
    numbers = tuple(range(len(args)))
    samples = [args, tuple(0.9 * x for x in args), tuple(1.1 * x for x in args)]
    stacked = tuple(torch.stack(x) for x in zip(*samples, strict=True))
    torch.testing.assert_close(
        vmap(function)(*stacked), torch.stack([function(*x) for x in samples])
    )
    wanted = [torch.stack(x) for x in zip(*(backward(function, x) for x in samples), strict=True)]
    for found in (
        vmap(grad(function, numbers))(*stacked),
        grad(lambda *x: vmap(function)(*x).sum(), numbers)(*stacked),
        [x[0] for x in vmap(vmap(grad(function, numbers)))(*(x[None] for x in stacked))],
    ):
        torch.testing.assert_close(found, type(found)(wanted), rtol=1e-5, atol=1e-4)
    # One argument alone has samples, in its second dimension.
    moved = stacked[0].movedim(0, 1)
    found = vmap(function, in_dims=(1, *(None,) * (len(args) - 1)))(moved, *args[1:])
    torch.testing.assert_close(found, torch.stack([function(x[0], *args[1:]) for x in samples]))
    with pytest.raises(NotImplementedError, match=f"{op}: vmap over no samples"):
        vmap(function)(*(x[:0] for x in stacked))


def test_every_implementation_maps(backend: Backend) -> None:
    function, (query, *rest) = case("cross_attention")
    queries = torch.stack([query, -query])
    found = vmap(grad(function), in_dims=(0, None, None))(queries, *rest)
    wanted = torch.stack([backward(function, (q, *rest))[0] for q in queries])
    torch.testing.assert_close(found, wanted)


def test_maps_of_what_has_no_gradient() -> None:
    rows = torch.randn(3, 5, 6)
    uniform = vmap(lambda x: so.sample_hard_negatives(x, x, 0.1), randomness="different")(rows)
    assert uniform.shape == (3, 5) and bool((uniform != torch.arange(5)).all())
    found = vmap(lambda x: so.retrieval_ranks(x, rows[0]))(rows)
    assert torch.equal(found, torch.stack([so.retrieval_ranks(x, rows[0]) for x in rows]))
    found = vmap(lambda x: so.select_tokens(x, 2))(rows)
    assert torch.equal(found, torch.stack([so.select_tokens(x, 2) for x in rows]))


def test_layouts_and_codes_are_mapped_too() -> None:
    layouts = [so.BlockLayout.local_random(20, block_size=4, num_random=1) for _ in range(3)]
    layout = pytree.tree_map(lambda *x: torch.stack(x), *layouts)
    (q, k, v, table), codes = case("block_sparse_attention")[1], torch.stack([CODES, CODES.flip(0)])

    def run(layout: so.BlockLayout, codes: Tensor) -> Any:
        return so.block_sparse_attention(
            q, k, v, layout, bias_table=table, position_codes=codes, return_saliency=True
        )

    found = vmap(run, in_dims=(0, None))(layout, CODES)
    wanted = zip(*(run(x, CODES) for x in layouts), strict=True)
    assert all_equal(found, [torch.stack(x) for x in wanted])
    found = vmap(run, in_dims=(None, 0))(LAYOUT, codes)
    assert all_equal([x[1] for x in found], run(LAYOUT, codes[1]))
    drawn = vmap(lambda _: so.BlockLayout.local_random(20, block_size=4), randomness="different")
    assert drawn(torch.zeros(3)).key_blocks.shape[0] == 3


def tangent(function: Callable[..., Tensor], x: Tensor, requires_grad: bool) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x.clone().requires_grad_(requires_grad), x))


def twice(function: Callable[..., Tensor], x: Tensor) -> None:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    torch.autograd.grad(first.square().sum(), x)


AUTOGRAD = torch.autograd.functional
FORWARD_MODE: dict[str, Callable[[Callable[..., Tensor], Tensor], Any]] = {
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "jvp of grad": lambda f, x: jvp(grad(f), (x,), (x,)),
    "grad of jvp": lambda f, x: grad(lambda y: jvp(f, (y,), (y,))[1])(x),
    "vmap of jvp": lambda f, x: vmap(lambda y: jvp(f, (y,), (y,)))(x[None]),
    "hessian": lambda f, x: hessian(f)(x),
    "dual": lambda f, x: tangent(f, x, False),
    "dual with a gradient": lambda f, x: tangent(f, x, True),
    "dual without": lambda f, x: torch.no_grad()(tangent)(f, x, False),
    "jacobian": lambda f, x: AUTOGRAD.jacobian(f, x, strategy="forward-mode", vectorize=True),
}
SECOND: dict[str, Callable[[Callable[..., Tensor], Tensor], Any]] = {
    "create_graph": twice,
    "grad of grad": lambda f, x: grad(lambda y: grad(f)(y).square().sum())(x),
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(f))(x),
    "hessian": AUTOGRAD.hessian,
    "hvp": lambda f, x: AUTOGRAD.hvp(f, x, x),
}


def of_each_argument(op: str) -> list[tuple[Callable[..., Tensor], Tensor]]:
    """The function of `case` as one of each argument alone."""
    function, args = case(op)
    return [
        (lambda x, i=i: function(*args[:i], x, *args[i + 1 :]), args[i]) for i in range(len(args))
    ]


@every_op
def test_forward_mode_is_refused(op: str) -> None:
    message = f"^{op}: a forward-mode derivative .jvp. is not available$"
    for function, x in of_each_argument(op):
        for run in FORWARD_MODE.values():
            with pytest.raises(NotImplementedError, match=message):
                run(function, x)
        with forward_ad.dual_level():  # no tangent is no error
            function(x)


@every_op
def test_second_derivatives_are_refused(op: str) -> None:
    message = f"^{op}: a second derivative is not available, there is no double backward$"
    for function, x in of_each_argument(op):
        for run in SECOND.values():
            with pytest.raises(NotImplementedError, match=message):
                run(function, x)


@every_op
def test_autograd_keeps_its_promises(op: str) -> None:
    function, args = case(op)
    wanted = backward(function, args)
    leaves = [x.clone().requires_grad_() for x in args]
    out = function(*leaves)
    for _ in range(2):
        assert all_equal(torch.autograd.grad(out, leaves, retain_graph=True), wanted)
    torch.autograd.grad(out, leaves)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(out, leaves)
    for reentrant in (False, True):
        out = checkpoint(function, *leaves, use_reentrant=reentrant)
        for x in leaves:
            x.grad = None
        out.backward()
        assert all_equal([x.grad for x in leaves], wanted)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy().copy(), torch.from_numpy):
        out = function(*leaves)
    assert all_equal(torch.autograd.grad(out, leaves), wanted)
    with torch.no_grad():
        assert not function(*leaves).requires_grad
    with torch.inference_mode():
        assert function(*leaves).is_inference()


@pytest.mark.parametrize("op", ["block_sparse_attention", "cross_attention", "info_nce"])
def test_saved_inputs_must_not_change(op: str) -> None:
    function, args = case(op)
    for number in range(len(args)):
        inputs = [x.clone().requires_grad_() * 1 for x in args]
        out = function(*inputs)
        with torch.no_grad():
            inputs[number].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_upstream_gradients_of_any_strides() -> None:
    q = torch.randn(2, 2, 21, 8, requires_grad=True)
    upstream = (
        torch.randn(8, 21, 2, 2).permute(3, 2, 1, 0),
        torch.randn(2, 2, 21, 16)[..., ::2],
        torch.ones(()).expand(2, 2, 21, 8),
        torch.randn(2, 2, 21, 1).expand(2, 2, 21, 8),
    )
    for out in (so.cross_attention(q, q, q), so.block_sparse_attention(q, q, q, LAYOUT)):
        for given in upstream:
            found, wanted = (
                torch.autograd.grad(out, q, x, retain_graph=True)[0]
                for x in (given, given.contiguous())
            )
            assert torch.equal(found, wanted)


def test_what_inference_mode_made_can_be_trained_with() -> None:
    q = torch.randn(2, 2, 21, 8, requires_grad=True)
    e = F.normalize(torch.randn(4, 6), dim=1).requires_grad_()
    table = torch.randn(7 * 9 + 3, 2, requires_grad=True)

    def run(made: dict[str, Any]) -> list[Tensor]:
        sparse = so.block_sparse_attention(
            q,
            made["keys"],
            q,
            made["layout"],
            bias_table=table,
            position_codes=made["codes"],
            key_lengths=made["lengths"],
        )
        cross = so.cross_attention(q, made["keys"], q, key_padding_mask=made["mask"])
        dense = so.info_nce(e, e, made["temperature"], ids=made["ids"])
        queue = so.queue_info_nce(
            e, e, made["queue"], made["temperature"], query_ids=made["ids"], queue_ids=made["ids"]
        )
        assert isinstance(sparse, Tensor) and isinstance(cross, Tensor)
        total = sparse.square().sum() + cross.square().sum() + dense + queue
        return list(torch.autograd.grad(total, (q, e, table)))

    def make() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(3)
        return {
            "keys": torch.randn(2, 2, 21, 8, generator=generator),
            "layout": so.BlockLayout.local_random(20, block_size=4, generator=generator),
            "codes": so.position_codes((1, 4, 5)),
            "lengths": torch.tensor([21, 9], dtype=torch.int32),
            "mask": torch.arange(21).expand(2, 21) > 15,
            "ids": torch.tensor([0, 0, 1, 2]),
            "temperature": torch.tensor(0.2),
            "queue": torch.randn(4, 6, generator=generator),
        }

    with torch.inference_mode():
        made = make()
    assert made["layout"].key_blocks.is_inference()
    assert all_equal(run(made), run(make()))


class Block(torch.nn.Module):
    """All modules, in one."""

    def __init__(self) -> None:
        super().__init__()
        bias = so.nn.RelativePositionBias3D((1, 4, 5), 2, std=0.5)
        self.layout = LAYOUT
        self.attention = so.nn.BlockSparseSelfAttention(16, 2, bias=bias)
        self.prune = so.nn.TokenPruning(0.5)
        self.cross = so.nn.CrossAttention(16, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        attended, saliency = self.attention(tokens, self.layout, return_saliency=True)
        out: Tensor = self.cross(tokens, self.prune(attended, saliency).tokens)
        return out.square().mean()


def test_functional_call_of_modules() -> None:
    torch.manual_seed(0)
    module, tokens = Block(), torch.randn(3, 21, 16)
    parameters = dict(module.named_parameters())
    names, leaves = list(parameters), list(parameters.values())

    def loss(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        found: Tensor = functional_call(module, parameters, (tokens,))
        return found

    found = grad(loss)(parameters, tokens)
    for name, wanted in zip(names, torch.autograd.grad(module(tokens), leaves), strict=True):
        assert torch.equal(found[name], wanted)
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, tokens[:, None])
    for i in range(3):
        wanted_of_one = torch.autograd.grad(module(tokens[i : i + 1]), leaves)
        for name, wanted in zip(names, wanted_of_one, strict=True):
            torch.testing.assert_close(each[name][i], wanted)


def test_tensors_that_outlive_their_transform() -> None:
    kept: list[Tensor] = []
    q = torch.randn(1, 2, 5, 8)

    def leak(x: Tensor) -> Tensor:
        kept.append(2 * x)
        out = so.cross_attention(x, x, x)
        assert isinstance(out, Tensor)
        return out.sum()

    grad(leak)(q)
    key = q.clone().requires_grad_()
    found, wanted = (
        torch.autograd.grad(so.cross_attention(x, key, q).sum(), key)[0] for x in (kept[0], 2 * q)
    )
    assert torch.equal(found, wanted)

"""Every public op and module under `torch.compile`, and in `torch.export` programs that are kept.

The backend "aot_eager" traces all that a compiler would; the code that it writes is not the matter.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

import svitt_ops as so
from svitt_ops.randomness import SeededGenerator

ways = pytest.mark.parametrize("dynamic", [None, True, False])


def compiled(function: Any, dynamic: bool | None = None) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)


@ways
def test_layouts_of_changing_lengths(dynamic: bool | None) -> None:
    """The draw itself is in the graph, and the bias of a module goes with it."""
    bias = so.nn.RelativePositionBias3D((1, 5, 8), 2, std=0.5)
    module = so.nn.BlockSparseSelfAttention(16, 2, bias=bias)

    def run(tokens: Tensor, codes: Tensor) -> Any:
        layout = so.BlockLayout.local_random(tokens.shape[1] - 1, block_size=4, num_random=1)
        return module(tokens, layout, codes=codes, return_saliency=True), layout

    function = compiled(run, dynamic)
    for batch, count in ((2, 20), (3, 32), (2, 40)):
        tokens, codes = torch.randn(batch, count + 1, 16), so.position_codes((1, 5, 8))[:count]
        with torch.set_grad_enabled(dynamic is True):  # tracing the backward too takes long
            found, layout = function(tokens, codes)
        assert isinstance(layout, so.BlockLayout) and layout.num_tokens == count
        assert layout.key_counts.tolist() == [2] * (count // 4)
        wanted = module(tokens, layout, codes=codes, return_saliency=True)
        torch.testing.assert_close(found, wanted)
        if dynamic:
            gradients = (torch.autograd.grad(x[0].sum(), bias.table) for x in (found, wanted))
            torch.testing.assert_close(*gradients)


@ways
def test_modules(dynamic: bool | None) -> None:
    bias = so.nn.RelativePositionBias3D((1, 4, 5), 2, std=0.5)
    attention = so.nn.BlockSparseSelfAttention(16, 2, bias=bias)
    cross, prune = so.nn.CrossAttention(16, 2), so.nn.TokenPruning(0.55)
    layout = so.BlockLayout.local_random(20, block_size=4)

    def run(tokens: Tensor, lengths: Tensor, context: Tensor, ignored: Tensor) -> Any:
        out, saliency = attention(tokens, layout, key_lengths=lengths, return_saliency=True)
        kept = prune(out, saliency, position_codes=bias.codes)
        seen = cross(kept.tokens, context, key_padding_mask=ignored, return_saliency="mean")
        return seen, kept.indices, kept.position_codes

    function = compiled(run, dynamic)
    for batch, keys in ((2, 9), (3, 9), (5, 12)):
        lengths = torch.full((batch,), 17, dtype=torch.int32)
        ignored = torch.arange(keys).expand(batch, keys) > 6
        args = (torch.randn(batch, 21, 16), lengths, torch.randn(batch, keys, 16), ignored)
        with torch.set_grad_enabled(dynamic is True):  # tracing the backward too takes long
            torch.testing.assert_close(function(*args), run(*args))


@ways
def test_losses_and_searches(dynamic: bool | None) -> None:
    def run(q: Tensor, k: Tensor, t: Tensor, ids: Tensor, share: float) -> Any:
        loss = so.info_nce(q, k, t, ids=ids, label_smoothing=share)
        loss = loss + so.queue_info_nce(
            q, k, k, t, teacher_query=k, alpha=share, query_ids=ids, queue_ids=ids
        )
        loss = loss + so.sigmoid_nce(q, k, t, share, ids=ids)
        negatives = so.sample_hard_negatives(q, k, t, ids=ids)
        return loss, so.retrieval_ranks(q, k, query_ids=ids, key_ids=ids), negatives

    function = compiled(run, dynamic)
    for rows, dim, share in ((5, 8, 0.1), (6, 8, 0.2), (9, 16, 0.3)):
        q, k = (F.normalize(torch.randn(rows, dim), dim=1).requires_grad_() for _ in range(2))
        t, ids = torch.tensor(0.1, requires_grad=True), torch.arange(rows) // 2
        found, wanted = (f(q, k, t, ids, share) for f in (function, run))
        torch.testing.assert_close(found[:2], wanted[:2])
        assert bool((ids[found[2]] != ids).all())
        gradients = [torch.autograd.grad(x[0], (q, k, t)) for x in (found, wanted)]
        torch.testing.assert_close(*gradients)


@ways
def test_numbers_as_arguments(dynamic: bool | None) -> None:
    def run(x: Tensor, scale: float, rate: float, keep: int) -> Any:
        kept = so.prune_tokens(x[0], x[0, :, 1:, 0], keep_rate=rate)
        selected = so.select_tokens(x[0, :, :, 0], keep)
        return so.cross_attention(x, x, x, scale=scale), kept.tokens, selected

    function, x = compiled(run, dynamic), torch.randn(2, 2, 21, 8)
    for numbers in ((0.3, 0.5, 3), (0.4, 0.6, 4), (1, 1, 5)):
        torch.testing.assert_close(function(x, *numbers), run(x, *numbers))


def test_sizes_are_what_compiled_code_makes_of_them() -> None:
    """C++ of torch's inductor takes `round(x, 9)` times an inexact 1e-9: a token more than is."""
    graphs, prune = [], so.nn.TokenPruning(0.55)

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    run = torch.compile(prune, backend=keep, fullgraph=True, dynamic=True)
    assert run(torch.randn(2, 101, 8), torch.randn(2, 100)).tokens.shape == (2, 56, 8)
    sizes = [str(x) for node in graphs[0].graph.nodes for x in pytree.tree_leaves(node.meta)]
    assert not any("Round" in x for x in sizes)
    for rate in (i / 100 for i in range(1, 101)):
        for count in (1, 7, 100, 196, 784, 6272, 100_000):
            assert so.keep_count(rate, count) == math.ceil(round(rate * count, 9))


def test_what_builds_layouts() -> None:
    def run(mask: Tensor) -> Any:
        layout = so.BlockLayout.from_mask(mask, num_tokens=20, block_size=4)
        sizes, lists = (layout.num_tokens, layout.block_size, 1), pytree.tree_leaves(layout)
        again = so.BlockLayout(*sizes, *lists).to("cpu")
        return again.to_mask(), again.to_dense(), so.position_codes((1, 4, 5)), layout.seq_len

    mask = torch.rand(5, 5) > 0.5
    found, wanted = compiled(run)(mask), run(mask)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], wanted[:3], strict=True))
    assert found[3] == wanted[3] == 21 and torch.equal(found[0], mask)


def test_transforms_in_a_graph() -> None:
    x = torch.randn(3, 1, 2, 9, 8)

    def loss(x: Tensor) -> Tensor:
        out = so.cross_attention(x, x, x)
        assert isinstance(out, Tensor)
        return out.square().sum()

    for run in (lambda x: grad(loss)(x[0]), lambda x: vmap(grad(loss))(x)):
        torch.testing.assert_close(compiled(run)(x), run(x))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: so.cross_attention(x, x, x, scale=x.sum()), "scale must be a float, got Tensor"),
        (lambda x: so.cross_attention(x, x[:1], x), r"key must have shape \(2, 2, keys, 8\)"),
        (lambda x: so.cross_attention(x.double(), x, x), "query must be float32.*torch.float64"),
        (lambda x: so.BlockLayout.local_random(-len(x)), "num_tokens must be at least 0, got -2"),
        (lambda x: so.select_tokens(x[0, 0], len(x) + 8), "keep must be 1 to 8, got 10"),
    ],
)
def test_errors_keep_their_words(run: Callable[[Tensor], Any], message: str) -> None:
    torch._dynamo.reset()
    function = torch.compile(run, backend="aot_eager")
    with pytest.raises((TypeError, ValueError), match=message):
        function(torch.randn(2, 2, 21, 8))


def test_the_traceable_generator_draws_the_same_numbers() -> None:
    ours, wanted = SeededGenerator(3), torch.Generator().manual_seed(3)
    for shape in ((3, 3), (1, 1), (20, 20), (7,), (0, 4), (17, 9)):
        assert torch.equal(ours.rand(shape), torch.rand(shape, generator=wanted))
    ours, wanted = SeededGenerator(4), torch.Generator().manual_seed(4)
    for count in (40, 24, 60):
        layouts = [
            so.BlockLayout.local_random(count, block_size=8, generator=g) for g in (ours, wanted)
        ]
        assert torch.equal(layouts[0].key_blocks, layouts[1].key_blocks)
    torch.library.opcheck(torch.ops.svitt_ops.seeded_rand.default, (3, 5, 7))


def test_a_layout_is_a_tree() -> None:
    layout = so.BlockLayout.local_random(20, block_size=4, num_global=2)
    leaves, spec = pytree.tree_flatten(layout)
    assert all(isinstance(x, Tensor) for x in leaves) and len(leaves) == 4
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    again = pytree.tree_unflatten(leaves, spec)
    assert (again.num_tokens, again.block_size, again.num_global) == (20, 4, 2)
    assert all(a is b for a, b in zip(pytree.tree_leaves(again), leaves, strict=True))
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(layout)[0]]
    assert paths == [".key_counts", ".key_blocks", ".query_counts", ".query_blocks"]


def test_a_layout_is_kept_in_a_file_and_checked() -> None:
    layout, file = so.BlockLayout.local_random(20, block_size=4), io.BytesIO()
    torch.save(layout, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True).to_mask(), layout.to_mask())
    layout.key_blocks[0, -1] = 99
    file = io.BytesIO()
    torch.save(layout, file)
    file.seek(0)
    with pytest.raises(Exception, match="key_blocks must name blocks 0 to 4, got 0 to 99"):
        torch.load(file, weights_only=True)


class WithLayout(nn.Module):
    """A layout as an input, another as an attribute, and every op without its own state."""

    def __init__(self) -> None:
        super().__init__()
        bias = so.nn.RelativePositionBias3D((1, 4, 5), 2, std=0.5)
        self.attention = so.nn.BlockSparseSelfAttention(16, 2, bias=bias)
        self.layout = so.BlockLayout.local_random(20, block_size=4)

    def forward(self, tokens: Tensor, layout: so.BlockLayout) -> Any:
        tokens = self.attention(tokens, self.layout)
        tokens, saliency = self.attention(tokens, layout, return_saliency=True)
        kept = so.prune_tokens(tokens, saliency, keep=7)
        heads = so.nn.split_heads(kept.tokens, 2)
        seen = so.cross_attention(heads, heads, heads)
        rows = kept.tokens[0]
        loss = so.info_nce(rows, rows, 0.5) + so.queue_info_nce(rows, rows, rows, 0.5)
        loss = loss + so.sigmoid_nce(rows, rows, 0.5, -1.0)
        return seen, kept.indices, loss, so.retrieval_ranks(rows, rows)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    module, tokens = WithLayout(), torch.randn(2, 21, 16)
    layouts = [so.BlockLayout.local_random(20, block_size=4) for _ in range(2)]
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        module,
        (tokens, layouts[0]),
        dynamic_shapes=({0: batch}, [None] * 4),
        strict=strict,
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for inputs in ((tokens, layouts[0]), (torch.randn(3, 21, 16), layouts[1])):
        for run in (program.module(), loaded.module()):
            torch.testing.assert_close(run(*inputs), module(*inputs))


def test_export_of_a_draw() -> None:
    class Draws(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> Any:
            layout = so.BlockLayout.local_random(x.shape[2] - 1, block_size=4, num_random=1)
            rows = F.normalize(x[:, 0, 0], dim=1)
            found = so.sample_hard_negatives(rows, rows, 0.5, ids=ids)
            return so.block_sparse_attention(x, x, x, layout), layout, found

    x, ids = torch.randn(4, 2, 21, 8), torch.tensor([0, 0, 1, 1])
    out, layout, found = torch.export.export(Draws(), (x, ids)).module()(x, ids)
    torch.testing.assert_close(out, so.block_sparse_attention(x, x, x, layout))
    assert bool((ids[found] != ids).all())

"""The attn_layer for timm, in a block as timm has it.

timm itself needs torchvision, which pins another torch; `TimmAttention` has its documented
constructor, forward and parameter names.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svitt_ops.integrations.timm import Attention

pytestmark = pytest.mark.usefixtures("one_thread")


class TimmAttention(nn.Module):
    """The computation of `timm.layers.Attention` 1.0, by scaled_dot_product_attention."""

    def __init__(self, dim: int, num_heads: int, **given: Any) -> None:
        super().__init__()
        norm, head_dim = given["norm_layer"], dim // num_heads
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=given["qkv_bias"])
        self.q_norm = norm(head_dim) if given["qk_norm"] else nn.Identity()
        self.k_norm = norm(head_dim) if given["qk_norm"] else nn.Identity()
        self.norm = norm(dim) if given["scale_norm"] else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=given["proj_bias"])

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask)
        return self.proj(self.norm(out.transpose(1, 2).reshape(b, n, c)))


class Block(nn.Module):
    """As timm's: it makes its attention with all of these arguments, and calls it with these."""

    def __init__(self, attn_layer: type[nn.Module], **changes: Any) -> None:
        super().__init__()
        given: dict[str, Any] = {"qkv_bias": True, "qk_norm": False, "scale_norm": False}
        given |= {"proj_bias": True, "attn_drop": 0.0, "proj_drop": 0.0}
        given |= {"norm_layer": nn.LayerNorm, "device": None, "dtype": None, **changes}
        self.norm1 = nn.LayerNorm(32)
        self.attn = attn_layer(32, num_heads=2, **given)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return x + self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)


def pair(attn_layer: type[nn.Module], **changes: Any) -> tuple[nn.Module, nn.Module]:
    """A block of ours and timm's, of the same weights."""
    torch.manual_seed(0)
    ours, theirs = Block(attn_layer, **changes), Block(TimmAttention, **changes)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


def run(block: nn.Module, x: Tensor, mask: Tensor | None) -> list[Tensor]:
    out = block(x, attn_mask=mask)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), list(block.parameters()))]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True, "scale_norm": True}, {"qkv_bias": False, "proj_bias": False}]
)
def test_it_equals_timm_s(changes: dict[str, Any], masked: bool) -> None:
    ours, theirs = pair(Attention, **changes)
    x, mask = torch.randn(2, 37, 32), None
    if masked:
        mask = torch.ones(2, 1, 1, 37, dtype=torch.bool)
        mask[0, ..., 30:] = False
    for actual, wanted in zip(run(ours, x, mask), run(theirs, x, mask), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=2e-5)


def test_a_sparse_class_is_timm_s_under_the_layout() -> None:
    ours, theirs = pair(Attention.sparse(block_size=5, num_random=1, num_global=2))
    x: Any = torch.randn(2, 37, 32)
    found = run(ours, x, None)
    layout: Any = ours.get_submodule("attn").layout
    assert layout.num_global == 2 and layout.density < 0.7
    for actual, wanted in zip(found, run(theirs, x, layout.to_dense()), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=2e-5)


def test_layouts_are_fixed_in_evaluation_and_differ_by_layer() -> None:
    kind = Attention.sparse(block_size=4, num_random=2)
    layers: Any = nn.ModuleList(Block(kind) for _ in range(2)).eval()
    x = torch.randn(1, 41, 32)

    def drawn(blocks: Any) -> list[Tensor]:
        for block in blocks:
            block(x)
        return [block.attn.layout.to_mask() for block in blocks]

    first, again = drawn(layers), drawn(copy.deepcopy(layers))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    trained = drawn(layers.train())
    assert not torch.equal(trained[0], first[0])
    assert not torch.equal(trained[0], drawn(layers)[0])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Block(Attention, attn_drop=0.1), "attn_drop must be 0, got 0.1"),
        (lambda: Attention(32, 3), "num_heads must divide dim 32, got 3"),
        (lambda: Attention(32, 2, qk_norm=True), "norm_layer must be given for qk_norm"),
        (lambda: Attention.sparse(block_size=300), "block_size must be 1 to 256, got 300"),
        (lambda: Attention.sparse(seed=-1), "seed must be an int of at least 0, got -1"),
        (lambda: Block(Attention)(torch.randn(1, 5, 32), is_causal=True), "is_causal must be"),
        (
            lambda: Block(Attention)(torch.randn(1, 5, 32), attn_mask=torch.zeros(5, 5)),
            r"attn_mask must be bool \(1, 1, 1, 5\), a padding mask, got torch.float32 of \(5, 5\)",
        ),
        (
            lambda: Block(Attention.sparse())(torch.randn(1, 5, 32), attn_mask=torch.ones(5)),
            "attn_mask must be None in a sparse class, got one",
        ),
    ],
)
def test_what_it_does_not_do_is_refused(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_it_imports_neither_timm_nor_transformers() -> None:
    code = (
        "import sys, svitt_ops.integrations.timm; print({'timm', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr

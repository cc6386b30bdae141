"""svitt_ops.nn: thin modules, so each is compared with what it wraps or replaces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so
from svitt_ops.nn import (
    BlockSparseSelfAttention,
    CrossAttention,
    RelativePositionBias3D,
    TokenPruning,
    merge_heads,
    split_heads,
)

GRID = (2, 3, 5)


def full_layout() -> so.BlockLayout:
    blocks = torch.ones(5, 5, dtype=torch.bool)
    return so.BlockLayout.from_mask(blocks, num_tokens=30, block_size=6)


def dense_bias(bias: RelativePositionBias3D) -> Tensor:
    """The (heads, 31, 31) bias that the op never forms, by BEiT's definition."""
    codes, table = bias.codes.long(), bias.table
    offsets = table.shape[0] - 3
    among = table[codes[:, None] - codes[None, :] + (offsets - 1) // 2]
    rows = torch.cat([table[-2].expand(30, 1, -1), among], 1)
    first = torch.cat([table[-1].expand(1, 1, -1), table[-3].expand(1, 30, -1)], 1)
    return torch.cat([first, rows]).permute(2, 0, 1)


def test_self_attention_over_all_blocks_is_dense_attention() -> None:
    torch.manual_seed(0)
    bias = RelativePositionBias3D(GRID, 4, std=1.0)
    module = BlockSparseSelfAttention(32, 4, key_bias=False, bias=bias)
    assert module.key.bias is None and module.query.bias is not None
    tokens = torch.randn(2, 31, 32, requires_grad=True)
    out, saliency = module(tokens, full_layout(), return_saliency=True)
    q, k, v = (split_heads(p(tokens), 4) for p in (module.query, module.key, module.value))
    mask = dense_bias(bias)
    wanted = module.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
    torch.testing.assert_close(out, wanted)
    weights = (q @ k.transpose(-1, -2) * 8**-0.5 + mask).softmax(-1)
    torch.testing.assert_close(saliency, weights[:, :, 0, 1:].mean(1))
    leaves = [tokens, bias.table, module.key.weight]
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(wanted.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_pruned_tokens_keep_their_codes() -> None:
    torch.manual_seed(0)
    bias = RelativePositionBias3D(GRID, 2, std=1.0)
    module = BlockSparseSelfAttention(16, 2, bias=bias)
    pruning = TokenPruning(0.4)
    kept = pruning(torch.randn(3, 31, 16), torch.rand(3, 30), position_codes=bias.codes)
    assert kept.tokens.shape == (3, 13, 16) and kept.position_codes is not None
    layout = so.BlockLayout.local_random(12, block_size=4, num_local=1, num_random=2)
    out = module(kept.tokens, layout, codes=kept.position_codes)
    table = dense_bias(bias)
    for sample in range(3):
        order = torch.cat([torch.zeros(1, dtype=torch.int64), kept.indices[sample] + 1])
        x = kept.tokens[sample : sample + 1]
        q, k, v = (split_heads(p(x), 2) for p in (module.query, module.key, module.value))
        mask = table[:, order][:, :, order]
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(out[sample], module.out(merge_heads(dense))[0])


def test_cross_attention_is_attention() -> None:
    torch.manual_seed(0)
    module = CrossAttention(24, 3, context_dim=40)
    tokens, context = torch.randn(2, 5, 24), torch.randn(2, 17, 40)
    ignored = torch.zeros(2, 17, dtype=torch.bool)
    ignored[1, 9:] = True
    out, saliency = module(tokens, context, key_padding_mask=ignored, return_saliency="mean")
    q, k, v = (
        split_heads(x, 3)
        for x in (module.query(tokens), module.key(context), module.value(context))
    )
    mask = ~ignored[:, None, None]
    wanted = module.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(saliency.sum(1), torch.ones(2))
    torch.testing.assert_close(module(tokens, context, key_padding_mask=ignored), wanted)


def test_rows_that_share_a_context_attend_as_if_each_had_its_own() -> None:
    torch.manual_seed(0)
    module = CrossAttention(24, 3, context_dim=40)
    rows = torch.tensor([1, 0, 1, 1])
    tokens, context = torch.randn(4, 5, 24), torch.randn(2, 17, 40)
    ignored = torch.arange(17) >= torch.tensor([17, 9, 4, 12])[:, None]
    results = []
    for shared in (True, False):
        source = context.clone().requires_grad_()
        keys = (source, {"context_rows": rows}) if shared else (source[rows], {})
        found, saliency = module(
            tokens, keys[0], key_padding_mask=ignored, return_saliency="cls", **keys[1]
        )
        grads = torch.autograd.grad(found.square().sum(), [source, *module.parameters()])
        results.append((found, saliency, grads))
    torch.testing.assert_close(*results)
    for wrong in (rows.int(), rows[:3], rows[:, None]):
        with pytest.raises((TypeError, ValueError), match="CrossAttention: context_rows must "):
            module(tokens, context, context_rows=wrong)


def test_noise_of_a_table_has_a_direction_along_each_axis() -> None:
    torch.manual_seed(0)
    bias = RelativePositionBias3D((8, 8, 8), 64, num_global=2, std=1.5)
    offsets = bias.table[: 15**3].detach().unflatten(0, (15, 15, 15))
    for axis in range(3):
        others = [k for k in range(3) if k != axis]
        # Noise of each offset's own would leave a fifteenth of its deviation in these means.
        mean = offsets.mean(others)
        assert abs((mean - mean.mean(0)).std() * 3**0.5 - 1.5) < 0.15
        torch.testing.assert_close(
            offsets.diff(dim=axis).std(others), torch.zeros(14, 64), rtol=0, atol=1e-5
        )
    assert abs(offsets.std() - 1.5) < 0.15 and 1.0 < bias.table[15**3 :].std() < 2.0


def test_modules_save_move_and_compile() -> None:
    bias = RelativePositionBias3D(GRID, 2, num_global=2, std=0.5)
    assert bias.table.shape == (3 * 5 * 9 + 8, 2) and "codes" not in bias.state_dict()
    other = RelativePositionBias3D(GRID, 2, num_global=2)
    assert other.table.eq(0).all()
    other.load_state_dict(bias.state_dict())
    assert torch.equal(other.table, bias.table)
    assert RelativePositionBias3D(GRID, 2, device="meta").codes.device.type == "meta"
    module = BlockSparseSelfAttention(16, 2, bias=RelativePositionBias3D(GRID, 2, std=1.0))
    layout, tokens = full_layout(), torch.randn(1, 31, 16)
    compiled = torch.compile(lambda x: module(x, layout), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), module(tokens, layout))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_heads must divide dim 10, got 3"):
        BlockSparseSelfAttention(10, 3)
    with pytest.raises(ValueError, match="num_heads must divide dim 8, got 0"):
        CrossAttention(8, 0)
    with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got 0"):
        TokenPruning(0)

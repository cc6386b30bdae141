"""compat="svitt-official" against the released attention, written out with all its padding."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so
from svitt_ops.models import SViTTConfig, SViTTForPreTraining
from svitt_ops.models.parts.official import PaddedSelfAttention, padded
from svitt_ops.nn import RelativePositionBias3D, merge_heads, split_heads

GRID = (2, 3, 4)


def released(
    module: PaddedSelfAttention, tokens: Tensor, layout: so.BlockLayout, codes: Tensor
) -> Tensor:
    """Zero keys behind the last token take part, with the bias of token -> [CLS]."""
    q, k, v = (split_heads(p(tokens), 2) for p in (module.query, module.key, module.value))
    count, missing = codes.shape[-1], layout.num_tokens - codes.shape[-1]
    k, v = (F.pad(x, (0, 0, 0, missing)) for x in (k, v))
    table = module.bias.table
    offsets = codes[..., :, None].long() - codes[..., None, :] + (table.shape[0] - 4) // 2
    bias = table[-2].expand(tokens.shape[0], 1 + count, 1 + count + missing, 2).clone()
    bias[:, 1:, 1 : count + 1] = table[offsets]
    bias[:, 0, 1:] = table[-3]
    bias[:, 0, 0] = table[-1]
    logits = q @ k.mT / q.shape[-1] ** 0.5 + bias.permute(0, 3, 1, 2)
    seen = layout.to_dense()[: count + 1].clone()
    seen[0, count + 1 :] = False  # [CLS] sees no padding
    return module.out(merge_heads(logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v))


@pytest.mark.parametrize("kept", [24, 16, 13])
def test_padding_is_attended(kept: int) -> None:
    torch.manual_seed(0)
    module = PaddedSelfAttention(
        16, 2, key_bias=False, bias=RelativePositionBias3D(GRID, 2, std=1.0)
    )
    tokens = torch.randn(3, 1 + kept, 16, requires_grad=True)
    codes = module.bias.codes
    if kept < 24:
        chosen = torch.stack([torch.randperm(24)[:kept].sort().values for _ in range(3)])
        codes = codes[chosen]
    layout = so.BlockLayout.local_random(padded(kept, 8), block_size=8, num_random=1)
    out, saliency = module(tokens, layout, codes=codes, return_saliency=True)
    wanted = released(module, tokens, layout, codes)
    torch.testing.assert_close(out, wanted)
    plain = module(tokens, layout, codes=codes)
    assert torch.equal(plain, out)
    assert saliency.shape == (3, kept) and saliency.sum(1).max() < 1
    leaves = [tokens, module.bias.table, module.key.weight]
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(wanted.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_model(make_config: Callable[..., SViTTConfig]) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(2, 4, 3, 32, 32)
    model = SViTTForPreTraining(make_config(compat="svitt-official", num_random=1)).eval()
    ours = SViTTForPreTraining(make_config(num_random=1)).eval()
    ours.load_state_dict(model.state_dict())
    with torch.no_grad():
        first, second = (model.encode_video(pixels) for _ in range(2))
        assert not torch.equal(first.states, second.states)  # drawn anew outside training
        mask = torch.ones(2, 5)
        text = model.encode_text(torch.ones(2, 5, dtype=torch.int64), mask)
        arguments = (text.states, mask, first.states, first.indices)
        assert torch.equal(model.fuse(*arguments).video_indices, first.indices)  # never prunes
        assert ours.fuse(*arguments).video_indices.shape[1] == 16


@pytest.mark.parametrize("train", [False, True])
def test_patterns_are_drawn_as_there(make_config: Callable[..., SViTTConfig], train: bool) -> None:
    """Seed for seed: one square of noise a layer, and nothing else that is random."""
    torch.manual_seed(0)
    config = make_config(compat="svitt-official", num_random=2, block_size=6)
    model = SViTTForPreTraining(config).train(train)
    layouts = []
    for layer in model.video.layers:
        layer.register_forward_pre_hook(lambda _, given: layouts.append(given[1]))
    torch.manual_seed(11)
    with torch.no_grad():
        model.encode_video(torch.ones(2, 4, 3, 32, 32))
    torch.manual_seed(11)
    for layout, tokens in zip(layouts, config.kept_tokens(), strict=False):
        blocks = -(-tokens // 6)
        noise = torch.rand(blocks, blocks).fill_diagonal_(0)
        drawn = noise.topk(2).indices
        wanted = torch.eye(blocks, dtype=torch.bool).scatter_(1, drawn, True)
        assert torch.equal(layout.to_mask(), wanted)
    assert len(layouts) == 3

"""The original Frozen: attention over time, then over space, and its authors' names."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svitt_ops.models import FrozenConfig, FrozenForRetrieval, expand_frames
from svitt_ops.models.frozen import load_official
from svitt_ops.models.frozen.divided import DividedSelfAttention
from svitt_ops.nn import merge_heads, split_heads

SIZES: dict[str, Any] = {
    **{"image_size": 24, "patch_size": 8, "num_frames": 4, "hidden_size": 32, "vocab_size": 50},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    **{"text_hidden_size": 24, "text_num_attention_heads": 3, "text_intermediate_size": 40},
    **{"text_num_hidden_layers": 2, "fusion_layer": 2, "projection_dim": 12, "prune_layers": [0]},
    "max_position_embeddings": 16,
}
DENSE: dict[str, Any] = {"edge_sparsity": False, "keep_rate": 1}


def make(**changes: Any) -> FrozenForRetrieval:
    torch.manual_seed(0)
    fields = {**SIZES, "attention": "divided", **DENSE, **changes}
    return FrozenForRetrieval(FrozenConfig(**fields)).eval()


@pytest.fixture
def pairs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (3, 6), generator=generator)
    pixels = torch.randn(3, 4, 3, 24, 24, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("over", ["time", "space"])
@pytest.mark.parametrize("frames", [1, 4])
def test_patches_attend_along_one_axis(over: Any, frames: int) -> None:
    config = FrozenConfig(**SIZES)
    torch.manual_seed(2)
    attention = DividedSelfAttention(config, over)
    tokens = torch.randn(2, 1 + frames * 9, 32)
    frame, place = torch.arange(frames * 9) // 9, torch.arange(frames * 9) % 9
    group = place if over == "time" else frame
    mask = torch.ones(1 + frames * 9, 1 + frames * 9, dtype=torch.bool)
    mask[1:, 1:] = group[:, None] == group
    q, k, v = (
        split_heads(project(tokens), 2)
        for project in (attention.query, attention.key, attention.value)
    )
    wanted = attention.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
    layout: Any = None
    torch.testing.assert_close(attention(tokens, layout), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero", [True, False])
def test_time_that_starts_at_zero_learns_no_query(
    zero: bool, pairs: dict[str, Tensor], tmp_path: Path
) -> None:
    model = make(zero_init_time=zero)
    over_time = model.video.layers[0].attention_over_time
    before = {name: x.clone() for name, x in over_time.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = model(**pairs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    moved = {name for name, x in over_time.state_dict().items() if not torch.equal(x, before[name])}
    learning = {"value.weight", "value.bias", "out.weight", "out.bias"}
    assert moved >= learning
    # A bias of the keys shifts all logits of a query alike, and never has a gradient to speak of.
    assert ("query.weight" in moved, "key.weight" in moved) == (not zero, not zero)
    model.save_pretrained(tmp_path)
    again = FrozenForRetrieval.from_pretrained(tmp_path)
    assert torch.equal(again(**pairs).loss, model(**pairs).loss)
    assert zero == (not over_time.query.weight.any() and not over_time.key.weight.any())


def official(model: FrozenForRetrieval) -> dict[str, Tensor]:
    """A model's tensors under the authors' names, as they stand in their files."""
    state = model.state_dict()
    found = {}
    for number in range(2):
        ours, theirs = f"video.layers.{number}.", f"video_model.blocks.{number}."
        for kind in ("weight", "bias"):
            for own, other in (("attention", "attn"), ("attention_over_time", "timeattn")):
                parts = (state[f"{ours}{own}.{part}.{kind}"] for part in ("query", "key", "value"))
                found[f"{theirs}{other}.qkv.{kind}"] = torch.cat(list(parts))
                found[f"{theirs}{other}.proj.{kind}"] = state[f"{ours}{own}.out.{kind}"]
            for own, other in (
                *(("norm_before", "norm1"), ("norm_after", "norm2"), ("norm_time", "norm3")),
                *(("mlp.up", "mlp.fc1"), ("mlp.down", "mlp.fc2")),
            ):
                found[f"{theirs}{other}.{kind}"] = state[f"{ours}{own}.{kind}"]
            layer = f"text_model.transformer.layer.{number}."
            for own, other in (
                *(("attention.query", "attention.q_lin"), ("attention.key", "attention.k_lin")),
                *(("attention.value", "attention.v_lin"), ("attention.out", "attention.out_lin")),
                *(("attention_norm", "sa_layer_norm"), ("mlp.up", "ffn.lin1")),
                *(("mlp.down", "ffn.lin2"), ("mlp_norm", "output_layer_norm")),
            ):
                found[f"{layer}{other}.{kind}"] = state[f"text.layers.{number}.{own}.{kind}"]
    for own, other in (
        *(("video.patches", "video_model.patch_embed.proj"), ("video_norm", "video_model.norm")),
        *(("video_projection", "vid_proj.0"), ("text_projection", "txt_proj.1")),
        ("text.embeddings.norm", "text_model.embeddings.LayerNorm"),
    ):
        found |= {f"{other}.{kind}": state[f"{own}.{kind}"] for kind in ("weight", "bias")}
    for name in ("word", "position"):
        weight = state[f"text.embeddings.{name}.weight"]
        found[f"text_model.embeddings.{name}_embeddings.weight"] = weight
    patches = state["video.patch_positions"]
    time = torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(3))
    places = patches[:1] - time[:1]
    patches.copy_(places + time)
    found["video_model.cls_token"] = state["video.cls_token"]
    found["video_model.pos_embed"] = torch.cat([state["video.cls_position"], places], 1)
    found["video_model.temporal_embed"] = time[:, 0][None]
    return found


def test_the_authors_names(
    pairs: dict[str, Tensor], caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    model = make(zero_init_time=False)
    tensors = official(model)
    config = model.config
    file = tmp_path / "frozen.pth"
    torch.save({"state_dict": {f"module.{name}": x for name, x in tensors.items()}}, file)
    with caplog.at_level(logging.WARNING):
        found = load_official(file, config, task="retrieval")
    assert not caplog.records
    assert torch.equal(found(**pairs).loss, model(**pairs).loss)
    expand_frames(found, 8)
    more = pairs["pixel_values"].repeat_interleave(2, 1)
    assert found.encode_video(more).embeds.shape == (3, 12)
    # SViTT takes time out.
    joint = FrozenConfig(**SIZES)
    with caplog.at_level(logging.WARNING):
        load_official(tensors, joint)
    assert "has no counterpart for" in caplog.text and "attention_over_time" not in caplog.text
    assert "timeattn" in caplog.text and "start" not in caplog.text
    large = load_official(tensors, FrozenConfig(**{**SIZES, "image_size": 40}))
    assert large.video.patch_positions is not None
    assert large.video.patch_positions.shape == (4, 25, 32)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="edge_sparsity must be False with attention='divided'"):
        make(edge_sparsity=True)
    with pytest.raises(ValueError, match="keep_rate must be 1 with attention='divided', got 0"):
        make(keep_rate=0.7)
    with pytest.raises(ValueError, match="attention must be one of"):
        make(attention="space")
    with pytest.raises(ValueError, match=r"temporal_embed of shape \(1, n, dim\), got none"):
        load_official({"video_model.pos_embed": torch.ones(1, 5, 32)})
    with pytest.raises(ValueError, match="compat must be None"):
        load_official({}, compat="svitt-official")
    with pytest.raises(ValueError, match="task must be one of pretraining, retrieval"):
        load_official({}, task="question_answering")

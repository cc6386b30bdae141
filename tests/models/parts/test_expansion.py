"""Temporal expansion: which offsets go where, and what does not change."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from svitt_ops.models import (
    FrozenConfig,
    FrozenForRetrieval,
    SViTTConfig,
    SViTTForPreTraining,
    expand_frames,
)
from svitt_ops.models.parts.expansion import frames_of_bias_table, resize_bias_table

MakeConfig = Callable[..., SViTTConfig]


def offsets(table: torch.Tensor) -> list[float]:
    """What each temporal offset holds, of a table whose rows hold their offset."""
    return table[:-3, 0].unflatten(0, (-1, 9))[:, 0].tolist()


def numbered(frames: int) -> torch.Tensor:
    """A table for 2 x 2 patches whose rows hold their temporal offset."""
    own = torch.arange(1 - frames, frames).repeat_interleave(9)
    return torch.cat([own, torch.tensor([100, 101, 102])])[:, None].float()


def test_offsets() -> None:
    assert offsets(resize_bias_table(numbered(1), 2, 3)) == [0] * 5
    assert offsets(resize_bias_table(numbered(2), 2, 4)) == [-1, -1, 0, 0, 0, 1, 1]
    assert offsets(resize_bias_table(numbered(2), 2, 4, "nearest")) == [-1, -1, -1, 0, 0, 1, 1]
    doubled = offsets(resize_bias_table(numbered(4), 2, 8))
    assert doubled[7] == 0 and doubled == [-x for x in reversed(doubled)]
    # The released code's: +1 becomes 0, and -1 stays (systems of the paper's supplement).
    released = offsets(resize_bias_table(numbered(4), 2, 8, "nearest"))
    assert (released[8], released[6]) == (0, -1)
    assert resize_bias_table(numbered(4), 2, 8)[-3:, 0].tolist() == [100, 101, 102]


@pytest.mark.parametrize("mode", ["nearest-exact", "nearest"])
def test_resizing_is_torch_s(mode: str) -> None:
    for source in range(1, 9):
        for target in range(1, 17):
            table = torch.randn(9 * (2 * source - 1) + 3, 2)
            found = resize_bias_table(table, 2, target, mode)
            planes = table[:-3].reshape(1, 2 * source - 1, -1).mT
            wanted = F.interpolate(planes, size=2 * target - 1, mode=mode).mT.reshape(-1, 2)
            assert torch.equal(found, torch.cat([wanted, table[-3:]]))
            assert (
                torch.equal(
                    found[9 * (target - 1) : 9 * target], table[9 * (source - 1) : 9 * source]
                )
                or mode == "nearest"
            )


def test_frames_are_inferred_from_rows() -> None:
    assert [frames_of_bias_table(729 * (2 * t - 1) + 3, 14) for t in (1, 4, 16)] == [1, 4, 16]
    for rows in (729 * 2 + 3, 729 + 4, 3, 0):
        with pytest.raises(ValueError, match=f"odd multiple of 729 and 3 more .*, got {rows}"):
            frames_of_bias_table(rows, 14)


def test_expanded_model(make_config: MakeConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SViTTForPreTraining(make_config(num_frames=2, token_order="morton")).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert expand_frames(model, 4) is model
    assert model.config.num_frames == 4
    for name, value in model.state_dict().items():
        if not name.endswith("bias.table"):
            assert torch.equal(value, before[name])
            continue
        assert torch.equal(value[3 * 49 : 4 * 49], before[name][49 : 2 * 49])  # offset 0
        assert torch.equal(value[-3:], before[name][-3:])
    table = model.video.layers[0].attention.bias.table
    assert isinstance(table, torch.nn.Parameter) and table.requires_grad
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 4, 3, 32, 32)
    wanted = model.encode_video(pixels)
    found = SViTTForPreTraining.from_pretrained(tmp_path).encode_video(pixels)
    assert torch.equal(found.states, wanted.states)
    assert sorted(wanted.indices_per_stage[0][0].tolist())[-1] > 31
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        expand_frames(model, 0)
    with pytest.raises(ValueError, match="mode must be 'nearest-exact' or 'nearest', got 'linear'"):
        expand_frames(model, 8, mode="linear")


def test_official_expansion_is_chosen_by_compat(make_config: MakeConfig) -> None:
    tables = []
    for compat in (None, "svitt-official"):
        torch.manual_seed(0)
        model = SViTTForPreTraining(make_config(num_frames=2, compat=compat))
        tables.append(expand_frames(model, 4).video.layers[0].attention.bias.table)
    assert not torch.equal(tables[0], tables[1])


@pytest.mark.parametrize("source", [1, 4])
def test_identical_frames_stay_alike(make_config: MakeConfig, source: int) -> None:
    """An image model inflated to T sees T times the image; dense attention tells no frame apart."""
    torch.manual_seed(0)
    config = make_config(num_frames=source, edge_sparsity=False, keep_rate=1.0)
    model = SViTTForPreTraining(config).eval()
    if source > 1:  # tables that know of time do tell them apart
        image = SViTTForPreTraining(make_config(num_frames=1, edge_sparsity=False, keep_rate=1.0))
        model = expand_frames(image.eval(), source)
    model = expand_frames(model, 6)
    clip = torch.randn(2, 1, 3, 32, 32).expand(-1, 6, -1, -1, -1)
    with torch.no_grad():
        states = model.encode_video(clip).states[:, 1:].unflatten(1, (6, 16))
    torch.testing.assert_close(states, states[:, :1].expand_as(states))


def test_an_inflated_image_model_sees_one_frame_as_before(make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    config = make_config(num_frames=1, edge_sparsity=False)
    model = SViTTForPreTraining(config).eval()
    image = torch.randn(2, 1, 3, 32, 32)
    with torch.no_grad():
        wanted = model.encode_video(image).states
        found = expand_frames(model, 4).encode_video(image).states
    torch.testing.assert_close(found, wanted)


def test_frozen_positions_expand(make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    config = FrozenConfig(
        image_size=32, patch_size=8, num_frames=2, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=48, prune_layers=[0], vocab_size=50,
        text_hidden_size=24, text_num_attention_heads=3, text_intermediate_size=40,
    )  # fmt: skip
    model = FrozenForRetrieval(config).eval()
    before = model.video.patch_positions.detach().clone()
    expand_frames(model, 4)
    assert torch.equal(model.video.patch_positions, before.repeat_interleave(2, 0))
    assert model.encode_video(torch.randn(1, 4, 3, 32, 32)).embeds.isfinite().all()

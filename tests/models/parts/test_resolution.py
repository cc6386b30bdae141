"""Another resolution, other frames or other sizes than those of the weights in a folder."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svitt_ops.models import (
    FrozenConfig,
    FrozenForRetrieval,
    SViTTConfig,
    SViTTForPreTraining,
    SViTTModel,
    change_image_size,
    expand_frames,
)
from svitt_ops.models.parts.expansion import bias_table_grids, resize_bias_table
from svitt_ops.models.parts.resolution import resize_places

MakeConfig = Callable[..., SViTTConfig]
TABLE = "video.layers.0.attention.bias.table"
FROZEN = FrozenConfig(
    image_size=32, patch_size=8, num_frames=2, hidden_size=32, num_hidden_layers=2,
    num_attention_heads=2, intermediate_size=48, prune_layers=[0], vocab_size=50,
    text_hidden_size=24, text_num_attention_heads=3, text_intermediate_size=40,
)  # fmt: skip


@pytest.fixture
def stored(make_config: MakeConfig, tmp_path: Path) -> tuple[SViTTForPreTraining, Path]:
    """A model of 4 frames of 32 pixels, and its folder."""
    torch.manual_seed(0)
    model = SViTTForPreTraining(make_config()).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize(("pixels", "grid"), [(32, 4), (48, 6), (24, 3), (8, 1)])
def test_pictures_of_another_size(
    stored: tuple[SViTTForPreTraining, Path], tmp_path: Path, pixels: int, grid: int
) -> None:
    model, folder = stored
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert change_image_size(model, pixels) is model
    assert model.config.image_size == pixels
    for name, value in model.state_dict().items():
        if not name.endswith("bias.table") or pixels == 32:
            assert torch.equal(value, before[name])
            continue
        assert value.shape[0] == 7 * (2 * grid - 1) ** 2 + 3
        assert torch.equal(value[-3:], before[name][-3:])
        middles = value[:-3].unflatten(0, (7, -1))[:, (2 * grid - 1) ** 2 // 2]
        old = before[name][:-3].unflatten(0, (7, 49))[:, 24]
        torch.testing.assert_close(middles, old)  # no offset in space: no change
    clip = torch.randn(1, 4, 3, pixels, pixels)
    with torch.no_grad():
        wanted = model.encode_video(clip)
    assert wanted.indices_per_stage[0].max() < 4 * grid**2
    loaded = SViTTForPreTraining.from_pretrained(folder, image_size=pixels)
    model.save_pretrained(tmp_path / "again")
    for other in (loaded, SViTTForPreTraining.from_pretrained(tmp_path / "again")):
        with torch.no_grad():
            assert torch.equal(other.encode_video(clip).states, wanted.states)


def test_a_folder_is_resized_and_expanded(stored: tuple[SViTTForPreTraining, Path]) -> None:
    model, folder = stored
    both = SViTTModel.from_pretrained(folder, image_size=40, num_frames=8)
    expand_frames(change_image_size(model, 40), 8)
    for name, value in both.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert (both.config.image_size, both.config.num_frames) == (40, 8)
    config = SViTTConfig.from_pretrained(folder)
    config.image_size, config.num_frames, config.keep_rate = 24, 2, 0.5
    fewer, info = SViTTForPreTraining.from_pretrained(
        folder, config=config, output_loading_info=True
    )
    assert not info["missing_keys"]
    table = resize_bias_table(load_file(folder / "model.safetensors")[TABLE], 3, 2, source_grid=4)
    assert torch.equal(fewer.state_dict()[TABLE], table)
    assert (fewer.config.num_frames, fewer.config.keep_rate) == (2, 0.5)
    assert fewer.encode_video(torch.randn(1, 2, 3, 24, 24)).embeds.isfinite().all()


def test_absolute_positions_are_resized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FrozenForRetrieval(FROZEN).eval()
    model.save_pretrained(tmp_path)
    before = model.video.patch_positions.detach().clone()
    large = FrozenForRetrieval.from_pretrained(tmp_path, image_size=48, num_frames=4)
    wanted = resize_places(before, 6).repeat_interleave(2, 0)
    torch.testing.assert_close(large.video.patch_positions.detach(), wanted)
    assert large.encode_video(torch.randn(1, 4, 3, 48, 48)).embeds.isfinite().all()


def test_sizes_that_pictures_cannot_have(stored: tuple[SViTTForPreTraining, Path]) -> None:
    model, folder = stored
    for pixels in (0, 36):
        with pytest.raises(ValueError, match=f"multiple of the patch size, 8 pixels, got {pixels}"):
            change_image_size(model, pixels)
    with pytest.raises(ValueError, match=r"patch_size must be a divisor of image_size \(36\)"):
        SViTTForPreTraining.from_pretrained(folder, image_size=36)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 64),
        ("num_hidden_layers", 4),
        ("num_attention_heads", 4),
        ("intermediate_size", 64),
        ("patch_size", 16),
        ("vocab_size", 60),
        ("text_hidden_size", 48),
        ("text_num_hidden_layers", 5),
        ("fusion_layer", 1),
        ("text_num_attention_heads", 2),
        ("text_intermediate_size", 24),
        ("max_position_embeddings", 32),
        ("type_vocab_size", 0),
        ("projection_dim", 8),
        ("layer_scale_init_value", 0.0),
    ],
)
def test_other_sizes_are_one_line(
    stored: tuple[SViTTForPreTraining, Path], field: str, value: float
) -> None:
    model, folder = stored
    with pytest.raises(ValueError, match=f": {field} must be ") as caught:
        SViTTForPreTraining.from_pretrained(folder, **{field: value})
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    assert f"must be {getattr(model.config, field)}, " in message
    assert message.endswith(f"got {value}")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_damaged_folders(
    stored: tuple[SViTTForPreTraining, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = stored
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()

    def load(match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            SViTTForPreTraining.from_pretrained(folder)
        assert "\n" not in str(caught.value)

    for junk in (b"", b"\xff\xd8\xff\xe0JFIF", b"<!DOCTYPE html>" * 9, whole[:-8], whole[:40]):
        weights.write_bytes(junk)
        load("the weights in .* cannot be read")
    weights.write_bytes(whole)
    rewrite(folder, lambda x: x["video_projection.weight"].fill_(torch.nan))
    load(r"video_projection\.weight must be finite, got NaN or infinity")
    weights.write_bytes(whole)
    rewrite(folder, lambda x: x.update({TABLE: torch.zeros(12, 2)}))
    load(rf"{TABLE} of .* must have shape \(346, 2\), that of its config.json, got \(12, 2\)")
    weights.write_bytes(whole)
    rewrite(folder, lambda x: [x.pop(name) for name in sorted(x)[:150]])
    load("must hold the weights of such a model, got 12 of its 162 tensors")
    weights.write_bytes(whole)
    rewrite(folder, lambda x: x.pop("match_head.weight"))
    with caplog.at_level(logging.WARNING):
        SViTTForPreTraining.from_pretrained(folder)
    assert "nothing for: match_head.weight; the match head starts from random" in caplog.text
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    load("must hold a model of type 'svitt', got 'bert'")


def test_geometries_of_a_table() -> None:
    assert bias_table_grids(732) == [(1, 14), (5, 5), (41, 2)]
    assert bias_table_grids(7 * 729 + 3)[0] == (4, 14)
    assert bias_table_grids(733) == bias_table_grids(3) == bias_table_grids(0) == []

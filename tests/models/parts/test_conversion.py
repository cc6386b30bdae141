"""The towers compute what Hugging Face's BEiT and BERT compute, from the same weights."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BeitConfig, BeitModel, BertConfig, BertForPreTraining, BertModel

from svitt_ops.models import SViTTConfig, SViTTForPreTraining, convert
from svitt_ops.models.parts.expansion import resize_bias_table

MakeConfig = Callable[..., SViTTConfig]


@torch.no_grad()
def noisy(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """All weights random: zero tables and unit norms would hide mistakes."""
    for name, parameter in model.named_parameters():
        ones = "norm" in name.lower() and name.endswith("weight")
        parameter.copy_(torch.randn_like(parameter) * std + float(ones))
        if "bias_table" in name or "lambda" in name:
            parameter.div_(std)
    return model.eval()


def make_beit(config: SViTTConfig, **changes: object) -> BeitModel:
    return noisy(
        BeitModel(
            BeitConfig(
                image_size=config.image_size,
                patch_size=config.patch_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                use_mask_token=False,
                use_relative_position_bias=True,
                use_mean_pooling=True,
                layer_scale_init_value=0.1,
                **changes,
            )
        )
    )


def make_bert(config: SViTTConfig, kind: type = BertModel) -> torch.nn.Module:
    return noisy(
        kind(
            BertConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.text_hidden_size,
                num_hidden_layers=config.text_num_hidden_layers,
                num_attention_heads=config.text_num_attention_heads,
                intermediate_size=config.text_intermediate_size,
                max_position_embeddings=config.max_position_embeddings,
            )
        )
    )


@pytest.mark.parametrize("order", ["standard", "morton", "hilbert"])
def test_dense_one_frame_tower_is_beit(make_config: MakeConfig, order: str) -> None:
    torch.manual_seed(0)
    config = make_config(num_frames=1, edge_sparsity=False, keep_rate=1.0, token_order=order)
    model, beit = SViTTForPreTraining(config).eval(), make_beit(config)
    found = convert.load_beit(model, beit)
    assert not found.unknown and not found.missing and found.num_frames == 1
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = beit(pixels)
        ours = model.video(pixels[:, None])
        pooled = model.pooler_norm(ours.tokens[:, 1:].mean(1))
    back = ours.indices.argsort(1)[:, :, None].expand(-1, -1, config.hidden_size)
    torch.testing.assert_close(
        ours.tokens[:, 1:].gather(1, back), wanted.last_hidden_state[:, 1:], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(ours.tokens[:, 0], wanted.last_hidden_state[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, wanted.pooler_output, rtol=0, atol=1e-5)


def test_base_width_tower_is_beit() -> None:
    torch.manual_seed(0)
    config = SViTTConfig(
        num_frames=1, num_hidden_layers=3, prune_layers=[], edge_sparsity=False, fusion_layer=0,
        text_num_hidden_layers=0, multimodal_prune_layers=[], vocab_size=10,
    )  # fmt: skip
    model, beit = SViTTForPreTraining(config).eval(), noisy(make_beit(config), 0.02)
    convert.load_beit(model, beit)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted = beit(pixels).last_hidden_state
        ours = model.video(pixels[:, None]).tokens
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_a_bias_that_layers_share_goes_to_each(make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    config = make_config(num_frames=1, edge_sparsity=False, keep_rate=1.0)
    model = SViTTForPreTraining(config).eval()
    beit = make_beit(config, use_shared_relative_position_bias=True)
    beit.config.use_relative_position_bias = False
    shared = BeitModel(beit.config)
    noisy(shared)
    assert not convert.load_beit(model, shared).missing
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = shared(pixels).last_hidden_state
        torch.testing.assert_close(model.video(pixels[:, None]).tokens, wanted, rtol=0, atol=1e-5)


def test_text_tower_is_the_first_layers_of_bert(make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    config = make_config(text_num_hidden_layers=12, fusion_layer=9, multimodal_prune_layers=[1])
    model, bert = SViTTForPreTraining(config).eval(), make_bert(config)
    found = convert.load_bert(model, bert)
    assert not found.unknown
    assert {name.split(".")[3] for name in found.missing if name.startswith("fusion")} == {
        "cross_attention",
        "cross_norm",
    }
    ids = torch.randint(1, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    mask[2, 1:] = 0
    with torch.no_grad():
        wanted = bert(ids, mask, output_hidden_states=True).hidden_states[9]
        ours = model.encode_text(ids, mask).states
    real = mask.bool()
    torch.testing.assert_close(ours[real], wanted[real], rtol=0, atol=1e-5)


def test_token_head_is_bert_s(make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    config = make_config()
    model, bert = SViTTForPreTraining(config).eval(), make_bert(config, BertForPreTraining)
    found = convert.load_bert(model, bert)
    assert not found.unknown
    states = torch.randn(2, 5, config.text_hidden_size)
    ours = model.token_head(states, model.text.embeddings.word.weight)
    torch.testing.assert_close(ours, bert.cls.predictions(states))


def test_weights_come_from_folders(
    make_config: MakeConfig, tmp_path: object, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    config = make_config(num_frames=2)
    beit, bert = make_beit(config), make_bert(config)
    beit.save_pretrained(f"{tmp_path}/beit")
    bert.save_pretrained(f"{tmp_path}/bert")
    model = SViTTForPreTraining(config)
    head = model.token_head.dense.weight.clone()
    assert not convert.load_beit(model, f"{tmp_path}/beit").missing
    found = convert.load_bert(model, f"{tmp_path}/bert")
    # This BERT has no MLM head, so the model keeps its own.
    assert torch.equal(head, model.token_head.dense.weight)
    assert "token_head.dense.weight" in found.missing and "token_head.dense.weight" in caplog.text
    table = beit.state_dict()[next(k for k in beit.state_dict() if k.endswith("bias_table"))]
    ours = model.video.layers[0].attention.bias.table
    for slice_ in ours[:-3].unflatten(0, (3, 49)):
        torch.testing.assert_close(slice_, table[:-3])
    torch.testing.assert_close(ours[-3:], table[-3:])


@pytest.mark.parametrize("pixels", [48, 24])
def test_a_beit_of_another_resolution(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture, pixels: int
) -> None:
    torch.manual_seed(0)
    beit = make_beit(make_config())
    model = SViTTForPreTraining(make_config(image_size=pixels, num_frames=2))
    found = convert.load_beit(model, beit)
    assert found.num_frames == 1 and not found.missing
    assert f"interpolated from 32 to {pixels} pixels a side" in caplog.text
    table = next(v for k, v in beit.state_dict().items() if k.endswith("bias_table"))
    wanted = resize_bias_table(table, pixels // 8, 2, source_grid=4)
    assert torch.equal(model.video.layers[0].attention.bias.table, wanted)


def test_folders_that_are_not_such_a_model(make_config: MakeConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = make_config()
    make_beit(config).save_pretrained(tmp_path / "beit")
    make_bert(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "bert", tmp_path / "no weights")
    (tmp_path / "no weights" / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "beit", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"<html>")
    loads = {"beit": convert.load_beit, "bert": convert.load_bert}
    wrong = [
        ("beit", "bert", "must be the folder of a model of type 'beit', got 'bert' in"),
        ("bert", "beit", "must be the folder of a model of type 'bert', got 'beit' in"),
        ("bert", "empty", "must be the folder of a bert model"),
        ("beit", "none", "must be the folder of a beit model, .*; get one by: hf download micro"),
        ("bert", "no weights", "must be the folder of a bert model"),
        ("beit", "damaged", "must be the folder of a beit model"),
    ]
    for kind, name, message in wrong:
        with pytest.raises(ValueError, match=f"load_{kind}: source {message}") as caught:
            loads[kind](SViTTForPreTraining(config), str(tmp_path / name))
        assert "\n" not in str(caught.value) and name in str(caught.value)
    sizes = [
        ("beit", {"hidden_size": 64}, "hidden_size must be 32, .*got 64"),
        ("beit", {"num_attention_heads": 4}, "num_attention_heads must be 2, .*got 4"),
        ("beit", {"patch_size": 16}, "patch_size must be 8, .*got 16"),
        ("bert", {"text_hidden_size": 48}, "text_hidden_size must be 24, .*got 48"),
        ("bert", {"text_num_attention_heads": 2}, "text_num_attention_heads must be 3, .*got 2"),
        ("bert", {"vocab_size": 60}, "vocab_size must be 50, .*got 60"),
    ]
    for kind, changes, message in sizes:
        with pytest.raises(ValueError, match=f"load_{kind}: {message}"):
            loads[kind](SViTTForPreTraining(make_config(**changes)), tmp_path / kind)

"""The towers compute what Hugging Face's BEiT and BERT compute, from the same weights."""

from collections.abc import Callable

import pytest
import torch
from transformers import BeitConfig, BeitModel, BertConfig, BertForPreTraining, BertModel

from svitt_ops.models import SViTTConfig, SViTTForPreTraining, convert

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

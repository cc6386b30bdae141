"""SViTTForPreTraining: losses, negatives, multimodal pruning, saving and loading."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so
from svitt_ops.models import (
    SViTTConfig,
    SViTTForPreTraining,
    SViTTModel,
)

MakeConfig = Callable[..., SViTTConfig]


@pytest.fixture
def model(make_config: MakeConfig) -> SViTTForPreTraining:
    torch.manual_seed(0)
    return SViTTForPreTraining(make_config(initializer_range=0.2))


def test_every_parameter_learns(model: SViTTForPreTraining, batch: dict[str, Tensor]) -> None:
    assert not model.leaves_parameters_unused
    output = model(**batch)
    torch.testing.assert_close(output.loss, output.loss_vtc + output.loss_vtm + output.loss_mlm)
    output.loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # An attention over one row of keys alone cannot tell their biases apart.
    unused = [name for name in unused if not name.endswith("key.bias")]
    assert unused == []


def test_loss_weights(make_config: MakeConfig, batch: dict[str, Tensor]) -> None:
    weights = {"vtc": 2, "vtm": 0, "mlm": 0.5}
    model = SViTTForPreTraining(make_config(loss_weights=weights)).eval()
    output = model(**batch)
    assert output.loss_vtm is None and model.leaves_parameters_unused
    torch.testing.assert_close(output.loss, 2 * output.loss_vtc + 0.5 * output.loss_mlm)
    only = SViTTForPreTraining(make_config(loss_weights={"vtm": 0, "mlm": 0}))
    del batch["mlm_input_ids"], batch["mlm_labels"]
    output = only(**batch)
    assert output.loss_mlm is None and torch.equal(output.loss, output.loss_vtc)
    with pytest.raises(ValueError, match="mlm_input_ids and mlm_labels must be given"):
        SViTTForPreTraining(make_config())(**batch)


def test_contrastive_and_masked_losses(
    model: SViTTForPreTraining, batch: dict[str, Tensor]
) -> None:
    model.eval()
    output = model(**batch)
    video = model.encode_video(batch["pixel_values"])
    text = model.encode_text(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(video.embeds.norm(dim=1), torch.ones(3))
    logits = video.embeds @ text.embeds.T / 0.07
    target = torch.arange(3)
    wanted = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(output.loss_vtc, wanted)
    masked = model.encode_text(batch["mlm_input_ids"], batch["attention_mask"])
    fused = model.fuse(masked.states, batch["attention_mask"], video.states).states
    words = model.text.embeddings.word.weight
    logits = model.token_head(fused, words)[:, 2]
    torch.testing.assert_close(output.loss_mlm, F.cross_entropy(logits, batch["input_ids"][:, 2]))


@pytest.mark.parametrize("layers", [[], [0], [1]])
def test_texts_may_share_clips(
    make_config: MakeConfig, batch: dict[str, Tensor], layers: list[int]
) -> None:
    torch.manual_seed(0)
    model = SViTTModel(make_config(multimodal_prune_layers=layers, initializer_range=0.2)).eval()
    clips = torch.tensor([2, 0, 2])
    video = model.encode_video(batch["pixel_values"])
    text = model.encode_text(batch["input_ids"], batch["attention_mask"])
    results = []
    for states, indices, given in (
        (video.states, video.indices, {"clips": clips}),
        (video.states[clips], video.indices[clips], {}),
    ):
        found = model.fuse(text.states, batch["attention_mask"], states, indices, **given)
        grads = torch.autograd.grad(
            found.states.square().sum(), list(model.parameters()), retain_graph=True,
            allow_unused=True,
        )  # fmt: skip
        grads = [x for x in grads if x is not None]
        results.append((found.states, found.video_indices, grads))
    torch.testing.assert_close(*results)


def test_a_step_projects_a_clip_once_and_predicts_masked_words_only(
    model: SViTTForPreTraining, batch: dict[str, Tensor]
) -> None:
    seen: dict[str, list[int]] = {"key": [], "word": []}
    layer = model.fusion.layers[0]
    layer.cross_attention.key.register_forward_hook(lambda _, x, y: seen["key"].append(len(y)))
    model.token_head.register_forward_hook(lambda _, x, y: seen["word"].append(y[..., 0].numel()))
    model(**batch)
    assert seen == {"key": [3], "word": [3]}  # of 12 rows, and of 18 places


def test_masked_texts_have_the_shape_of_the_texts(
    model: SViTTForPreTraining, batch: dict[str, Tensor]
) -> None:
    for name in ("mlm_input_ids", "mlm_labels"):
        with pytest.raises(ValueError, match=rf"{name} must have shape \(3, 6\), got \(3, 5\)"):
            model(**{**batch, name: batch[name][:, 1:]})
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 6\), got \(2, 6\)"):
        model(**{**batch, "attention_mask": batch["attention_mask"][:2]})


def test_masked_loss_of_nothing_is_0(model: SViTTForPreTraining, batch: dict[str, Tensor]) -> None:
    batch["mlm_labels"].fill_(-100)
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            output = model(**batch)
        assert output.loss_mlm == 0
        output.loss.backward()
        assert not model.token_head.bias.grad.any()


@pytest.mark.parametrize("hard", [True, False])
def test_match_loss_takes_negatives_of_other_ids(
    make_config: MakeConfig, batch: dict[str, Tensor], hard: bool
) -> None:
    torch.manual_seed(0)
    model = SViTTForPreTraining(make_config(hard_negatives=hard, initializer_range=0.2)).eval()
    batch["pair_ids"] = torch.tensor([4, 9, 4])  # so every negative is certain but those of row 1
    losses = {float(model(**batch).loss_vtm.detach()) for _ in range(8)}
    video = model.encode_video(batch["pixel_values"]).states
    text = model.encode_text(batch["input_ids"], batch["attention_mask"]).states
    mask = batch["attention_mask"]

    def nll(text_row: int, video_row: int, label: int) -> Tensor:
        rows = [x[i : i + 1] for x, i in ((text, text_row), (mask, text_row), (video, video_row))]
        return -model.match_logits(*rows).log_softmax(-1)[0, label]

    positive = sum(nll(i, i, 1) for i in range(3))
    certain = nll(0, 1, 0) + nll(2, 1, 0) + nll(1, 0, 0) + nll(1, 2, 0)
    possible = {
        ((positive + certain + nll(1, a, 0) + nll(b, 1, 0)) / 9).item()
        for a in (0, 2)
        for b in (0, 2)
    }
    assert all(min(abs(x - y) for y in possible) < 1e-5 for x in losses) and len(losses) > 1


def test_rows_without_negative_are_left_out(
    model: SViTTForPreTraining, batch: dict[str, Tensor]
) -> None:
    model.eval()
    batch["pair_ids"] = torch.full((3,), 7)
    output = model(**batch)
    video = model.encode_video(batch["pixel_values"]).states
    text = model.encode_text(batch["input_ids"], batch["attention_mask"]).states
    logits = model.match_logits(text, batch["attention_mask"], video)
    wanted = F.cross_entropy(logits, torch.ones(3, dtype=torch.int64))
    torch.testing.assert_close(output.loss_vtm, wanted)
    model.zero_grad()
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    one = {name: value[:1] for name, value in batch.items()}
    assert model(**one).loss.isfinite()


def test_multimodal_pruning_acts_from_the_next_layer(
    make_config: MakeConfig, batch: dict[str, Tensor]
) -> None:
    torch.manual_seed(0)
    last = SViTTForPreTraining(make_config(multimodal_prune_layers=[1], initializer_range=0.2))
    first = SViTTForPreTraining(make_config(multimodal_prune_layers=[0]))
    never = SViTTForPreTraining(make_config(multimodal_keep_rate=1.0))
    for model in (first, never):
        model.load_state_dict(last.state_dict())
    video = last.eval().encode_video(batch["pixel_values"])
    mask = batch["attention_mask"]
    text = last.encode_text(batch["input_ids"], mask)
    arguments = (text.states, mask, video.states, video.indices)
    without = never.eval().fuse(*arguments)
    assert torch.equal(without.states, last.fuse(*arguments).states)
    assert torch.equal(without.video_indices, video.indices)
    found = first.eval().fuse(*arguments)
    assert not torch.allclose(without.states, found.states)
    kept = so.keep_count(0.5, video.indices.shape[1])
    assert found.video_indices.shape == (3, kept)
    # The patches of the first layer's highest cross-attention of the text's first token.
    layer = first.fusion.layers[0]
    states, scores = layer(text.states, mask == 0, video.states, "cls")
    places = so.select_tokens(scores[:, 1:], kept)
    assert torch.equal(found.video_indices, video.indices.gather(1, places))
    assert torch.equal(first.fuse(*arguments[:3]).video_indices, places)
    rows = torch.cat([torch.zeros(3, 1, dtype=torch.int64), places + 1], 1)
    fewer = video.states.gather(1, rows[:, :, None].expand(-1, -1, 32))
    wanted, _ = first.fusion.layers[1](states, mask == 0, fewer)
    torch.testing.assert_close(found.states, wanted)


@pytest.mark.parametrize("by", ["mean", "random"])
def test_multimodal_pruning_by_other_scores(
    make_config: MakeConfig, batch: dict[str, Tensor], by: str
) -> None:
    model = SViTTForPreTraining(make_config(multimodal_prune_by=by))
    video = model.encode_video(batch["pixel_values"])
    text = model.encode_text(batch["input_ids"], batch["attention_mask"])
    arguments = (text.states, batch["attention_mask"], video.states, video.indices)
    found = model.fuse(*arguments).video_indices
    assert found.shape[1] == so.keep_count(0.5, video.indices.shape[1])
    model.eval()
    assert torch.equal(model.fuse(*arguments).video_indices, model.fuse(*arguments).video_indices)


@pytest.mark.parametrize("case", ["one pair", "equal pairs", "shortest texts", "one frame"])
def test_unusual_batches(make_config: MakeConfig, batch: dict[str, Tensor], case: str) -> None:
    torch.manual_seed(0)
    model = SViTTForPreTraining(make_config(num_frames=1 if case == "one frame" else 4))
    if case == "one pair":
        batch = {name: value[:1] for name, value in batch.items()}
    elif case == "equal pairs":
        batch["pixel_values"] = batch["pixel_values"][:1].expand(3, -1, -1, -1, -1)
        batch["pair_ids"] = torch.tensor([5, 2, 5])
    elif case == "shortest texts":  # [CLS] and [SEP]
        batch["attention_mask"][:, 2:] = 0
    else:
        batch["pixel_values"] = batch["pixel_values"][:, :1]
    output = model(**batch)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_padding_of_texts_changes_nothing(
    model: SViTTForPreTraining, batch: dict[str, Tensor]
) -> None:
    model.eval()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    longer = F.pad(ids, (0, 3)), F.pad(mask, (0, 3))
    torch.testing.assert_close(
        model.encode_text(*longer).embeds, model.encode_text(ids, mask).embeds
    )
    with pytest.raises(ValueError, match="at most 16 tokens, got 17"):
        model.encode_text(torch.ones(1, 17, dtype=torch.int64), torch.ones(1, 17))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 6\), got \(3, 5\)"):
        model.encode_text(ids, mask[:, :5])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vector_of_a_clip(make_config: MakeConfig, batch: dict[str, Tensor], pooling: str) -> None:
    model = SViTTForPreTraining(make_config(video_pooling=pooling)).eval()
    tokens = model.video(batch["pixel_values"]).tokens
    pooled = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1)
    wanted = F.normalize(model.video_projection(model.pooler_norm(pooled)), dim=-1)
    torch.testing.assert_close(model.encode_video(batch["pixel_values"]).embeds, wanted)


def test_temperature(model: SViTTForPreTraining) -> None:
    for value, wanted in ((7.0, 0.5), (1e-5, 0.001), (0.1, 0.1)):
        with torch.no_grad():
            model.temperature.fill_(value)
        model.before_step()
        assert model.temperature.item() == pytest.approx(wanted)


def test_bf16_autocast(model: SViTTForPreTraining, batch: dict[str, Tensor]) -> None:
    model.config.drop_path_rate = 0.0
    torch.manual_seed(0)
    wanted = model(**batch).loss_vtc
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
        assert model.video(batch["pixel_values"]).tokens.dtype == torch.float32
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(output.loss_vtc, wanted, rtol=0.2, atol=0.2)


def test_stochastic_depth(make_config: MakeConfig) -> None:
    model = SViTTForPreTraining(make_config(drop_path_rate=0.5)).train()
    rates = [layer.add_mlp.drop_rate for layer in model.video.layers]
    assert rates == [0.0, 0.25, 0.5]
    residual = model.video.layers[2].add_mlp
    x, branch = torch.zeros(4000, 1, 32), torch.ones(4000, 1, 32)
    added = residual(x, branch)
    assert added[:, 0, 0].unique().tolist() == pytest.approx([0, 0.2])
    assert 0.45 < (added[:, 0, 0] == 0).float().mean() < 0.55
    torch.testing.assert_close(residual.eval()(x, branch), 0.1 * branch)


def test_save_and_load(make_config: MakeConfig, batch: dict[str, Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = make_config(token_order="hilbert", keep_rate=0.6, loss_weights={"vtc": 1, "mlm": 2})
    model = SViTTForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that nothing is as it begins
            parameter.uniform_(0.05, 0.2)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = SViTTForPreTraining.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for name, value in model.named_buffers():
        assert torch.equal(dict(loaded.named_buffers())[name], value), name
    ours, wanted = (
        one.encode_video(batch["pixel_values"]).states.detach() for one in (loaded, model)
    )
    assert torch.equal(ours, wanted)
    assert loaded.config.to_dict()["loss_weights"] == {"vtc": 1, "mlm": 2}
    # The decoder is the table of word embeddings itself, before and after.
    assert sum(v.numel() == 50 * 24 for v in loaded.state_dict().values()) == 1
    towers = SViTTModel.from_pretrained(tmp_path)
    assert torch.equal(towers.encode_video(batch["pixel_values"]).states, wanted)
    fewer = SViTTForPreTraining.from_pretrained(tmp_path, keep_rate=0.3)
    assert fewer.encode_video(batch["pixel_values"]).indices.shape[1] == 6

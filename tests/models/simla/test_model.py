"""SIMLA: sizes, what is masked, what becomes a label, visual tokens, and what is refused."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import FOLDER, Case
from momentum_cases import TINY, official
from torch import Tensor

from svitt_ops.models import (
    ALBEFConfig,
    ALBEFModel,
    SIMLAConfig,
    SIMLAForPreTraining,
    SIMLAForRetrieval,
    SIMLAModel,
)
from svitt_ops.models.simla import load_official, use_dalle
from svitt_ops.models.simla.masking import block_masks, keyword_targets, votes_of_heads
from svitt_ops.models.simla.tokenizer import ImageTokenizer, load_dalle

Make = Callable[..., SIMLAConfig]
OWN: dict[str, Any] = {
    "text_num_hidden_layers": 3,
    "fusion_layer": 0,
    "unpaired_layers": 1,
    "max_position_embeddings": 20,
    "image_vocab_size": 11,
    "masked_patches": 5,
}


@pytest.fixture
def make() -> Make:
    return lambda **changes: SIMLAConfig(**{**TINY, **OWN, **changes})


def size(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_the_base_model_s_size() -> None:
    with torch.device("meta"):
        model, albef = SIMLAForPreTraining(SIMLAConfig()), ALBEFModel(ALBEFConfig())
    parts = size(model.video, model.video_norm, model.text, model.fusion)
    assert parts - 768 == 223_101_696  # without the mask token
    of_albef = size(albef.video, albef.video_norm, albef.text, albef.fusion)
    assert parts - 768 - of_albef == 14_181_888
    heads = size(model.match_head, model.video_projection, model.text_projection)
    assert round((parts + heads) / 1e6, 2) == 223.50
    heads += size(model.token_head)
    assert round((parts + heads) / 1e6, 2) == 224.12
    heads += size(model.mim_head, model.concept_head)
    assert round((parts + heads) / 1e6, 2) == 238.26
    assert size(model.concept_head) == 7_844_154
    for one in (model, albef):  # 24 layers of attention over one modality, 12 and 6 of fusion
        assert len(one.video.layers) + len(one.text.layers) + len(one.fusion.layers) == 24
    assert len(model.fusion.layers) == 12 and len(albef.fusion.layers) == 6


def test_the_paper_s_concept_head(make: Make, pairs: dict[str, Tensor]) -> None:
    model = SIMLAForPreTraining(make(concept_source="cls"))
    assert model.concept_head.in_features == 32
    assert model(**pairs).loss_psl.isfinite()
    with torch.device("meta"):
        head = SIMLAForPreTraining(SIMLAConfig(concept_source="cls", momentum=None)).concept_head
    assert size(head) == 23_471_418


def test_every_parameter_learns(make: Make, pairs: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = SIMLAForPreTraining(make())
    output = model(**pairs)
    parts = [output[f"loss_{name}"] for name in ("vtc", "vtm", "mlm", "mim", "psl")]
    torch.testing.assert_close(output.loss, sum(parts))
    output.loss.backward()
    own = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    unused = [name for name, p in own if p.grad is None or not p.grad.any()]
    assert [name for name in unused if not name.endswith("key.bias")] == []
    assert not any(name.startswith(("teacher.", "tokenizer.")) for name, _ in own)


def test_a_loss_of_weight_0_is_left_out(make: Make, pairs: dict[str, Tensor]) -> None:
    model = SIMLAForPreTraining(make(loss_weights={"mim": 0, "psl": 0}))
    assert not SIMLAForPreTraining(make()).leaves_parameters_unused
    assert SIMLAForRetrieval(make()).leaves_parameters_unused
    output = model(**pairs)
    assert output.loss_mim is None and output.loss_psl is None and model.tokenizer is None
    assert model.leaves_parameters_unused


def test_pretraining_at_another_resolution(
    make: Make, pairs: dict[str, Tensor], tmp_path: Path
) -> None:
    SIMLAForPreTraining(make(max_position_embeddings=40)).save_pretrained(tmp_path)
    model = SIMLAForPreTraining.from_pretrained(tmp_path, image_size=48)
    larger = pairs | {"pixel_values": F.interpolate(pairs["pixel_values"], (48, 48))}
    assert model.train()(**larger).loss.isfinite()


def test_texts_alone_and_over_images_share_the_encoder(
    make: Make, pairs: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = SIMLAForRetrieval(make()).eval()
    text = model.encode_text(pairs["input_ids"], pairs["attention_mask"])
    words = model.text.embeddings(pairs["input_ids"])
    assert torch.equal(text.states, words) and len(model.text.layers) == 0
    video = model.encode_video(pairs["pixel_values"]).states
    read = model.read_image(video, words, pairs["attention_mask"])
    assert read.shape == (3, 17, 32)
    # Padding of the text is not read.
    other = torch.where(pairs["attention_mask"][..., None] != 0, words, words + 5)
    assert torch.equal(model.read_image(video, other, pairs["attention_mask"]), read)
    model.save_pretrained(tmp_path)
    again = SIMLAForRetrieval.from_pretrained(tmp_path)
    found = again.encode_text(pairs["input_ids"], pairs["attention_mask"])
    assert torch.equal(found.embeds, text.embeds)


@pytest.mark.parametrize(("side", "count"), [(16, 75), (16, 102), (4, 5), (2, 1), (3, 9)])
def test_masks_are_blocks_of_no_more_than_asked(side: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = block_masks(200, side, count, generator=generator)
    masked = masks.sum(1)
    assert masks.shape == (200, side * side) and masked.max() <= count and masked.min() >= 0
    if side == 16:
        assert masked.float().mean() > 0.9 * count
        # Blocks: a masked patch's neighbour is masked far more often than any patch.
        grid = masks.view(-1, side, side)
        beside = (grid[:, :, 1:] & grid[:, :, :-1]).sum() / grid[:, :, :-1].sum()
        assert beside > 2 * masks.float().mean()
        places = masks.float().mean(0)
        assert places.min() > 0 and not torch.equal(masks[0], masks[1])
    again = block_masks(200, side, count, generator=torch.Generator().manual_seed(0))
    assert torch.equal(masks, again)


def test_labels_of_votes() -> None:
    """At most so many, none at [CLS], the first place where votes are equal, none without one."""
    attention = torch.tensor([[[0.4, 0.3, 0.2, 0.1, 0.0], [0.4, 0.1, 0.2, 0.0, 0.3]]])
    votes = votes_of_heads(attention, 2)
    assert votes.tolist() == [[2, 1, 0, 0, 1]]
    ids, allowed = torch.tensor([[1, 7, 8, 9, 6]]), torch.ones(1, 5, dtype=torch.bool)

    def labels(count: int, allowed: Tensor = allowed) -> list[int]:
        found = keyword_targets(votes, ids, allowed, count, 10)
        return found[0].nonzero().flatten().tolist()

    assert labels(1) == [] and labels(2) == [7] and labels(3) == labels(5) == [6, 7]
    assert labels(5, torch.tensor([[True, False, True, True, True]])) == [6]
    torch.manual_seed(0)
    for _ in range(20):
        attention = torch.rand(3, 12, 9).softmax(-1)
        ids = torch.randint(2, 40, (3, 9))
        ids[:, 0] = 1
        found = keyword_targets(votes_of_heads(attention, 4), ids, ids > 0, 5, 40)
        assert found.sum(1).max() <= 5 and not found[:, 1].any() and found.any()


@pytest.mark.parametrize("rule", ["votes", "mean"])
def test_excluded_pieces_and_padding_are_no_labels(
    make: Make, pairs: dict[str, Tensor], rule: str
) -> None:
    torch.manual_seed(0)
    excluded = int(pairs["input_ids"][0, 3])
    model = SIMLAForPreTraining(make(keyword_rule=rule, keyword_excluded_ids=[excluded]))
    ids, mask = pairs["input_ids"], pairs["attention_mask"]
    video = model.encode_video(pairs["pixel_values"])
    labels = model.labels(model.encode_text(ids, mask).states, ids, mask, video.states)
    assert labels.any() and not labels[:, excluded].any() and not labels[:, 0].any()
    assert not labels.gather(1, ids[:, :1]).any()
    assert labels.sum(1).max() <= (5 if rule == "votes" else 4)
    with_words = torch.zeros_like(labels).scatter(1, ids, 1)
    assert (labels <= with_words).all()
    words = model.encode_text(ids, mask).states
    light = SIMLAForPreTraining(make(keyword_rule=rule, keyword_excluded_ids=[excluded]))
    light.load_state_dict(model.state_dict())
    light.teacher = None  # weights for use: the model is its own twin
    for reader in (model, light):
        places, chosen = reader.label_places(words, ids, mask, video.states)
        found = torch.zeros_like(labels)
        found.scatter_reduce_(1, ids.gather(1, places), chosen.float(), "amax")
        assert torch.equal(found, labels)
    attention = model.attention_of_patches(video.states, words, mask, layer=2)
    assert attention.shape == (3, 16, 6) and not attention[1, :, 4:].any()
    torch.testing.assert_close(attention.sum(2), torch.ones(3, 16))


def test_losses_mixed_are_losses_of_mixed_targets(make: Make, pairs: dict[str, Tensor]) -> None:
    """The paper's equations 3, 4, 8 and 9 add losses; cross-entropy is linear in its targets."""
    torch.manual_seed(0)
    model = SIMLAForPreTraining(make()).eval()
    with torch.no_grad():
        found, hard, soft = (
            model(**pairs, alpha=x, masked_patches=torch.ones(3, 16, dtype=torch.bool))
            for x in (0.3, 0.0, 1.0)
        )
    for name in ("loss_vtc", "loss_mlm", "loss_mim", "loss_psl"):
        torch.testing.assert_close(found[name], 0.7 * hard[name] + 0.3 * soft[name])


def test_visual_tokens(make: Make, pairs: dict[str, Tensor]) -> None:
    """An untrained tokenizer tells patches apart; trained, it makes images of its tokens."""
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(4, 16, width=8)
    images = F.interpolate(torch.rand(6, 3, 4, 4), (64, 64)) * 2 - 1
    found = tokenizer.tokens(images)
    assert found.shape == (6, 16) and found.unique().numel() > 2
    assert torch.equal(found, tokenizer.tokens(images[:, None]))
    pixels = tokenizer.pixels(images)
    assert pixels.shape == (6, 3, 32, 32) and pixels.min() >= 0.1 and pixels.max() <= 0.9 + 1e-6
    optimizer = torch.optim.Adam(tokenizer.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = tokenizer(images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model = SIMLAForPreTraining(make(image_vocab_size=16))
    model.tokenizer = tokenizer
    assert model(**pairs).loss_mim.isfinite()
    model.tokenizer = None
    with pytest.raises(ValueError, match="visual_token_ids must be given without a tokenizer"):
        model(**pairs)
    with pytest.raises(
        ValueError, match=r"visual_token_ids must have shape \(3, 16\), got \(3, 4\)"
    ):
        model(**pairs, visual_token_ids=torch.zeros(3, 4, dtype=torch.int64))


def dalle(width: int, vocab_size: int, depth: int) -> dict[str, Tensor]:
    """Tensors by the names of the published encoder."""
    found, dim = {}, width

    def add(name: str, *shape: int) -> None:
        found[f"{name}.w"], found[f"{name}.b"] = torch.randn(shape), torch.randn(shape[0])

    add("blocks.input", width, 3, 7, 7)
    for group in range(4):
        for block in range(depth):
            out, name = width * 2**group, f"blocks.group_{group + 1}.block_{block + 1}"
            if dim != out:
                add(f"{name}.id_path", out, dim, 1, 1)
            for number, (to, of, side) in enumerate(
                (
                    (out // 4, dim, 3),
                    (out // 4, out // 4, 3),
                    (out // 4, out // 4, 3),
                    (out, out // 4, 1),
                )
            ):
                add(f"{name}.res_path.conv_{number + 1}", to, of, side, side)
            dim = out
    add("blocks.output.conv", vocab_size, dim, 1, 1)
    return found


def test_dall_e_s_encoder_loads() -> None:
    torch.manual_seed(0)
    tensors = dalle(8, 12, 2)
    tokenizer = ImageTokenizer(2, 12, width=8, depth=2)
    load_dalle(tokenizer, tensors)
    assert len(tokenizer.encoder.state_dict()) == len(tensors)
    # By the published formulas.
    x = tokenizer.pixels(torch.rand(1, 3, 16, 16))
    found, gain = tokenizer.encoder(x), 1 / 8**2

    def apply(name: str, x: Tensor) -> Tensor:
        weight = tensors[f"{name}.w"]
        return F.conv2d(x, weight, tensors[f"{name}.b"], padding=(weight.shape[-1] - 1) // 2)

    x = apply("blocks.input", x)
    for group in range(1, 5):
        for block in (1, 2):
            name, branch = f"blocks.group_{group}.block_{block}", x
            for number in range(1, 5):
                branch = apply(f"{name}.res_path.conv_{number}", branch.relu())
            shortcut = apply(f"{name}.id_path", x) if f"{name}.id_path.w" in tensors else x
            x = shortcut + gain * branch
        x = F.max_pool2d(x, 2) if group < 4 else x
    torch.testing.assert_close(found, apply("blocks.output.conv", x.relu()))
    with torch.device("meta"):
        whole = ImageTokenizer(16, width=256, depth=2)
        names = dalle(256, 8192, 2)
    assert size(whole.encoder) == sum(x.numel() for x in names.values()) == 53_786_240
    del tensors["blocks.input.b"]
    with pytest.raises(ValueError, match=r"load_dalle: stem.bias must have shape \(8,\), got None"):
        load_dalle(tokenizer, tensors)


def test_dalle_in_a_model(make: Make, pairs: dict[str, Tensor], tmp_path: Path) -> None:
    """From a file, whose sizes the configuration takes over; and what is refused."""
    torch.manual_seed(0)
    tensors = dalle(8, 11, 2)
    file = tmp_path / "dalle.pt"
    torch.save(tensors, file)
    model = SIMLAForPreTraining(make())
    use_dalle(model, file)
    assert torch.equal(model.tokenizer.encoder.stem.weight, tensors["blocks.input.w"])
    assert not any(x.requires_grad for x in model.tokenizer.parameters())
    assert (model.config.tokenizer_width, model.config.tokenizer_depth) == (8, 2)
    again = SIMLAForPreTraining(model.config)
    again.load_state_dict(model.state_dict())
    found = [x.tokenizer.tokens(pairs["pixel_values"]) for x in (model, again)]
    assert torch.equal(*found) and found[0].unique().numel() > 1
    assert model(**pairs).loss_mim > 0
    for source, message in (
        (dalle(4, 12, 1), r"head.bias must have shape \(11,\), got \(12,\)"),
        ({"a": torch.ones(1)}, "must be DALL-E's encoder, .* got 1 tensors, the first 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            use_dalle(again, source)
    assert (again.config.tokenizer_width, again.config.tokenizer_depth) == (8, 2)
    file.write_bytes(pickle.dumps(Path("runs")))
    with pytest.raises(ValueError, match=r"read_tensors: .*dalle\.pt"):
        use_dalle(model, file)
    with pytest.raises(ValueError, match="SIMLAForRetrieval: must have a tokenizer to take DALL-E"):
        use_dalle(SIMLAForRetrieval(make()), tensors)


def test_what_tasks_start_from() -> None:
    """`key_maps.json`: an answer decoder from the last layers, and layers doubled from the 7th."""
    maps = json.loads((FOLDER / "simla" / "key_maps.json").read_text())["tasks"]
    fields = Case("simla/pretrain").fields() | {"decoder_layers": 6, "text_num_hidden_layers": 12}
    config, tensors = SIMLAConfig(**fields), {}
    for name, value in Case("simla/pretrain").state().items():
        layers = range(12) if ".layer.0." in name else range(1)
        for layer in layers:
            if ".layer." not in name or ".layer.0." in name:
                new = name.replace(".layer.0.", f".layer.{layer}.")
                tensors[new] = torch.rand(value.shape).to(value.dtype)
    assert list(maps)[1].startswith("vqa"), list(maps)
    model = load_official(tensors, config, task="question_answering")
    state, count = model.state_dict(), 0
    for downstream, pretraining in maps[list(maps)[1]]["loaded"].items():
        if "position_ids" in downstream or "predictions.decoder" in downstream:
            continue
        found = official(downstream, model, state.__getitem__)
        assert torch.equal(found.flatten(), tensors[pretraining].flatten()), downstream
        count += 1
    assert count > 20
    paired = load_official(
        tensors, SIMLAConfig(**fields | {"unpaired_layers": 6}), task="visual_reasoning"
    )
    for number, layer in enumerate(paired.fusion.second):
        wanted = tensors[f"text_encoder.bert.encoder.layer.{6 + number}.intermediate.dense.weight"]
        assert torch.equal(layer.mlp.up.weight, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion_layer": 1}, "fusion_layer must be 0: every layer fuses, got 1"),
        ({"text_hidden_size": 16}, r"text_hidden_size must be hidden_size \(32\): one encoder"),
        ({"masked_patches": 17}, "masked_patches must be 1 to 16, got 17"),
        ({"keyword_rule": "sum"}, "keyword_rule must be one of .*, got 'sum'"),
        ({"concept_source": "x"}, "concept_source must be one of .*, got 'x'"),
        ({"keyword_layer": 3}, "keyword_layer must be -3 to 2, got 3"),
        ({"max_position_embeddings": 16}, "max_position_embeddings must be more than the 16 patch"),
        ({"compat": "albef-official"}, "compat must be one of .*, got 'albef-official'"),
    ],
)
def test_configurations_that_cannot_be(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^SIMLAConfig: {message}"):
        make(**changes)


def test_a_tower_without_a_mask_token_masks_nothing(make: Make) -> None:
    model = ALBEFModel(ALBEFConfig(**TINY))
    pixels, masked = torch.zeros(1, 3, 32, 32), torch.ones(1, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="VideoTower: masked must be None"):
        model.encode_video(pixels, masked)
    simla = SIMLAModel(make())
    with pytest.raises(ValueError, match=r"masked must be bool of shape \(1, 16\), got .*int64"):
        simla.encode_video(pixels, masked.long())
    assert torch.equal(
        simla.encode_video(pixels, masked).states, simla.encode_video(pixels + 1, masked).states
    )

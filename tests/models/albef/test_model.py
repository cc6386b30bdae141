"""ALBEF: sizes, gradients, what the modules share, and what is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from momentum_cases import TINY
from torch import Tensor

from svitt_ops.models import (
    ALBEFConfig,
    ALBEFForPreTraining,
    ALBEFForQuestionAnswering,
    ALBEFForRetrieval,
    ALBEFForTextAssignment,
    ALBEFForVisualEntailment,
    ALBEFForVisualReasoning,
    change_image_size,
)
from svitt_ops.models.parts.grounding import class_maps, keep_attention

Make = Callable[..., ALBEFConfig]


@pytest.fixture
def make() -> Make:
    return lambda **changes: ALBEFConfig(**{**TINY, **changes})


def test_the_base_model_s_size() -> None:
    with torch.device("meta"):
        model = ALBEFForPreTraining(ALBEFConfig())
    parts = (model.video, model.video_norm, model.text, model.fusion)
    assert sum(p.numel() for part in parts for p in part.parameters()) == 208_919_808
    assert model.queue.video.shape == (65536, 256)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    twin = sum(p.numel() for p in model.teacher.parameters())
    assert learned - twin == 2 * 768 + 2 + 1  # the match head and the temperature


def test_every_parameter_learns(make: Make, pairs: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = ALBEFForPreTraining(make())
    output = model(**pairs)
    torch.testing.assert_close(output.loss, output.loss_vtc + output.loss_vtm + output.loss_mlm)
    output.loss.backward()
    own = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    unused = [name for name, p in own if p.grad is None or not p.grad.any()]
    assert [name for name in unused if not name.endswith("key.bias")] == []
    optimizer = torch.optim.AdamW([p for _, p in own], 1e-3)
    first = output.loss.item()
    for _ in range(8):
        model.before_step()
        optimizer.zero_grad()
        loss = model(**pairs).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < first


def test_one_frame_is_an_image(make: Make, pairs: dict[str, Tensor]) -> None:
    model = ALBEFForRetrieval(make()).eval()
    pixels = pairs["pixel_values"]
    found, wanted = (model.encode_video(x).states for x in (pixels[:, None], pixels))
    assert torch.equal(found, wanted) and found.shape == (3, 17, 32)
    with pytest.raises(ValueError, match="VideoTower: pixel_values must have 1 to 1 frames, got 2"):
        model.encode_video(pixels[:, None].repeat(1, 2, 1, 1, 1))
    change_image_size(model, 48)
    larger = torch.zeros(3, 3, 48, 48)
    assert model.encode_video(larger).states.shape == (3, 37, 32)
    twin = model.teacher.video
    assert torch.equal(twin.patch_positions, model.video.patch_positions)
    assert not twin.patch_positions.requires_grad and model.video.patch_positions.requires_grad
    model.before_step()
    assert model(larger, pairs["input_ids"], pairs["attention_mask"]).loss.isfinite()


def test_images_come_to_the_weights_mean_and_deviation(
    make: Make, pairs: dict[str, Tensor]
) -> None:
    model = ALBEFForRetrieval(make()).eval()
    given = torch.rand(3, 3, 32, 32)
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (model.config.image_mean, model.config.image_std)
    )
    wanted = model.video_norm(model.video(((given - mean) / std)[:, None]).tokens)
    torch.testing.assert_close(model.encode_video(given * 2 - 1).states, wanted)


def test_a_pair_shares_keys_and_values(
    make: Make, pairs: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    start = ALBEFForPreTraining(make())
    start.save_pretrained(tmp_path / "start")
    model = ALBEFForVisualReasoning.from_pretrained(tmp_path / "start")
    for layer in range(2):
        one, two = (x[layer].cross_attention for x in (model.fusion.layers, model.fusion.second))
        assert two.key is one.key and two.value is one.value and two.query is not one.query
        assert torch.equal(one.query.weight, two.query.weight)
        assert torch.equal(
            one.query.weight, start.fusion.layers[layer].cross_attention.query.weight
        )
    other = copy.deepcopy(model)
    assert other.fusion.second[0].cross_attention.key is other.fusion.layers[0].cross_attention.key
    pixels = torch.stack([pairs["pixel_values"], pairs["pixel_values"].flip(0)], 1)
    output = model(pixels, pairs["input_ids"], pairs["attention_mask"], torch.tensor([0, 1, 1]))
    output.loss.backward()
    assert model.fusion.second[1].cross_attention.query.weight.grad.any()
    model.save_pretrained(tmp_path / "model")
    loaded = ALBEFForVisualReasoning.from_pretrained(tmp_path / "model")
    arguments = (pixels, pairs["input_ids"], pairs["attention_mask"])
    assert torch.equal(loaded.eval()(*arguments).logits, model.eval()(*arguments).logits)
    swapped = (pixels.flip(1), *arguments[1:])
    assert not torch.allclose(model(*swapped).logits, model(*arguments).logits)
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(batch, 2, 3, height, w"):
        model(pairs["pixel_values"], *arguments[1:])


def test_text_assignment_needs_other_images(make: Make, pairs: dict[str, Tensor]) -> None:
    model = ALBEFForTextAssignment(make())
    arguments = [pairs[name] for name in ("pixel_values", "input_ids", "attention_mask")]
    output = model(*arguments)
    assert output.logits.shape == (3, 3)
    output.loss.backward()
    with pytest.raises(ValueError, match="pixel_values must be of at least 3 images, got 2"):
        model(*(x[:2] for x in arguments))


def test_an_answer_decoder_and_its_twin_start_from_the_fusion_layers(
    make: Make, tmp_path: Path
) -> None:
    start = ALBEFForPreTraining(make())
    start.save_pretrained(tmp_path)
    model = ALBEFForQuestionAnswering.from_pretrained(tmp_path)
    for of in (model, model.teacher):
        for name in ("attention", "cross_attention"):
            found = getattr(of.decoder.layers[1], name).query.weight
            assert torch.equal(found, getattr(start.fusion.layers[1], name).query.weight)


def test_questions_share_an_image_with_the_twin_too(make: Make, pairs: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = ALBEFForQuestionAnswering(make())
    pixels, ids, mask = (pairs[x] for x in ("pixel_values", "input_ids", "attention_mask"))
    numbers = torch.tensor([1, 0, 1])
    text = (ids[:3], mask[:3], ids[:3, :4], mask[:3, :4])
    shared = model(pixels[:2], *text, clip_numbers=numbers, alpha=0.4)
    apart = model(pixels[numbers], *text, alpha=0.4)
    torch.testing.assert_close(shared.answer_losses, apart.answer_losses)
    alone = model(pixels[:2], *text, clip_numbers=numbers, alpha=0.0)
    assert not torch.allclose(shared.loss, alone.loss)  # so the twin has read them


@pytest.mark.parametrize("pictures", [1, 2])
def test_texts_share_images_with_the_twin_too(
    make: Make, pairs: dict[str, Tensor], pictures: int
) -> None:
    torch.manual_seed(0)
    kind = (ALBEFForVisualEntailment, ALBEFForVisualReasoning)[pictures - 1]
    model = kind(make(drop_path_rate=0.0))
    pixels, ids, mask = (pairs[x] for x in ("pixel_values", "input_ids", "attention_mask"))
    numbers = torch.tensor([[1, 0], [0, 1], [1, 1]])[:, :pictures].squeeze(1)
    text, labels = (ids[:3], mask[:3]), torch.tensor([0, 1, 1])
    shared = model(pixels[:2], *text, labels, numbers, alpha=0.4)
    apart = model(pixels[numbers], *text, labels, alpha=0.4)
    torch.testing.assert_close(shared.logits, apart.logits)
    torch.testing.assert_close(shared.loss, apart.loss)
    with pytest.raises(ValueError, match=r"clip_numbers must have shape \(3,( 2)?\), got \(2,"):
        model(pixels[:2], *text, labels, numbers[:2])


def test_only_one_layer_leaves_the_fused_kernels(make: Make, pairs: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = ALBEFForRetrieval(make()).eval()
    mask = pairs["attention_mask"]
    video = model.encode_video(pairs["pixel_values"])
    text = model.encode_text(pairs["input_ids"], mask)
    found = model.word_maps(text.states, mask, video.states)
    assert found.attention.shape == (3, 2, 6, 16) and found.words.shape == (3, 6, 16)
    assert (found.words >= 0).all() and found.words.any()
    assert (found.words[1, 4:] == 0).all() and (found.attention.sum(-1) <= 1 + 1e-6).all()
    plain = model.match_logits(text.states, mask, video.states)
    torch.testing.assert_close(found.logits, plain)
    assert all(p.grad is None for p in model.parameters())
    layer = model.fusion.layers[1].cross_attention
    with pytest.raises(RuntimeError, match="stop"), keep_attention(layer):
        raise RuntimeError("stop")
    assert "forward" not in layer.__dict__
    with torch.no_grad():
        assert torch.equal(model.word_maps(text.states, mask, video.states).words, found.words)
    for wrong in (1, 4):
        with pytest.raises(ValueError, match=f"layer must be a fusion layer, 2 to 3, got {wrong}"):
            model.word_maps(text.states, mask, video.states, layer=wrong)
    with pytest.raises(ValueError, match="class_maps: layer must be 0 to 1, got 2"):
        class_maps(model, pairs["pixel_values"], text.embeds, layer=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 2}, "num_frames must be 1: ALBEFConfig is of images, and dense, got 2"),
        ({"keep_rate": 0.7}, "keep_rate must be 1: .*, got 0.7"),
        ({"momentum": 1.5}, "momentum must be a number from 0 to 1, got 1.5"),
        ({"alpha": -1}, "alpha must be a number from 0 to 1, got -1"),
        ({"image_mean": [0.5]}, r"image_mean must be three numbers, got \[0.5\]"),
        ({"image_std": [1, 1, 0]}, "image_std must be three positive numbers, got .*"),
        ({"queue_size": 0}, "queue_size must be an integer of at least 1, got 0"),
        ({"unpaired_layers": 3}, "unpaired_layers must be 0 to 2, got 3"),
        ({"compat": "svitt-official"}, "compat must be one of .*, got 'svitt-official'"),
    ],
)
def test_configurations_that_cannot_be(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^ALBEFConfig: {message}"):
        make(**changes)

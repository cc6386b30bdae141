"""COOKIE: what its parts share, its losses, and what cannot be."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from svitt_ops.models import (
    COOKIEConfig,
    COOKIEForHashing,
    COOKIEForPreTraining,
    COOKIEForRetrieval,
    COOKIEModel,
)
from svitt_ops.models.cookie.hashing import hash_centres, hash_targets
from svitt_ops.models.cookie.losses import triplet_loss
from svitt_ops.models.cookie.pooling import GeneralizedPooling, MeanPooling, leave_out
from svitt_ops.models.parts.expansion import expand_frames

STILL: dict[str, Any] = {"jitter": 0.0, "grayscale_rate": 0.0, "blur_rate": 0.0}
PAIRS = ("pixel_values", "input_ids", "attention_mask", "pair_ids")
Batch = dict[str, Tensor]
Make = Callable[..., COOKIEConfig]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sizes_of_the_paper() -> None:
    """512 pixels are 256 features; sharing costs no parameter; three layers are 18.9 M."""
    config = COOKIEConfig()
    assert config.grid_size**2 == 256
    with torch.device("meta"):
        model = COOKIEModel(config)
        own = COOKIEModel(COOKIEConfig(weight_sharing="unshared"))
        resnext = COOKIEModel(
            COOKIEConfig(cnn_depths=[3, 4, 23, 3], cnn_groups=32, cnn_group_width=8)
        )
    layers = count(model.shared) + count(model.video.layers)
    assert round(layers / 1e6, 1) == 18.9
    assert count(own) - count(model) == count(model.shared)
    assert count(model.video.cnn) == 23_508_032  # ResNet-50 without its classes
    assert count(resnext.video.cnn) == 86_742_336  # ResNeXt-101 32x8d without them


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_sharing": "unshared", "pooling": "gpo"},
        {"weight_sharing": "fc", "cnn_layer": "basic"},
        {"shared_layers": 0, "num_hidden_layers": 2},
        {"contrast_views": "augmented", "cnn_groups": 2, "cnn_group_width": 4},
    ],
)
def test_every_weight_learns(changes: dict[str, Any], make: Make, batch: Batch) -> None:
    torch.manual_seed(0)
    model = COOKIEForPreTraining(make(**changes)).train()
    output = model(**batch)
    output.loss.backward()
    parts = output.loss_ccl, output.loss_vcl, output.loss_tcl
    torch.testing.assert_close(output.loss, sum(parts))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Without effect: no softmax, nor a batch's statistics, depends on what is added to all.
    unused = ("key.bias", "word.weight", "position.weight", "token_type.weight")
    assert all(name.endswith(unused) for name in still)


def test_losses_are_those_of_the_paper(make: Make, batch: Batch) -> None:
    """Equation 5, written out: InfoNCE of images and texts both ways, of views one way."""
    torch.manual_seed(0)
    model = COOKIEForPreTraining(make(cnn_norm="frozen", **STILL)).train()
    output = model(**batch)

    def info_nce(query: Tensor, key: Tensor) -> Tensor:
        return F.cross_entropy(query @ key.T / 0.07, torch.arange(len(query)))

    ids, masks = batch["view_input_ids"], batch["view_attention_mask"]
    images = [model.encode_video(x).embeds for x in batch["view_pixel_values"].unbind(1)]
    texts = [model.encode_text(ids[:, k], masks[:, k]).embeds for k in (0, 1)]
    image, text = (
        model.encode_video(batch["pixel_values"]).embeds,
        model.encode_text(batch["input_ids"], batch["attention_mask"]).embeds,
    )
    torch.testing.assert_close(output.loss_ccl, info_nce(image, text) + info_nce(text, image))
    torch.testing.assert_close(output.loss_vcl, info_nce(*images))
    torch.testing.assert_close(output.loss_tcl, info_nce(*texts))
    model.config.contrast_views = "augmented"
    found = model(**batch).loss_ccl
    torch.testing.assert_close(found, info_nce(images[0], texts[0]) + info_nce(texts[0], images[0]))
    alone = COOKIEForPreTraining(make(loss_weights={"vcl": 0, "tcl": 0}, cnn_norm="frozen"))
    alone.load_state_dict(model.state_dict())
    first = alone.train()(**{name: batch[name] for name in PAIRS})
    assert first.loss_vcl is None and first.loss_tcl is None
    torch.testing.assert_close(first.loss, output.loss_ccl)
    assert not alone.leaves_parameters_unused


def test_views_are_distorted_only_while_training(make: Make, batch: Batch) -> None:
    model = COOKIEForPreTraining(make(cnn_norm="frozen", jitter=0.9))
    found = [model.train(mode)(**batch) for mode in (True, False, False)]
    assert found[0].loss_vcl != found[1].loss_vcl == found[2].loss_vcl
    torch.testing.assert_close(found[0].loss_ccl, found[1].loss_ccl)


@pytest.mark.parametrize("pooling", ["mean", "gpo"])
def test_under_autocast(pooling: str, make: Make, batch: Batch) -> None:
    """Embeddings and the hardest negatives are those of fp32, but for the towers' rounding."""
    torch.manual_seed(0)
    model = COOKIEForRetrieval(make(pooling=pooling, cnn_norm="frozen")).train()
    arguments = {name: batch[name] for name in PAIRS}
    wanted = model(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**arguments)
        images, texts = found.video_embeds, found.text_embeds
        assert triplet_loss(images, texts, 0.2) == found.loss_match
    assert triplet_loss(images, texts, 0.2) == found.loss_match
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, wanted.video_embeds, atol=0.05, rtol=0)
    found.loss.backward()


def test_both_modalities_go_through_the_same_layers(make: Make) -> None:
    """The same states have the same embedding, whichever they are of."""
    model = COOKIEModel(make()).eval()
    states = torch.randn(2, 16, 32)
    torch.testing.assert_close(
        model.shared(states), model.shared(states, torch.zeros(2, 16, dtype=torch.bool))
    )
    other = COOKIEModel(make(weight_sharing="unshared")).eval()
    assert not torch.allclose(other.shared(states), other.text_shared(states))


@pytest.mark.parametrize("pooling", ["mean", "gpo"])
def test_padding_changes_nothing(pooling: str, make: Make, batch: Batch) -> None:
    model = COOKIEModel(make(pooling=pooling)).eval()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    short = model.encode_text(ids[1:2, :5], mask[1:2, :5]).embeds
    torch.testing.assert_close(model.encode_text(ids, mask).embeds[1:2], short)


def test_pooling() -> None:
    tokens, lengths = torch.randn(3, 6, 4), torch.tensor([6, 1, 3])
    pools: tuple[Any, ...] = (MeanPooling(), GeneralizedPooling(8))
    for pool in pools:
        found = pool(tokens, lengths)
        torch.testing.assert_close(found[1], tokens[1, 0])
        torch.testing.assert_close(found[2:], pool(tokens[2:, :3]))
        torch.testing.assert_close(pool(tokens.flip(1)), pool(tokens))
    torch.testing.assert_close(pools[1].weights(lengths).sum(1), torch.ones(3))


def test_features_are_left_out_only_while_training(make: Make, batch: Batch) -> None:
    torch.manual_seed(0)
    model = COOKIEModel(make(feature_drop=0.9, cnn_norm="frozen"))
    pixels = batch["pixel_values"]
    found = [model.train(mode).encode_video(pixels) for mode in (True, False, False)]
    torch.testing.assert_close(found[0].states, found[1].states)
    assert torch.equal(found[1].embeds, found[2].embeds)
    assert not torch.isclose(found[0].embeds, found[1].embeds).all(1).any()

    tokens = torch.arange(2000.0).repeat(500, 1)[..., None]
    kept, lengths = leave_out(tokens, 0.2)
    assert 1500 < lengths.min() < 1700 and 1780 < lengths.float().mean() < 1820
    assert torch.equal(kept.sort(1).values, tokens)  # the same ones in another order
    places = kept[torch.arange(2000) < lengths[:, None]]
    assert abs(places.mean() - 999.5) < 5
    assert leave_out(torch.ones(50, 1, 2), 0.99)[1].tolist() == [1] * 50


def test_the_hardest_negative() -> None:
    """Not a likely one: also where similarities differ by no more than rounding."""
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(64, 16), dim=1) for _ in range(2))
    texts[5] = F.normalize(texts[4] + 1e-6 * torch.randn(16), dim=0)
    images, texts = images.requires_grad_(), texts.requires_grad_()
    scores = images @ texts.T
    own = scores.diagonal()
    other = scores.masked_fill(torch.eye(64) > 0, -torch.inf)
    wanted = (0.2 + other.amax(1) - own).clamp(min=0).sum()
    wanted = wanted + (0.2 + other.amax(0) - own).clamp(min=0).sum()
    torch.testing.assert_close(triplet_loss(images, texts, 0.2), wanted)
    ids = torch.arange(64) // 64
    assert triplet_loss(images, texts, 0.2, ids=ids) == 0  # all of one
    for negatives in ("hardest", "all"):
        found = triplet_loss(images, texts, 0.2, negatives=negatives, ids=torch.arange(64) // 2)  # type: ignore[arg-type]
        assert 0 < found < triplet_loss(images, texts, 0.2, negatives="all")
    broken = torch.where(torch.arange(64)[:, None] == 3, torch.nan, images)
    assert triplet_loss(broken, texts, 0.2).isnan()
    with pytest.raises(ValueError, match=r"texts must have the shape of images, .* got \(3, 16\)"):
        triplet_loss(images, texts[:3], 0.2)
    for ids in (torch.arange(64)[:, None], torch.arange(1), torch.rand(64)):
        with pytest.raises(ValueError, match=r"ids must be int64 of shape \(64,\), got"):
            triplet_loss(images, texts, 0.2, negatives="all", ids=ids)


@pytest.mark.parametrize("kind", ["triplet", "sum", "contrastive"])
def test_retrieval(kind: str, make: Make, batch: Batch) -> None:
    torch.manual_seed(0)
    model = COOKIEForRetrieval(make(match_loss=kind, loss_weights={"match": 0.5}))
    output = model.train()(**{name: batch[name] for name in PAIRS})
    torch.testing.assert_close(output.loss, output.loss_match / 2)
    assert output.loss > 0
    output.loss.backward()


def test_features_of_videos(make: Make, batch: Batch, tmp_path: Path) -> None:
    config = make(feature_size=24, num_frames=5, pooling="gpo", match_loss="contrastive")
    model = COOKIEForRetrieval(config).train()
    assert not hasattr(model.video, "cnn")
    output = model(torch.randn(4, 5, 24), *(batch[name] for name in PAIRS[1:]))
    output.loss.backward()
    model.eval()
    assert model.encode_video(torch.randn(2, 3, 24)).states.shape == (2, 3, 32)
    model.save_pretrained(tmp_path)
    longer = COOKIEForRetrieval.from_pretrained(tmp_path, num_frames=7)
    assert longer.video.patch_positions.shape == (7, 1, 32)
    for shape in ((2, 6, 24), (2, 0, 24), (2, 5, 23), (5, 24)):
        with pytest.raises(ValueError, match=r"features must have shape \(batch, 1 to 5, 24\)"):
            model.encode_video(torch.randn(*shape))
    with pytest.raises(ValueError, match="feature_size must be None, got 24"):
        COOKIEForHashing(config)
    for weight in ({"vcl": 1}, {}):
        with pytest.raises(ValueError, match=r"loss_weights\['vcl'\] must be 0 with feature_size"):
            COOKIEForPreTraining(make(feature_size=24, loss_weights=weight))
    COOKIEForPreTraining(make(feature_size=24, loss_weights={"vcl": 0}))


def test_folders(make: Make, batch: Batch, tmp_path: Path, caplog: Any) -> None:
    """Pretrained weights serve every model; other pictures are as large as they want."""
    torch.manual_seed(0)
    model = COOKIEForPreTraining(make()).eval()
    for buffer in model.video.cnn.buffers():  # as if trained
        buffer.copy_(buffer + torch.rand(buffer.shape))
    model.save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path), COOKIEModel)
    pixels = batch["pixel_values"]
    wanted = model.encode_video(pixels).embeds
    for kind in (COOKIEForRetrieval, COOKIEModel):
        torch.testing.assert_close(
            kind.from_pretrained(tmp_path).encode_video(pixels).embeds, wanted
        )
    assert not caplog.messages
    hashing = COOKIEForHashing.from_pretrained(tmp_path)
    (message,) = caplog.messages
    assert "hash_layer.0.weight" in message and "the hash layer starts" in message
    assert "centre" not in message
    torch.testing.assert_close(hashing.video.features(pixels), model.video.features(pixels))
    assert torch.equal(hashing.centres, hash_centres(16, 12))
    hashing.centres.neg_()
    hashing.save_pretrained(tmp_path / "hashing")
    again = COOKIEForHashing.from_pretrained(tmp_path / "hashing")
    assert torch.equal(again.centres, -hash_centres(16, 12))
    assert torch.equal(again.random_centre, hashing.random_centre)
    large = COOKIEForRetrieval.from_pretrained(tmp_path, image_size=64)
    assert large.encode_video(torch.randn(1, 3, 64, 64)).states.shape == (1, 64, 32)
    with pytest.raises(ValueError, match="shared_layers must be 2, that of the weights in"):
        COOKIEForRetrieval.from_pretrained(tmp_path, shared_layers=1)


def test_hashing(make: Make, batch: Batch) -> None:
    torch.manual_seed(0)
    model = COOKIEForHashing(make(hash_dropout=0.0, cnn_norm="frozen")).train()
    labels = torch.eye(12)[[0, 0, 3, 11]]
    labels[1, 3] = 1
    output = model(batch["pixel_values"][:, None], labels)
    parts = output.loss_centre, output.loss_pairwise, output.loss_quantisation
    torch.testing.assert_close(output.loss, parts[0] + 0.2 * parts[1] + 0.05 * parts[2])
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.hash_layer.parameters())
    assert output.codes.shape == (4, 16) and output.codes.abs().max() < 1
    targets = hash_targets(model.centres, labels, model.random_centre)
    agree = model.centres[0] == model.centres[3]
    assert torch.equal(targets[0], model.centres[0]) and agree.any() and not agree.all()
    assert torch.equal(targets[1][agree], model.centres[0][agree])
    assert torch.equal(targets[1][~agree], model.random_centre[~agree])
    torch.nn.init.constant_(model.hash_layer[5].bias, torch.nan)
    assert model(batch["pixel_values"], labels).loss_centre.isnan()
    torch.nn.init.constant_(model.hash_layer[5].bias, 30.0)  # codes of 1: no share is left
    saturated = model(batch["pixel_values"], labels).loss_centre
    (gradient,) = torch.autograd.grad(saturated, model.hash_layer[3].weight)
    assert saturated.isfinite() and gradient.isfinite().all()
    with pytest.raises(ValueError, match="codes must be of 2 images at least, got 1"):
        model(batch["pixel_values"][:1], labels[:1])
    model.config.loss_weights = {"pairwise": 0}
    assert model(batch["pixel_values"], labels).loss_pairwise is None
    assert model(batch["pixel_values"], labels * 0).loss_centre.isnan()
    half = model.bfloat16()(batch["pixel_values"].bfloat16(), labels)
    assert half.codes.dtype == torch.bfloat16 and half.loss.isfinite()
    with pytest.raises(ValueError, match=r"labels must have shape \(4, 12\), got \(4, 11\)"):
        model(batch["pixel_values"], labels[:, 1:])


def test_no_classes_share_a_centre(make: Make) -> None:
    assert len(hash_centres(4, 6, "random").unique(dim=0)) == 6
    with pytest.raises(ValueError, match=r"classes must be at most 6 with 4 bits, .* got 12"):
        COOKIEForHashing(make(hash_bits=4))


def test_salience(make: Make, batch: Batch) -> None:
    model = COOKIEModel(make()).eval()
    arguments = [batch[name] for name in PAIRS[:3]]
    regions, words, between = model.salience(*arguments)
    assert regions.shape == (4, 16) and words.shape == (4, 7) and between.shape == (4, 7, 16)
    text = model.encode_text(*arguments[1:])
    wanted = F.cosine_similarity(text.states, text.embeds[:, None], dim=-1)
    torch.testing.assert_close(words, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edge_sparsity": True}, "edge_sparsity must be False: COOKIE has no such layers"),
        ({"patch_size": 16}, "patch_size must be 8, that of 2 stages, got 16"),
        ({"cnn_sizes": [16]}, r"cnn_sizes must be as many as cnn_depths, \[1, 2\], got \[16\]"),
        ({"cnn_depths": [1, 0]}, r"cnn_depths must be a list of positive integers, got \[1, 0\]"),
        ({"cnn_layer": "basic", "cnn_groups": 2}, "cnn_groups must be 1 with cnn_layer='basic'"),
        ({"projection_dim": 8}, "projection_dim must be 32, hidden_size, got 8"),
        ({"fusion_layer": 1}, "fusion_layer must be 2, got 1"),
        ({"num_frames": 4}, "num_frames must be 1 without feature_size, got 4"),
        ({"pooling": "max"}, r"pooling must be one of \('mean', 'gpo'\), got 'max'"),
        ({"loss_weights": {"vtm": 1}}, r"loss_weights must be keyed by .*'ccl'.* got \{'vtm': 1\}"),
        ({"margin": -1}, "margin must be a number of at least 0, got -1"),
        ({"margin": math.nan}, "margin must be a number of at least 0, got nan"),
        ({"compat": "svitt-official"}, r"compat must be one of \(None,\)"),
        ({"image_std": [1, 1, 0]}, "image_std must be three positive numbers"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(ValueError, match=f"COOKIEConfig: {message}"):
        make(**changes)


def test_what_forward_cannot_take(make: Make, batch: Batch) -> None:
    model = COOKIEForPreTraining(make())
    wanted = r"view_pixel_values must have shape \(4, 2, 3, 32, ...\)"
    with pytest.raises(ValueError, match=wanted):
        model(**{name: batch[name] for name in PAIRS})
    with pytest.raises(ValueError, match=rf"{wanted} .* got \(5, 2, 3, 32, 32\)"):
        model(**{**batch, "view_pixel_values": torch.zeros(5, 2, 3, 32, 32)})
    with pytest.raises(ValueError, match=rf"{wanted} .* got \(4, 2, 1, 3, 32, 32\)"):
        model(**{**batch, "view_pixel_values": batch["view_pixel_values"][:, :, None]})
    with pytest.raises(ValueError, match=r"view_input_ids must have .* is 0, got \(4, 7\)"):
        model(**{**batch, "view_input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match=r"shape \(batch, 3, 32, 32\), got \(4, 3, 16, 16\)"):
        model.encode_video(torch.zeros(4, 3, 16, 16))
    with pytest.raises(ValueError, match="num_frames must be 1 without feature_size, got 4"):
        expand_frames(model, 4)
    assert model.config.num_frames == len(model.video.patch_positions) == 1
    model = COOKIEForPreTraining(make(loss_weights={"ccl": 0, "vcl": 0, "tcl": 0}))
    with pytest.raises(ValueError, match="loss_weights must be positive for one of its losses"):
        model(**batch)

"""SoftMask: masks of a given mass, what they are made from, the focal loss, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from momentum_cases import TINY
from torch import Tensor

import svitt_ops as so
from svitt_ops.models import (
    ALBEFForPreTraining,
    SoftMaskConfig,
    SoftMaskForPreTraining,
    SoftMaskForRetrieval,
)
from svitt_ops.models.parts.distortion import distort
from svitt_ops.models.softmask.masks import (
    choose_words,
    compensated,
    focal_contrast,
    normalized,
    soft_masked,
)

Make = Callable[..., SoftMaskConfig]


@pytest.fixture
def make() -> Make:
    return lambda **changes: SoftMaskConfig(**{**TINY, "mask_layer": 2, **changes})


def maps(patches: int) -> Tensor:
    """Dense ones, ones of a few patches, of one, of none, of equal values and of all."""
    generator = torch.Generator().manual_seed(0)
    found = torch.rand(8, patches, generator=generator)
    found[1] *= torch.arange(patches) < 3
    found[2] = F.one_hot(torch.tensor(1), patches)
    found[3] = 0
    found[4] = 0.5
    found[5] = 1
    found[6] = found[6] ** 8
    found[7] = torch.arange(patches) < patches // 2
    return normalized(found, "max")


@pytest.mark.parametrize("how", ["add", "multiply"])
@pytest.mark.parametrize("share", [0.5, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("patches", [4, 16, 256, 577])
def test_masks_have_their_mass(patches: int, share: float, how: str) -> None:
    c = maps(patches)
    mask = compensated(c, share, how)
    assert (mask.sum(1) - share * patches).abs().max() < 1e-4
    assert mask.min() >= 0 and mask.max() <= 1
    for row, wanted in zip(mask, c, strict=True):  # greater maps are masked more
        order = wanted.argsort()
        assert (row[order].diff() >= -1e-6).all()
    if share == 0.5:
        torch.testing.assert_close(mask[3], torch.full((patches,), 0.5))
        torch.testing.assert_close(mask[4], torch.full((patches,), 0.5))


def test_a_factor_leaves_zeros() -> None:
    """Where enough patches are above 0; else their mass can only be added."""
    c = maps(16)
    c[0, :4] = 0
    mask = compensated(c, 0.5, "multiply")
    assert (mask[0, :4] == 0).all()
    ratio = mask[0] / c[0]
    free = (mask[0] < 1) & (c[0] > 0)
    assert free.sum() > 1 and ratio[free].std() < 1e-6
    assert torch.equal(mask[7], c[7])  # exactly half of them
    assert (mask[1] > 0).all() and torch.equal(mask[1], compensated(c, 0.5, "add")[1])
    assert torch.equal(compensated(c, 0.5, "none"), c)
    assert torch.equal(normalized(torch.zeros(2, 3), "minmax"), torch.zeros(2, 3))
    low = normalized(torch.tensor([[1.0, 3.0, 2.0]]), "minmax")
    assert torch.equal(low, torch.tensor([[0.0, 1.0, 0.5]]))


def test_one_word_of_each_text() -> None:
    torch.manual_seed(0)
    words = torch.arange(12.0).view(2, 6, 1) + 1
    allowed = torch.tensor([[False, True, True, False, True, False], [False] * 6])
    drawn = torch.stack([choose_words(words, allowed)[:, 0] for _ in range(300)])
    assert set(drawn[:, 0].tolist()) == {2.0, 3.0, 5.0} and (drawn[:, 1] == 0).all()
    assert all(60 < (drawn[:, 0] == x).sum() < 140 for x in (2, 3, 5))


def test_masks_come_from_words_maps(make: Make, pairs: dict[str, Tensor]) -> None:
    """Of every word of a text in its turn, and of no special piece and no padding."""
    torch.manual_seed(0)
    ids, mask = pairs["input_ids"], pairs["attention_mask"]
    excluded = int(ids[0, 3])
    model = SoftMaskForPreTraining(make(mask_compensation="none", mask_excluded_ids=[excluded]))
    text, video = model.encode_text(ids, mask), model.encode_video(pairs["pixel_values"])
    found = model.word_maps(text.states, mask, video.states, layer=2).words
    wanted = found / found.amax(2, keepdim=True).clamp(min=1e-30)
    seen = torch.zeros_like(mask, dtype=torch.bool)
    for _ in range(60):
        drawn = model.soft_mask(text.states, ids, mask, video.states)
        close = (drawn[:, None] - wanted).abs().amax(2) < 1e-5
        assert (close.sum(1) == 1).all()
        seen |= close
    words = (mask != 0) & (ids != excluded)
    words[:, 0] = False
    assert torch.equal(seen, words)
    model.config.mask_compensation = "add"
    masks, allowed = model.word_masks(text.states, ids, mask, video.states)
    assert torch.equal(allowed, words)
    drawn = model.soft_mask(text.states, ids, mask, video.states)
    close = (drawn[:, None] - masks).abs().amax(2) < 1e-5
    assert ((close & words).sum(1) >= 1).all()
    model.config.mask_source = "random"
    with pytest.raises(ValueError, match=r"mask_source must be 'gradcam' or .* got 'random'"):
        model.word_masks(text.states, ids, mask, video.states)


@pytest.mark.parametrize("source", ["gradcam", "cross_attention", "random"])
def test_every_source_has_the_mass(make: Make, pairs: dict[str, Tensor], source: str) -> None:
    torch.manual_seed(0)
    model = SoftMaskForPreTraining(make(mask_source=source))
    video = model.encode_video(pairs["pixel_values"])
    text = model.encode_text(pairs["input_ids"], pairs["attention_mask"])
    arguments = (text.states, pairs["input_ids"], pairs["attention_mask"], video.states)
    mask = model.soft_mask(*arguments)
    assert mask.shape == (3, 16) and (mask.sum(1) - 8).abs().max() < 1e-4
    assert not mask.requires_grad and all(p.grad is None for p in model.parameters())
    masked, kept = (soft_masked(video.states, mask, keeps) for keeps in (False, True))
    torch.testing.assert_close(masked[:, 1:] + kept[:, 1:], video.states[:, 1:])
    assert torch.equal(masked[:, 0], video.states[:, 0]) and torch.equal(kept[:, 0], masked[:, 0])


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_the_focal_loss(alpha: float) -> None:
    torch.manual_seed(0)
    query, key, teacher = (F.normalize(torch.randn(4, 8), dim=1) for _ in range(3))
    queue, temperature = F.normalize(torch.randn(6, 8), dim=1), torch.tensor([0.2])
    ids, older = torch.tensor([1, 2, 1, 3]), torch.tensor([2, 9, 9, 9, 9, 9])
    positives = ids[:, None] == torch.cat([ids, older])
    candidates = torch.cat([key, queue])
    plain = focal_contrast(query, candidates, temperature, positives, teacher, alpha, 0.0)
    wanted = so.queue_info_nce(
        query,
        key,
        queue,
        temperature,
        teacher_query=teacher,
        alpha=alpha,
        query_ids=ids,
        queue_ids=older,
    )
    torch.testing.assert_close(plain, wanted)
    query.requires_grad_()
    found = focal_contrast(query, candidates, temperature, positives, teacher, alpha, 2.0)
    p = (query @ candidates.T / 0.2).softmax(1)
    soft = (teacher @ candidates.T / 0.2).softmax(1)
    targets = alpha * soft + (1 - alpha) * positives / positives.sum(1, keepdim=True)
    torch.testing.assert_close(found, -(targets * (1 - p) ** 2 * p.log()).sum(1).mean())
    found.backward()
    assert query.grad is not None and query.grad.isfinite().all()
    sure = torch.eye(3, requires_grad=True)  # converged: p is 1
    loss = focal_contrast(sure, torch.eye(3), torch.tensor([0.001]), torch.eye(3) > 0, sure, 0, 0.5)
    loss.backward()
    assert loss == 0 and sure.grad is not None and sure.grad.isfinite().all()


def test_without_what_is_new_it_is_albef(make: Make, pairs: dict[str, Tensor]) -> None:
    fields = {"mask_source": "none", "reads_masked_text": False, "focal_gamma": 0}
    torch.manual_seed(0)
    model = SoftMaskForPreTraining(make(**fields)).eval()
    albef = ALBEFForPreTraining(model.config).eval()
    albef.config.loss_weights = {"vtc": 1, "vtm": 1, "mlm": 1}
    albef.load_state_dict(model.state_dict())
    found = []
    for one in (model, albef):
        torch.manual_seed(1)
        found.append(one(**pairs))
    for name in ("loss", "loss_vtc", "loss_vtm", "loss_mlm"):
        assert torch.equal(found[0][name], found[1][name])
    assert found[0].loss_soft is None


def test_every_loss_learns(make: Make, pairs: dict[str, Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SoftMaskForPreTraining(make())
    output = model(**pairs)
    parts = [output[f"loss_{name}"] for name in ("vtc", "vtm", "mlm", "soft")]
    torch.testing.assert_close(output.loss, sum(parts))
    output.loss.backward()
    own = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    unused = [name for name, p in own if p.grad is None or not p.grad.any()]
    assert [name for name in unused if not name.endswith("key.bias")] == []
    model.save_pretrained(tmp_path)
    tuned = SoftMaskForRetrieval.from_pretrained(tmp_path)
    found = tuned(*(pairs[x] for x in ("pixel_values", "input_ids", "attention_mask")))
    assert set(found) == {"loss", "loss_vtc", "loss_vtm", "video_embeds", "text_embeds"}


def test_what_losses_read(make: Make, pairs: dict[str, Tensor]) -> None:
    """Masked texts, of the words' loss or others; and masked images, if the words' loss shall."""
    torch.manual_seed(0)
    model = SoftMaskForPreTraining(make()).eval()
    texts = model.encode_text(pairs["mlm_input_ids"], pairs["attention_mask"]).embeds
    with torch.no_grad():
        plain = model(**pairs)
        assert torch.equal(plain.text_embeds, texts)
        other = model(**pairs, masked_input_ids=pairs["input_ids"])
        assert not torch.allclose(other.text_embeds, texts)
        model.config.masks_words_too = True
        both = model(**pairs)
        assert torch.equal(other.loss_mlm, plain.loss_mlm)
        assert not torch.allclose(both.loss_mlm, plain.loss_mlm)
        model.config.reads_masked_text = False
        assert torch.equal(model(**pairs).text_embeds, other.text_embeds)


def test_images_are_distorted_only_while_training(make: Make, pairs: dict[str, Tensor]) -> None:
    images = pairs["pixel_values"]
    torch.manual_seed(0)
    torch.testing.assert_close(distort(images, 0, 0, 0), images)
    gray = distort(images, 0, 1, 0)
    assert torch.equal(gray[:, 0], gray[:, 2]) and not torch.equal(gray[:, 0], images[:, 0])
    blurred = distort(images[:, None], 0, 0, 1)[:, 0]
    assert blurred.std() < 0.6 * images.std()
    torch.testing.assert_close(blurred.mean(), images.mean(), atol=0.02, rtol=0)
    flat = torch.ones(2, 3, 8, 8)
    torch.testing.assert_close(distort(flat, 0, 0, 1), flat)
    changed = distort(images, 0.4, 0, 0)
    assert changed.shape == images.shape and not torch.allclose(changed, images)
    model = SoftMaskForPreTraining(make()).eval()
    with torch.no_grad():
        found = [model(**pairs).video_embeds for _ in range(2)]
        assert torch.equal(*found)
        assert not torch.allclose(model.train()(**pairs).video_embeds, found[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_source": "x"}, "mask_source must be one of .*, got 'x'"),
        ({"mask_layer": 1}, "mask_layer must be a fusion layer before the last, 2 to 2, got 1"),
        ({"mask_layer": 3}, "mask_layer must be a fusion layer before the last, 2 to 2, got 3"),
        ({"mask_mass": 2}, "mask_mass must be a number from 0 to 1, got 2"),
        ({"focal_gamma": -1}, "focal_gamma must be a number of at least 0, got -1"),
        ({"mask_compensation": "x"}, "mask_compensation must be one of .*, got 'x'"),
        ({"compat": "albef-official"}, "compat must be one of .*, got 'albef-official'"),
    ],
)
def test_configurations_that_cannot_be(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^SoftMaskConfig: {message}"):
        make(**changes)

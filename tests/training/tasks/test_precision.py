"""Scores are finite or refused, and ranked in fp32 whatever the towers compute in."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svitt_ops.training.cli.figures import find_survivors
from svitt_ops.training.data.annotations import Entry
from svitt_ops.training.data.text import train_tokenizer
from svitt_ops.training.tasks import retrieval as module
from svitt_ops.training.tasks.parts.encoding import encode_gallery_texts, encode_gallery_videos
from svitt_ops.training.tasks.parts.gallery import GalleryClip, GalleryClips, build_gallery
from svitt_ops.training.tasks.parts.probing import pair_accuracy
from svitt_ops.training.tasks.retrieval import Evaluation, retrieval

PAIRS = 300


class Blank(GalleryClips):
    """Clips without files."""

    def __getitem__(self, number: int) -> GalleryClip:
        return GalleryClip(number, torch.zeros(1, 1, 3, 4, 4, dtype=torch.uint8))


class Cone(nn.Module):
    """Towers that give PAIRS ready embeddings, one after the other."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        own = torch.randn(PAIRS, 16, generator=generator)
        noise = torch.randn(PAIRS, 16, generator=generator)
        axis = F.normalize(torch.randn(16, generator=generator), dim=0)
        self.embeds = {
            "video": F.normalize(axis + spread * own, dim=1),
            "text": F.normalize(axis + spread * (own + 0.2 * noise), dim=1),
        }
        self.given = {"video": 0, "text": 0}
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(weights={"vtm": 0}, image_size=4, num_frames=1)

    def give(self, what: str, count: int) -> SimpleNamespace:
        start = self.given[what] % PAIRS
        self.given[what] = start + count
        embeds = self.embeds[what][start : start + count]
        return SimpleNamespace(embeds=embeds, states=embeds[:, None])

    def encode_video(self, pixels: Tensor) -> SimpleNamespace:
        return self.give("video", len(pixels))

    def encode_text(self, ids: Tensor, mask: Tensor) -> SimpleNamespace:
        return self.give("text", len(ids))


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 3e-3])
def test_a_narrow_cone_is_ranked_in_bf16_as_in_fp32(spread: float) -> None:
    gallery = build_gallery(
        [Entry(media=(f"{k}.mp4",), captions=(f"text {k}",), kind="video") for k in range(PAIRS)]
    )
    model, tokenizer = Cone(spread), train_tokenizer(["text"], 50)
    plain = retrieval(model, tokenizer, Blank(gallery, 1))
    low = retrieval(model, tokenizer, Blank(gallery, 1), bf16=True)
    assert plain["text_to_video"]["R1"] > 90
    assert low == plain


def one_sided(trained: Any) -> tuple[Any, Any, Any]:
    """A model whose embeddings all lie around one direction."""
    model, tokenizer, gallery = trained
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.video_projection.bias += 1
        model.text_projection.bias += 1
        model.match_head.bias += 5
    return model, tokenizer, gallery


def test_a_model_s_scores_are_not_rounded_to_bf16(trained: Any, monkeypatch: Any) -> None:
    model, tokenizer, gallery = one_sided(trained)
    seen: dict[bool, list[Tensor]] = {False: [], True: []}
    recalls = module.recalls
    for bf16 in (False, True):
        monkeypatch.setattr(
            module, "recalls", lambda *x, bf16=bf16: seen[bf16].append(x[0]) or recalls(*x)
        )
        retrieval(model, tokenizer, GalleryClips(gallery, 4), bf16=bf16)
    for plain, low in zip(seen[False], seen[True], strict=True):  # before and after re-ranking
        assert plain.std() < 0.05 * plain.abs().mean()
        for found in (*plain, *low):  # rounded to bf16 they have one to four values
            assert len(found.unique()) >= 6
        torch.testing.assert_close(low, plain, rtol=0.05, atol=0.05)


def test_the_others_keep_their_order_below_those_ranked_anew(
    trained: Any, monkeypatch: Any
) -> None:
    gallery = trained[2]
    model = SimpleNamespace(prior_scores=torch.zeros_like)
    scores = 0.9 + 1e-6 * torch.randperm(64).view(8, 8)
    states = SimpleNamespace(states=torch.zeros(8, 1, 1, 1))
    for logit in (-3e4, 0.0, 3e4):
        monkeypatch.setattr(
            module, "_match", lambda *x, logit=logit: torch.full((len(x[3]),), logit)
        )
        for by_video in (False, True):
            merged = module._rerank(
                model, scores, gallery, None, states, Evaluation(top_k=2), by_video, None
            )
            rows, wanted = (merged.T, scores.T) if by_video else (merged, scores)
            order = wanted.argsort(1, descending=True)
            assert (rows.gather(1, order[:, :2]) == logit).all()
            below = rows.gather(1, order[:, 1:])
            assert (below.diff() < 0).all()


@pytest.mark.parametrize(
    ("weight", "what"),
    [
        ("video_projection.weight", "embeddings of videos: 8 of 8 not finite, the first: video 0"),
        ("text_projection.bias", "embeddings of texts: 8 of 8 not finite, the first: text 0"),
        ("match_head.weight", "match scores, text to video: 8 of 8 not finite"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("merge", ["logsumexp", "mean", "max"])
def test_a_broken_model_gets_no_numbers(
    trained: Any, weight: str, what: str, value: float, merge: Any
) -> None:
    model, tokenizer, gallery = trained
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_parameter(weight).view(-1)[-1] = value
    with pytest.raises(ValueError, match=what):
        retrieval(model, tokenizer, GalleryClips(gallery, 4), settings=Evaluation(merge=merge))


def test_one_broken_video_is_named(trained: Any, monkeypatch: Any) -> None:
    model, tokenizer, gallery = trained
    encode = model.encode_video
    calls: list[int] = []

    def fourth_is_nan(pixels: Tensor) -> Any:
        found = encode(pixels)
        calls.append(len(pixels))
        if len(calls) == 4:
            found.embeds[0, 2] = math.nan
        return found

    monkeypatch.setattr(model, "encode_video", fourth_is_nan)
    with pytest.raises(ValueError) as caught:
        retrieval(model, tokenizer, GalleryClips(gallery, 4), settings=Evaluation(batch_size=1))
    assert f"1 of 8 not finite, the first: video 3 ({gallery.videos[3]})" in str(caught.value)
    calls.clear()
    with pytest.raises(ValueError, match="not finite"):
        encode_gallery_videos(model, GalleryClips(gallery, 4), batch_size=1)
    monkeypatch.undo()
    with torch.no_grad():
        before = model.text.embeddings.word.weight.clone()
        model.text.embeddings.word.weight.fill_(math.nan)
    try:
        with pytest.raises(ValueError, match=r"text 0 \('"):
            encode_gallery_texts(model, tokenizer, gallery.texts, text_length=12)
        with pytest.raises(ValueError, match="not finite"):
            pair_accuracy(model, tokenizer, gallery, torch.arange(8).view(-1, 2))
        frames = GalleryClips(gallery, 4)[0].frames
        assert frames is not None
        with pytest.raises(ValueError, match="visualize: states of texts: 1 of 1 not finite"):
            find_survivors(model, tokenizer, frames[0], gallery.texts[0])
    finally:
        with torch.no_grad():
            model.text.embeddings.word.weight.copy_(before)


def test_a_collapsed_model_finds_nothing(trained: Any) -> None:
    model, tokenizer, gallery = trained
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.video_projection.weight.zero_()
        model.match_head.weight.zero_()
    found = retrieval(model, tokenizer, GalleryClips(gallery, 4))
    for table in (found, found["contrastive"]):
        assert table["text_to_video"]["R1"] == table["text_to_video"]["R5"] == 0


def test_galleries_in_which_nothing_is_searched(
    trained: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer, gallery = trained
    retrieval(model, tokenizer, GalleryClips(gallery.without(range(1, 8)), 4))
    assert "all 1 videos belong together, so that any model gets 100 %" in caplog.text
    with pytest.raises(ValueError, match="the gallery has no videos"):
        retrieval(model, tokenizer, GalleryClips(gallery.without(range(8)), 4))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"clips": 0}, "clips must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"merge": "median"}, "merge must be one of logsumexp, mean, max, concat, got 'median'"),
    ],
)
def test_settings_that_cannot_be(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation(**option)

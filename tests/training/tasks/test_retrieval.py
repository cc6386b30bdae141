"""Ranks, re-ranking, galleries with broken files, several clips, temporal probing, figures."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import DENSE

from svitt_ops.training.cli.figures import draw_survivors, find_survivors
from svitt_ops.training.data.annotations import Entry, read_annotations
from svitt_ops.training.data.datasets import FrameReader
from svitt_ops.training.data.sampling import ORDERS
from svitt_ops.training.data.video import UnusableVideoError
from svitt_ops.training.engine.build import build_model
from svitt_ops.training.tasks.parts.gallery import Gallery, GalleryClips, build_gallery
from svitt_ops.training.tasks.parts.probing import pair_accuracy, pair_choices
from svitt_ops.training.tasks.parts.ranks import best_ranks, recall_table, recalls
from svitt_ops.training.tasks.retrieval import Evaluation, probe_retrieval, render, retrieval

RECALL = ("scores", "image_ids", "text_image_ids", "ir", "tr")


def entry(media: str, captions: str) -> Entry:
    return Entry(media=tuple(media.split()), captions=tuple(captions.split()), kind="video")


def test_best_ranks_against_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 30, generator=generator)
    positives = torch.rand(20, 30, generator=generator) < 0.1
    positives[:, 0] = True
    for row, rank in enumerate(best_ranks(scores, positives).tolist()):
        order = scores[row].argsort(descending=True).tolist()
        assert rank == min(order.index(k) for k in range(30) if positives[row, k])


def test_ties_are_no_success() -> None:
    ranks = best_ranks(torch.zeros(4, 10), torch.eye(4, 10, dtype=torch.bool))
    assert ranks.tolist() == [9] * 4
    assert recall_table(ranks) == {"R1": 0, "R5": 0, "R10": 100, "mean": pytest.approx(100 / 3)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_in_the_last_place(value: float, caplog: Any) -> None:
    own = torch.eye(4, 9, dtype=torch.bool)
    assert best_ranks(torch.full((4, 9), value), own).tolist() == [8] * 4
    assert "4 of 4" in caplog.text
    scores = own.float()  # perfect
    scores[1] = value
    scores[2, 2] = value
    assert best_ranks(scores, own).tolist() == [0, 8, 8, 0]
    scores = own.float()
    scores[3, 0] = value  # a wrong candidate: -inf alone is less than the right one
    assert best_ranks(scores, own).tolist() == [0, 0, 0, int(value != -math.inf)]
    gallery = build_gallery([entry("a", "one two"), entry("b", "three")])
    wrong = torch.tensor([[0.9, 0.1], [0.2, value], [0.3, 0.7]])
    for scores in ((wrong,), (wrong.nan_to_num(), wrong)):
        with pytest.raises(ValueError, match=r"scores of texts: 1 of 3 not finite, .*'two'"):
            recalls(scores[0], gallery, *scores[1:])


def test_a_positive_that_is_not_a_number_spoils_its_row() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    scores[0, 1] = math.nan
    positives = torch.tensor([[True, True, False]] * 2)
    assert best_ranks(scores, positives).tolist() == [1, 0]


def test_galleries_group_what_shares_a_video() -> None:
    gallery = build_gallery([entry("a b", "one"), entry("c", "two three"), entry("b", "four")])
    assert gallery.videos == ["a", "b", "c"]
    assert gallery.video_groups[0] == gallery.video_groups[1] != gallery.video_groups[2]
    assert gallery.texts == ["one", "two", "three", "four"]
    same = gallery.text_groups
    assert same[0] == same[3] != same[1] == same[2]
    joined = build_gallery([entry("a", "one"), entry("b", "two"), entry("a b", "three")])
    assert len(set(joined.video_groups + joined.text_groups)) == 1
    left = gallery.without([2])
    assert (left.videos, left.texts) == (["a", "b"], ["one", "four"])


def test_recalls_with_several_texts_per_video() -> None:
    gallery = build_gallery([entry("a", "one two"), entry("b", "three")])
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    found = recalls(scores, gallery)
    assert found["text_to_video"]["R1"] == pytest.approx(200 / 3)
    assert found["video_to_text"]["R1"] == 50  # of b, the text "two" of a is nearest


def test_recalls_of_scl_are_the_authors() -> None:
    """Several texts of a picture: any of them counts."""
    with np.load(Path(__file__).parents[2] / "golden" / "scl" / "retrieval_image.npz") as case:
        held = {name: torch.from_numpy(case[f"recall/{name}"]) for name in RECALL}
    gallery = Gallery(
        videos=[str(x) for x in held["image_ids"].tolist()],
        kinds=["image"] * len(held["image_ids"]),
        video_groups=held["image_ids"].tolist(),
        texts=["a"] * len(held["text_image_ids"]),
        text_groups=held["text_image_ids"].tolist(),
    )
    found = recalls(held["scores"].T, gallery)
    for way, key in (("text_to_video", "ir"), ("video_to_text", "tr")):
        wanted = 100 * held[key]
        assert [found[way][f"R{k}"] for k in (1, 5, 10)] == pytest.approx(wanted.tolist())


def test_reranking_replaces_the_order_of_the_candidates(trained: Any) -> None:
    model, tokenizer, gallery = trained
    clips = GalleryClips(gallery, 4)
    with torch.inference_mode():
        plain = retrieval(model, tokenizer, clips, rerank=False)
        assert plain["text_to_video"] == plain["contrastive"]["text_to_video"]
        everything = retrieval(model, tokenizer, clips, settings=Evaluation(top_k=99, batch_size=3))
        again = retrieval(model, tokenizer, clips, settings=Evaluation(top_k=99, batch_size=16))
    assert everything == again
    assert everything["contrastive"] == plain["contrastive"]
    assert everything["videos"] == everything["texts"] == 8
    assert "text to video" in render(everything)


def test_reranked_scores_are_the_match_head_s(trained: Any, monkeypatch: Any) -> None:
    model, tokenizer, gallery = trained

    def by_video(states: torch.Tensor, mask: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
        score = (states[:, 0, 0] * 0).float()
        return torch.stack([score, score + video.float().mean((1, 2))], dim=1)

    monkeypatch.setattr(model, "match_logits", by_video)
    monkeypatch.setattr(model.config, "hard_negatives", False)
    found = retrieval(model, tokenizer, GalleryClips(gallery, 4), settings=Evaluation(top_k=8))
    # A score that ignores the text ranks the same video first for every text.
    assert found["text_to_video"]["R1"] == pytest.approx(100 / 8)
    assert found["video_to_text"]["R1"] == 0  # every text ties


@pytest.mark.parametrize(("top_k", "pairs"), [(8, 64), (7, 2 * 56)])
def test_all_pairs_are_scored_once_for_both_ways(
    trained: Any, monkeypatch: Any, top_k: int, pairs: int
) -> None:
    model, tokenizer, gallery = trained
    scored: list[int] = []
    real = model.match_logits

    def counted(states: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        scored.append(len(states))
        return real(states, *rest)

    monkeypatch.setattr(model, "match_logits", counted)
    retrieval(model, tokenizer, GalleryClips(gallery, 4), settings=Evaluation(top_k=top_k))
    assert sum(scored) == pairs


@pytest.mark.parametrize("hard", [True, False])
def test_reranking_weighs_in_how_negatives_were_drawn(
    trained: Any, monkeypatch: Any, hard: bool
) -> None:
    model, tokenizer, gallery = trained

    def undecided(states: torch.Tensor, mask: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(states), 2)

    monkeypatch.setattr(model, "match_logits", undecided)
    monkeypatch.setattr(model.config, "hard_negatives", hard)
    found = retrieval(model, tokenizer, GalleryClips(gallery, 4), settings=Evaluation(top_k=8))
    # A head that knows nothing leaves the order that its negatives were drawn by.
    assert (found["text_to_video"] == found["contrastive"]["text_to_video"]) is hard
    assert hard or found["text_to_video"]["R1"] == 0  # all tie
    similarities = torch.tensor([0.5, -1.0])
    expected = similarities / model.temperature if hard else torch.zeros(2)
    torch.testing.assert_close(model.prior_scores(similarities), expected.detach())


@pytest.mark.parametrize("merge", ["logsumexp", "mean", "max", "concat"])
def test_several_clips(trained: Any, merge: str) -> None:
    model, tokenizer, gallery = trained
    for strided in (False, True):
        clips = GalleryClips(gallery, 4, num_clips=2, strided=strided)
        assert clips[0].frames is not None
        assert clips[0].frames.shape[:2] == (2, 4)
        found = retrieval(
            model, tokenizer, clips, settings=Evaluation(clips=2, merge=merge, batch_size=3)
        )
        assert 0 <= found["mean"] <= 100


def test_one_clip_twice_ranks_as_once(trained: Any, corpus: Path) -> None:
    model, tokenizer, gallery = trained
    once = retrieval(model, tokenizer, GalleryClips(gallery, 4))

    class Twice(GalleryClips):
        def __getitem__(self, number: int) -> Any:
            clip = super().__getitem__(number)
            clip.frames = torch.cat([clip.frames, clip.frames])
            return clip

    for merge in ("logsumexp", "mean", "max"):
        twice = retrieval(
            model, tokenizer, Twice(gallery, 4), settings=Evaluation(clips=2, merge=merge)
        )
        assert twice == once


def test_broken_videos_are_left_out_and_reported(
    trained: Any, corpus: Path, tmp_path: Path
) -> None:
    model, tokenizer, gallery = trained
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    entries = json.loads((corpus / "test.json").read_text())
    entries = [{**e, "video": str(corpus / e["video"])} for e in entries]
    entries.insert(3, {"video": str(tmp_path / "broken.mp4"), "caption": "a broken film"})
    (tmp_path / "test.json").write_text(json.dumps(entries))
    with_broken = build_gallery(read_annotations(tmp_path / "test.json").entries)
    found = retrieval(model, tokenizer, GalleryClips(with_broken, 4))
    assert found.pop("skipped").keys() == {str(tmp_path / "broken.mp4")}
    without = retrieval(model, tokenizer, GalleryClips(gallery, 4))
    assert without.pop("skipped") == {}
    assert found == without
    alone = build_gallery([entry(str(tmp_path / "broken.mp4"), "x")])
    with pytest.raises(ValueError, match="no video could be read"):
        retrieval(model, tokenizer, GalleryClips(alone, 4))


def test_frame_orders(corpus: Path) -> None:
    gallery = build_gallery(read_annotations(corpus / "test.json").entries)
    clips = {order: GalleryClips(gallery, 4, order=order)[0].frames for order in ORDERS}
    normal = clips["normal"]
    assert normal is not None
    assert torch.equal(clips["reversed"], normal.flip(1))
    assert torch.equal(clips["frozen"], normal[:, [1, 1, 1, 1]])
    orders = [GalleryClips(gallery, 4, order="shuffled", seed=k)[0].frames for k in range(6)]
    assert len({tuple(o.flatten().tolist()) for o in orders}) > 2
    assert torch.equal(orders[0], GalleryClips(gallery, 4, order="shuffled", seed=0)[0].frames)


def test_probing(trained: Any) -> None:
    model, tokenizer, gallery = trained
    found = probe_retrieval(model, tokenizer, gallery)
    assert set(found) == {*ORDERS, "delta"}
    assert found["delta"] == found["normal"]["mean"] - found["shuffled"]["mean"]
    assert "normal - shuffled" in render(found)


def test_probing_compares_the_same_videos(trained: Any, monkeypatch: Any) -> None:
    """A frame that one order alone needs cannot be read: its video is left out of all orders."""
    model, tokenizer, gallery = trained
    bad = gallery.videos[2]
    read = FrameReader.read

    def unless_reversed(self: FrameReader, path: str, kind: Any, choose: Any) -> torch.Tensor:
        chosen = list(choose([k / 8 for k in range(8)]))
        if path == bad and chosen == sorted(chosen, reverse=True) and len(set(chosen)) > 1:
            raise UnusableVideoError(f"{path}: frame 7 of 8 cannot be decoded")
        return read(self, path, kind, lambda _: chosen)

    monkeypatch.setattr(FrameReader, "read", unless_reversed)
    found = probe_retrieval(model, tokenizer, gallery)
    for order in ORDERS:
        assert found[order]["videos"] == 7, order
        assert found[order]["skipped"] == {bad: f"{bad}: frame 7 of 8 cannot be decoded"}
    assert list(found) == [*ORDERS, "delta"]
    assert "1 unusable video skipped" in render(found)
    monkeypatch.undo()
    without = probe_retrieval(model, tokenizer, gallery.without([2]))
    assert all(without[order]["mean"] == found[order]["mean"] for order in ORDERS)


def test_pair_choices() -> None:
    scores = torch.tensor([[0.9, 0.5, 0, 0], [0.6, 0.7, 0, 0], [0, 0, 0.1, 0.1], [0, 0, 0.3, 0.1]])
    right = pair_choices(scores, torch.tensor([[0, 1], [2, 3]]))
    assert right[:, 0].all()
    assert not right[:, 1].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pair_choices_of_what_is_not_finite_are_wrong(value: float) -> None:
    pairs = torch.tensor([[0, 1]])
    assert not pair_choices(torch.full((2, 2), value), pairs).any()
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    for place in ((0, 0), (0, 1)):
        one = scores.clone()
        one[place] = value
        assert pair_choices(one, pairs).sum() == 2  # those without it


def test_without_order_shuffling_costs_nothing(trained: Any, make_recipe: Any) -> None:
    """Singularity without layers over time."""
    _, tokenizer, gallery = trained
    torch.manual_seed(0)
    by_head_alone = {**DENSE, "hard_negatives": False}
    recipe = make_recipe(Path("unused"), "system=singularity", **by_head_alone)
    model = build_model(recipe, tokenizer)
    one_order = gallery.without(range(1, 8, 2))
    found = probe_retrieval(model, tokenizer, one_order, text_length=12)
    assert found["delta"] == 0 and found["normal"]["videos"] == 4
    assert found["normal"] == found["shuffled"] == found["reversed"]
    clips = GalleryClips(one_order, 1, num_clips=4)  # the same frames, one by one
    joined = retrieval(
        model, tokenizer, clips, text_length=12, settings=Evaluation(clips=4, merge="concat")
    )
    # Embeddings of clips are averaged, and so not those of all frames at once.
    same = {"skipped": {}, "contrastive": found["normal"]["contrastive"]}
    assert joined | same == found["normal"]


def test_pairs_cannot_be_told_apart_by_frozen_frames(trained: Any) -> None:
    model, tokenizer, gallery = trained
    pairs = torch.arange(8).view(-1, 2)
    assert 0 <= pair_accuracy(model, tokenizer, gallery, pairs) <= 100
    shuffled = pair_accuracy(model, tokenizer, gallery, pairs, order="shuffled", draws=3)
    assert 0 <= shuffled <= 100


def test_figure(trained: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, tokenizer, gallery = trained
    frames = GalleryClips(gallery, 4)[0].frames
    assert frames is not None
    found = find_survivors(model, tokenizer, frames[0], gallery.texts[0])
    assert [len(stage) for stage in found.visual] == [12]  # 70 % of 16
    assert found.multimodal is not None
    assert len(found.multimodal) == 6
    assert set(found.multimodal.tolist()) <= set(found.visual[-1].tolist())
    path = draw_survivors([found, found], tmp_path / "sub" / "figure.png")
    assert path.stat().st_size > 1000

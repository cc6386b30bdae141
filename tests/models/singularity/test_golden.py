"""Singularity: models with the authors' weights compute the authors' numbers."""

from typing import Any

import pytest
import torch
from golden_cases import (
    ANSWERS,
    LIST,
    MASKED,
    MERGES,
    QUESTIONS,
    Case,
    check_answers,
    check_corrected,
    check_ranking,
    hand_over_negatives,
    inputs,
    same_best,
)

from svitt_ops.models import SingularityForMultipleChoice, SingularityForPreTraining
from svitt_ops.models.parts import pairs
from svitt_ops.models.parts.clips import join_clips
from svitt_ops.models.singularity.configuration import OFFICIAL

PAIRS = {
    "pixel_values": "in/image",
    "input_ids": "in/input_ids",
    "attention_mask": "in/attention_mask",
    "pair_ids": "in/idx",
}
LOSSES = {"vtc": "itc", "vtm": "itm", "mlm": "mlm"}


def check_losses(case: Case, output: Any, where: str = "out/") -> None:
    for ours, theirs in LOSSES.items():
        if f"{where}loss_{theirs}" in case.arrays:
            case.close(output[f"loss_{ours}"].detach(), f"{where}loss_{theirs}")


@pytest.mark.parametrize("compat", [None, OFFICIAL])
@pytest.mark.parametrize("name", ["pretrain", "pretrain_temporal", "retrieval"])
def test_losses(
    name: str,
    compat: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(f"singularity/{name}")
    masks, over_time = name != "retrieval", name == "pretrain_temporal"
    model = case.model("pretraining" if masks else "retrieval", compat=compat)
    unused = "" if over_time else "no counterpart for: temporal_embeddings; the model computes"
    assert unused in caplog.text and len(caplog.records) == (not over_time)
    assert (model.config.temporal_layers, model.config.num_frames) == (
        (2, 3) if over_time else (0, 1)
    )
    wrong = [case[f"choice/{which}"] for which in ("neg_image_of_text", "neg_text_of_image")]
    mask, frames = case["in/attention_mask"], case["in/image"]
    with torch.no_grad():
        video, text = model.encode_video(frames), model.encode_text(case["in/input_ids"], mask)
        of_frames = model.encode_video(frames.flatten(0, 1)[:, None]).embeds
        logits = model.match_logits(
            torch.cat([text.states, text.states, text.states[wrong[1]]]),
            torch.cat([mask, mask, mask[wrong[1]]]),
            torch.cat([video.states, video.states[wrong[0]], video.states]),
        )
        if masks:
            masked = model.encode_text(case["choice/mlm_input_ids"], mask)
            fused = model.fuse(masked.states, mask, video.states).states
            words = model.token_head(fused, model.text.embeddings.word.weight)
            case.close(words, "out/mlm_logits")
    case.close(video.states, "out/image_embeds")
    case.close(of_frames.unflatten(0, frames.shape[:2]), "out/image_feat")
    case.close(video.embeds @ text.embeds.T / model.temperature, "out/sim_i2t")
    case.close(text.embeds, "out/text_feat")
    case.close(text.states, "out/text_embeds")
    case.close(logits, "out/itm_logits")
    hand_over_negatives(monkeypatch, case, "neg_image_of_text", "neg_text_of_image")
    output = model(**inputs(case, PAIRS | MASKED if masks else PAIRS))
    check_losses(case, output)
    case.close(output.loss.detach(), "out/loss_total")
    output.loss.backward()
    of_case = [key for key in case.arrays if key.startswith("grad/")]
    assert case.gradients_close(model) == len(of_case) >= 9


def test_a_frame_s_vector_after_the_layers_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case, where = Case("singularity/pretrain_temporal"), "out/update_pooler/"
    model = case.model(temporal_layers=2, pool_over_time=True)
    wrong = tuple(case[f"{where}{name}"] for name in ("neg_image_of_text", "neg_text_of_image"))
    monkeypatch.setattr(pairs, "draw_negatives", lambda *_, **__: wrong)
    with torch.no_grad():
        check_losses(case, model(**inputs(case, PAIRS | MASKED)), where)


@torch.no_grad()
def test_more_frames_and_one() -> None:
    """Embeddings of more frames are interpolated; one frame does not pass the layers over time."""
    case = Case("singularity/pretrain_temporal")
    model = case.model()
    for which in ("more_frames", "one_frame"):
        frames = case[f"in/{which}/image"]
        case.close(model.encode_video(frames).states, f"out/{which}/image_embeds")


@torch.no_grad()
def test_scores_of_several_frames() -> None:
    """Frames at once, which is "concat", or each as a clip of its own, and then merged."""
    case = Case("singularity/retrieval")
    model = case.model("multiple_choice", compat=OFFICIAL)  # the logit of "yes", not log odds
    assert isinstance(model, SingularityForMultipleChoice)
    frames = case["in/eval/video"]
    ids, mask = (
        case[f"in/eval/{name}"].expand(5, -1, -1) for name in ("input_ids", "attention_mask")
    )
    at_once = model.encode_video(frames)
    text = model.encode_text(ids[0], mask[0])
    similarity = at_once.embeds @ text.embeds.T
    case.close(similarity, "out/eval/sim_i2t")
    whole = model.choose(at_once.states, ids, mask).scores
    case.close(whole, "out/eval/x_only/score_i2t")
    clips = model.encode_video(frames.flatten(0, 1)[:, None]).states.unflatten(0, (5, 3))
    for name, merge in {**MERGES, "concat": "concat"}.items():
        found = model.choose(clips, ids, mask, merge=merge).scores
        same_best(case, similarity, found, f"out/eval/{name}/score_i2t")
        same_best(case, similarity.T, found.T, f"out/eval/{name}/score_t2i")


@torch.no_grad()
def test_recalls_of_every_ensemble() -> None:
    """Through the evaluation that `svitt evaluate retrieval` runs."""
    task = pytest.importorskip("svitt_ops.training.tasks.retrieval")
    case = Case("singularity/retrieval")
    model, frames = case.model("retrieval", compat=OFFICIAL), case["in/eval/video"]
    mask, k = case["in/eval/attention_mask"], int(case["in/eval/k_test"])
    text = model.encode_text(case["in/eval/input_ids"], mask)
    clips = model.encode_video(frames.flatten(0, 1)[:, None])
    texts = task.EncodedTexts(embeds=text.embeds, states=text.states, mask=mask)
    videos = task.EncodedVideos(
        embeds=clips.embeds.unflatten(0, (5, 3)).mean(1), states=clips.states.unflatten(0, (5, 3))
    )
    groups = case["in/eval/txt2img"].tolist()
    gallery = task.Gallery(list("abcde"), ["video"] * 5, list(range(5)), list("1234567"), groups)
    scores = texts.embeds @ videos.embeds.T
    for name, merge in {**MERGES, "concat": "concat", "emb": None}.items():
        ranked = [scores, scores]
        if merge:
            settings = task.Evaluation(clips=3, merge=merge, top_k=k)
            given = (model, scores, gallery, texts, videos, settings)
            ranked = [task._rerank(*given, by_video, None) for by_video in (False, True)]
        found, wanted = task.recalls(ranked[0], gallery, ranked[1]), case.meta["retrieval_metrics"]
        for ours, theirs in {"text_to_video": "img", "video_to_text": "txt"}.items():
            numbers = [wanted[name][f"{theirs}_r{n}"] for n in (1, 5, 10)]
            assert [found[ours][f"R{n}"] for n in (1, 5, 10)] == pytest.approx(numbers, abs=0.01)


def test_questions(caplog: pytest.LogCaptureFixture) -> None:
    """Ranked over all frames at once, and over each as a clip of its own."""
    case = Case("singularity/vqa")
    model = case.model("question_answering", compat=OFFICIAL)
    assert "no counterpart for: temporal_embeddings; " in caplog.text
    assert len(caplog.records) == 1
    output = model(case["in/image"], **inputs(case, QUESTIONS | ANSWERS))
    case.close(output.question_states.detach(), "out/train/question_states")
    case.close(output.answer_losses.detach(), "out/train/answer_loss")
    case.close(output.loss.detach(), "out/train/loss")
    output.loss.backward()
    assert case.gradients_close(model) == 7
    with torch.no_grad():
        check_answers(model, case, output.question_states)
        answers, k = inputs(case, LIST), int(case["in/rank/k"])
        ids, mask = inputs(case, QUESTIONS).values()
        frames = case["in/rank/video"]
        states = model.encode_questions(ids, mask, model.encode_video(frames).states)
        clips = model.encode_video(frames.flatten(0, 1)[:, None]).states.unflatten(0, (4, 3))
        joined = model.encode_questions(ids, mask, join_clips(clips, "concat"))
        for found in (states, joined):
            found = model.rank_answers(found, mask, **answers, k=k, merge="concat")
            check_ranking(case, found, "out/rank/")
        each = model.encode_questions(ids, mask, clips)
        for name, merge in MERGES.items():
            found = model.rank_answers(each, mask, **answers, k=k, merge=merge)
            check_ranking(case, found, f"out/rank/{name}/")
        model.config.compat = None
        check_corrected(case, model.rank_answers(states, mask, **answers, k=k), "")


def test_the_retrieval_checkpoint_s_masked_words(caplog: pytest.LogCaptureFixture) -> None:
    model = Case("singularity/retrieval").model()
    assert isinstance(model, SingularityForPreTraining)
    assert model.config.loss_weights == {"vtc": 1, "vtm": 1, "mlm": 0}
    assert "nothing for: token_head.bias" in caplog.text

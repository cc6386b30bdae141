"""SIMLA: models with the authors' weights compute the authors' numbers."""

import pytest
import torch
from golden_cases import (
    ANSWERS,
    LIST,
    MASKED,
    QUESTIONS,
    Case,
    check_corrected,
    check_ranking,
    inputs,
    same_best,
)
from momentum_cases import (
    PAIRS,
    check_gradients,
    check_losses,
    check_queues,
    check_targets,
    check_teacher,
    hand_over_negatives,
    in_training,
)

from svitt_ops.models import SIMLAConfig
from svitt_ops.models.simla.configuration import OFFICIAL
from svitt_ops.models.simla.masking import votes_of_heads

PATCHES = {"visual_token_ids": "in/visual_token_ids"}


@pytest.mark.parametrize(
    ("variant", "gradients"), [("released", 11), ("axis", 11), ("axis_momentum", 2)]
)
def test_pretraining(
    variant: str,
    gradients: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As released, with the axis mended, and as it is by default."""
    case, where = Case("simla/pretrain"), f"out/{variant}/"
    compat = None if variant == "axis_momentum" else OFFICIAL
    hand_over_negatives(monkeypatch, case)
    model = in_training(case, "pretraining", compat=compat)
    assert [r.getMessage() for r in caplog.records] == []
    if variant == "axis":
        monkeypatch.setattr(SIMLAConfig, "word_axis", -1)
    masked = case["in/masked_patches"].bool()
    mask, ids = case["in/attention_mask"], case["in/input_ids"]
    with torch.no_grad():
        video, text, taught = check_targets(case, model, "out/")
        case.close(video.states, "out/image_embeds")
        words = (text if compat else taught[1]).states
        keys = (video if compat else taught[0]).states
        found = model.patch_logits(case["in/image"], masked, text.states, mask)
        case.close(found, "out/mim_logits")
        soft = model.teacher.patch_logits(case["in/image"], masked, words, mask)
        name = "axis_momentum" if compat is None else "released"
        case.close(soft, f"out/{name}/mim_logits_m")
        case.close(model.concept_logits(video), "out/psl_logits")
        case.close(model.teacher.concept_logits(taught[0]).sigmoid(), "out/psl_soft_targets")
        attention = model.teacher.attention_of_cls(taught[1].states, mask, keys)
        case.close(attention, f"out/{name}/psl_cls_attention")
        assert torch.equal(votes_of_heads(attention, 4), case[f"out/{name}/psl_votes"])
        labels = model.labels(taught[1].states, ids, mask, keys)
        for row, tokens in zip(labels, case[f"out/{name}/psl_tokens"], strict=True):
            chosen = set(tokens.tolist()) - {1}  # [CLS]
            assert set(row.nonzero().flatten().tolist()) == chosen
        if compat:
            assert torch.equal(labels, case["out/released/psl_hard_targets"])
        words_m = model.teacher.word_logits(case["choice/mlm_input_ids"], mask, taught[0].states)
        case.close(words_m, "out/mlm_logits_m")
    arguments = inputs(case, PAIRS | MASKED | PATCHES) | {"masked_patches": masked}
    model.eval()
    with torch.no_grad():
        plain = model(**arguments, alpha=0)
    check_losses(case, plain, "out/alpha0/", mlm=True)
    output = model.train()(**arguments)
    check_losses(case, output, where, mlm=True)
    for name in ("mim", "psl"):
        if compat:
            case.close(plain[f"loss_{name}"], f"out/alpha0/loss_{name}")
        case.close(output[f"loss_{name}"].detach(), f"{where}loss_{name}")
    case.close(output.loss.detach(), f"{where}loss_total")
    output.loss.backward()
    assert check_gradients(case, model, f"grad/{variant}/") == gradients
    check_teacher(case, model)
    check_queues(case, model)


@pytest.mark.parametrize("compat", [None, OFFICIAL])
def test_retrieval(compat: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As released, queues do not know whose embeddings they hold."""
    case = Case("simla/retrieval")
    hand_over_negatives(monkeypatch, case)
    model = in_training(case, "retrieval", compat=compat)
    with torch.no_grad():
        check_targets(case, model, "out/train/", case["in/idx"])
    output = model(**inputs(case, PAIRS), pair_ids=case["in/idx"])
    check_losses(case, output, "out/train/")
    output.loss.backward()
    assert check_gradients(case, model) == 7
    check_teacher(case, model)
    check_queues(case, model)
    if compat:
        assert torch.equal(model.queue.ids, case["after/idx_queue"][0])
    else:
        assert set(case["in/idx"].tolist()) <= set(model.queue.ids.tolist())


@torch.no_grad()
def test_scores() -> None:
    case = Case("simla/retrieval")
    model = case.model("retrieval")
    video = model.encode_video(case["in/eval/image"])
    mask = case["in/eval/attention_mask"]
    text = model.encode_text(case["in/eval/input_ids"], mask)
    case.close(video.embeds, "out/eval/image_embeds")
    case.close(text.embeds, "out/eval/text_embeds")
    rows = torch.cartesian_prod(torch.arange(5), torch.arange(6))
    logits = model.match_logits(text.states[rows[:, 1]], mask[rows[:, 1]], video.states[rows[:, 0]])
    scores, similarity = logits[:, 1].view(5, 6), video.embeds @ text.embeds.T
    same_best(case, similarity, scores, "out/eval/score_i2t")
    same_best(case, similarity.T, scores.T, "out/eval/score_t2i")


def test_word_maps() -> None:
    case, where = Case("simla/retrieval"), "out/gradcam/"
    model, mask = case.model("retrieval"), case["in/gradcam/attention_mask"]
    video = model.encode_video(case["in/gradcam/image"])
    text = model.encode_text(case["in/gradcam/input_ids"], mask)
    layer = case.meta["gradcam"]["itm_text_layer"]
    found = model.word_maps(text.states, mask, video.states, layer=layer)
    case.close(found.logits, f"{where}itm_logits")
    case.close(found.attention.unflatten(-1, (4, 4)), f"{where}attention")
    case.close(found.gradient.unflatten(-1, (4, 4)), f"{where}gradient_relu")
    case.close(found.texts.unflatten(-1, (4, 4)), f"{where}itm_map")


@pytest.mark.parametrize("compat", [None, OFFICIAL])
def test_answers(compat: str | None) -> None:
    """As released, the twin has no share in the targets of answers."""
    case = Case("simla/vqa")
    model = in_training(case, "question_answering", compat=compat)
    arguments = inputs(case, {"pixel_values": "in/image"} | QUESTIONS | ANSWERS)
    output = model(**arguments)
    case.close(output.question_states.detach(), "out/train/question_states")
    if compat is None:
        case.close(output.loss.detach(), "out/train/corrected_loss")
        return
    case.close(output.answer_losses.detach(), "out/train/answer_loss")
    case.close(output.loss.detach(), "out/train/loss")
    output.loss.backward()
    assert check_gradients(case, model) == 4
    check_teacher(case, model)


@torch.no_grad()
def test_answer_ranking() -> None:
    case = Case("simla/vqa")
    model = case.model("question_answering", compat=OFFICIAL)
    states = model.encode_questions(
        *inputs(case, QUESTIONS).values(), model.encode_video(case["in/image"]).states
    )
    arguments = (states, case["in/question_mask"], *inputs(case, LIST).values())
    k = int(case["in/rank/k"])
    check_ranking(case, model.rank_answers(*arguments, k=k, merge="concat"), "out/rank/")
    model.config.compat = None
    check_corrected(case, model.rank_answers(*arguments, k=k), "")


def test_reasoning() -> None:
    """The first layers stand alone, and read the images by turns."""
    case = Case("simla/nlvr")
    model = in_training(case, "visual_reasoning")
    assert len(model.fusion.layers) == 3 and len(model.fusion.second) == 1
    images = torch.stack(case["in/image"].chunk(2), 1)
    ids, mask, labels = (case[f"in/{x}"] for x in ("input_ids", "attention_mask", "targets"))
    with torch.no_grad():
        case.close(model.teacher.class_logits(images, ids, mask)[1], "out/prediction_m")
    output = model(images, ids, mask, labels)
    case.close(output.loss.detach(), "out/loss")
    case.close(output.states.detach(), "out/hidden_state")
    case.close(output.logits.detach(), "out/prediction")
    output.loss.backward()
    assert check_gradients(case, model) == 5
    check_teacher(case, model)

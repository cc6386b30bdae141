"""ALBEF: models with the authors' weights compute the authors' numbers."""

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

from svitt_ops.models.albef import model as albef
from svitt_ops.models.albef.configuration import OFFICIAL
from svitt_ops.models.parts.grounding import class_maps
from svitt_ops.models.parts.resolution import resize_places


@pytest.mark.parametrize("compat", [None, OFFICIAL])
def test_pretraining(
    compat: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case("albef/pretrain")
    hand_over_negatives(monkeypatch, case)
    model = in_training(case, "pretraining", compat=compat)
    assert not caplog.records
    with torch.no_grad():
        video, text, taught = check_targets(case, model, "out/")
        case.close(video.states, "out/image_embeds")
        case.close(taught[0].states, "out/image_embeds_m")
        case.close(text.states, "out/text_embeds")
        masked, mask = case["choice/mlm_input_ids"], case["in/attention_mask"]
        case.close(model.word_logits(masked, mask, video.states), "out/mlm_logits")
        soft = model.teacher.word_logits(masked, mask, taught[0].states)
        case.close(soft, "out/mlm_logits_m")
    arguments = inputs(case, PAIRS | MASKED)
    model.eval()
    with torch.no_grad():
        plain = model(**arguments, alpha=0)
    check_losses(case, plain, "out/alpha0/", mlm=True)
    assert torch.equal(model.queue.next, torch.tensor([8]))  # nothing is queued outside training
    output = model.train()(**arguments, pair_ids=None)
    check_losses(case, output, "out/", mlm=True)
    case.close(output.loss.detach(), "out/loss_total")
    output.loss.backward()
    assert check_gradients(case, model) == 10
    check_teacher(case, model)
    check_queues(case, model)


def test_retrieval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal ids, in the batch and in the queue, are positives."""
    case = Case("albef/retrieval")
    hand_over_negatives(monkeypatch, case)
    model = in_training(case, "retrieval")
    with torch.no_grad():
        check_targets(case, model, "out/train/", case["in/idx"])
    output = model(**inputs(case, PAIRS), pair_ids=case["in/idx"])
    check_losses(case, output, "out/train/")
    output.loss.backward()
    assert check_gradients(case, model) == 9
    check_teacher(case, model)
    check_queues(case, model)
    assert torch.equal(model.queue.ids, case["after/idx_queue"][0])


@torch.no_grad()
def test_scores() -> None:
    case = Case("albef/retrieval")
    model = case.model("retrieval")
    video = model.encode_video(case["in/eval/image"])
    mask = case["in/eval/attention_mask"]
    text = model.encode_text(case["in/eval/input_ids"], mask)
    case.close(video.embeds, "out/eval/image_embeds")
    case.close(text.embeds, "out/eval/text_embeds")
    images, texts = (torch.arange(n) for n in (5, 7))
    rows = torch.cartesian_prod(images, texts)
    logits = model.match_logits(text.states[rows[:, 1]], mask[rows[:, 1]], video.states[rows[:, 0]])
    scores, similarity = logits[:, 1].view(5, 7), video.embeds @ text.embeds.T
    same_best(case, similarity, scores, "out/eval/score_i2t")
    same_best(case, similarity.T, scores.T, "out/eval/score_t2i")


def test_word_maps() -> None:
    case = Case("albef/retrieval")
    model, where = case.model("retrieval"), "out/gradcam/"
    mask = case["in/gradcam/attention_mask"]
    video = model.encode_video(case["in/gradcam/image"])
    text = model.encode_text(case["in/gradcam/input_ids"], mask)
    layer = case.meta["gradcam"]["itm_text_layer"]
    found = model.word_maps(text.states, mask, video.states, layer=layer)
    case.close(found.logits, f"{where}itm_logits")
    case.close(found.attention.unflatten(-1, (4, 4)), f"{where}attention")
    case.close(found.gradient.unflatten(-1, (4, 4)), f"{where}gradient_relu")
    case.close(found.texts.unflatten(-1, (4, 4)), f"{where}itm_map")
    maps = model.ground(case["in/gradcam/image"], case["in/gradcam/input_ids"], mask, layer=layer)
    case.close(maps, f"{where}itm_map")
    block = case.meta["gradcam"]["itc_vision_block"]
    maps = class_maps(model, case["in/gradcam/image"], text.embeds, layer=block)
    case.close(maps.unflatten(-1, (4, 4)), f"{where}itc_map")


def test_answers() -> None:
    case = Case("albef/vqa")
    model = in_training(case, "question_answering")
    arguments = inputs(case, {"pixel_values": "in/image"} | QUESTIONS | ANSWERS)
    with torch.no_grad():
        case.close(model(**arguments, alpha=0).loss, "out/train/alpha0/loss")
        taught = model.teacher
        video = taught.encode_video(case["in/image"])
        asked = inputs(case, QUESTIONS)
        states = taught.encode_questions(*asked.values(), video.states)
        names = ("answer_ids", "answer_mask", "answers_per_question")
        answers = [arguments[name] for name in names]
        logits = taught.answer_logits(states, asked["attention_mask"], *answers)
        real = case["in/answer_mask"][:, :-1] != 0
        case.arrays["soft"] = case["out/train/answer_logits_m"][real]
        case.close(logits[real], "soft")
    output = model(**arguments)
    case.close(output.question_states.detach(), "out/train/question_states")
    case.close(output.answer_losses.detach(), "out/train/answer_loss")
    case.close(output.loss.detach(), "out/train/loss")
    output.loss.backward()
    assert check_gradients(case, model) == 7
    check_teacher(case, model)


@torch.no_grad()
def test_answer_ranking() -> None:
    case = Case("albef/vqa")
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
    case = Case("albef/nlvr")
    model = in_training(case, "visual_reasoning")
    images = torch.stack(case["in/image"].chunk(2), 1)
    ids, mask, labels = (case[f"in/{x}"] for x in ("input_ids", "attention_mask", "targets"))
    with torch.no_grad():
        case.close(model(images, ids, mask, labels, alpha=0).loss, "out/alpha0/loss")
        case.close(model.teacher.class_logits(images, ids, mask)[1], "out/prediction_m")
    output = model(images, ids, mask, labels)
    case.close(output.loss.detach(), "out/loss")
    case.close(output.states.detach(), "out/hidden_state")
    case.close(output.logits.detach(), "out/prediction")
    output.loss.backward()
    assert check_gradients(case, model) == 7
    check_teacher(case, model)
    case.close(case.model("visual_reasoning")(images, ids, mask).logits, "out/eval_prediction")


def test_text_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("albef/nlvr_pretrain")
    model = case.model("text_assignment")
    choice = case["choice/labels"], case["choice/image_pairs"]
    monkeypatch.setattr(albef, "draw_assignments", lambda _: choice)
    output = model(**inputs(case, PAIRS))
    case.close(output.logits.detach(), "out/prediction")
    case.close(output.loss.detach(), "out/loss")
    output.loss.backward()
    assert check_gradients(case, model) == 3


def test_draws_of_text_assignment() -> None:
    """As the case's similarities have it, and each label a third of the time."""
    case = Case("albef/nlvr_pretrain")
    embeds = case.model("text_assignment").encode_video(case["in/image"]).embeds
    torch.manual_seed(0)
    counts, labels = torch.zeros(4, 4), torch.zeros(3)
    for _ in range(4000):
        drawn, rows = albef.draw_assignments(embeds)
        labels += torch.bincount(drawn, minlength=3)
        own = torch.arange(4)
        assert torch.equal(rows[drawn == 0, 0], own[drawn == 0])
        assert torch.equal(rows[drawn == 1, 1], own[drawn == 1])
        none = drawn == 2
        assert (rows[none] != own[none, None]).all() and (rows[:, 0] != rows[:, 1]).all()
        wrong = torch.where(drawn == 1, rows[:, 0], rows[:, 1])
        one = drawn < 2
        counts.index_put_((own[one], wrong[one]), torch.ones(int(one.sum())), accumulate=True)
    assert ((labels / labels.sum() - 1 / 3).abs() < 0.02).all()
    weights = case["out/similarity_weights"]
    found = counts / counts.sum(1, keepdim=True)
    assert (found - weights / weights.sum(1, keepdim=True)).abs().max() < 0.03


def test_entailment() -> None:
    case = Case("albef/ve")
    model = in_training(case, "visual_entailment")
    arguments = {**inputs(case, PAIRS), "labels": case["in/targets"]}
    with torch.no_grad():
        case.close(model(**arguments, alpha=0).loss, "out/alpha0/loss")
        case.close(model.teacher.class_logits(**inputs(case, PAIRS))[1], "out/prediction_m")
    output = model(**arguments)
    case.close(output.loss.detach(), "out/loss")
    case.close(output.states.detach(), "out/hidden_cls")
    case.close(output.logits.detach(), "out/prediction")
    output.loss.backward()
    assert check_gradients(case, model) == 5
    check_teacher(case, model)
    logits = case.model("visual_entailment")(**inputs(case, PAIRS)).logits
    case.close(logits.detach(), "out/eval_prediction")


@pytest.mark.parametrize(("old", "new"), [(4, 6), (16, 24), (6, 4)])
def test_resized_positions(old: int, new: int) -> None:
    case = Case("albef/resize")
    places = case[f"in/pos_{old}to{new}"]
    found = torch.cat([places[:, :1], resize_places(places[:, 1:], new)], 1)
    case.close(found, f"out/pos_{old}to{new}")

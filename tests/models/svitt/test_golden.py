"""Pretraining and retrieval: models with the authors' weights compute the authors' numbers."""

import pytest
import torch
from golden_cases import (
    MASKED,
    MERGES,
    OFFICIAL,
    Case,
    hand_over_negatives,
    inputs,
    same_best,
)

from svitt_ops.models import SViTTForMultipleChoice, SViTTForRetrieval
from svitt_ops.models.parts.clips import merge_clips
from svitt_ops.models.parts.expansion import resize_bias_table
from svitt_ops.models.parts.resolution import resize_places

PAIRS = {
    "pixel_values": "in/video",
    "input_ids": "in/input_ids",
    "attention_mask": "in/attention_mask",
    "pair_ids": "in/ids",
}
NEGATIVES = "neg_video_of_text", "neg_text_of_video"


@pytest.mark.parametrize(
    ("name", "compat"),
    [
        ("pretrain", OFFICIAL),
        ("pretrain", None),
        ("pretrain_exact", OFFICIAL),
        ("pretrain_exact", None),
        ("retrieval", OFFICIAL),
        ("retrieval", None),
    ],
)
def test_svitt_losses(name: str, compat: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(f"svitt/{name}")
    masks = name != "retrieval"
    model = case.model("pretraining" if masks else "retrieval", compat=compat)
    corrected = compat is None and name != "pretrain_exact"  # there both are the same
    prefix = "out/corrected/" if corrected else "out/"
    mask = case["in/attention_mask"]
    with torch.no_grad():
        video = model.encode_video(case["in/video"])
        text = model.encode_text(case["in/input_ids"], mask)
        clip, other = (case[f"choice/{which}"] for which in NEGATIVES)
        logits = model.match_logits(
            torch.cat([text.states, text.states, text.states[other]]),
            torch.cat([mask, mask, mask[other]]),
            torch.cat([video.states, video.states[clip], video.states]),
        )
        if masks and not corrected:
            masked = model.encode_text(case["choice/mlm_input_ids"], mask)
            fused = model.fuse(masked.states, mask, video.states)
            words = model.token_head(fused.states, model.text.embeddings.word.weight)
            case.close(words, "out/mlm_logits")
    layers = model.config.prune_layers
    for layer, found in zip(layers, video.indices_per_stage, strict=True):
        if f"{prefix}surviving/{layer}" in case.arrays:
            assert torch.equal(found.int(), case[f"{prefix}surviving/{layer}"])
    case.close(video.states, f"{prefix}video_states")
    case.close(video.embeds, f"{prefix}video_feat")
    case.close(text.states, "out/text_states")
    case.close(text.embeds, "out/text_feat")
    case.close(logits, f"{prefix}itm_logits")
    hand_over_negatives(monkeypatch, case, *NEGATIVES)
    output = model(**inputs(case, PAIRS | MASKED if masks else PAIRS))
    for loss in ("vtc", "vtm", "mlm") if masks else ("vtc", "vtm"):
        case.close(output[f"loss_{loss}"].detach(), f"{prefix}loss_{loss}")
    output.loss.backward()
    if corrected:
        assert case.gradients_close(model, "grad/corrected/") >= 2
    else:
        case.close(output.loss.detach(), "out/loss_total")
        assert case.gradients_close(model) >= 10
        without_ids = model.config.weights | {"vtm": 0, "mlm": 0}
        model.config.loss_weights = without_ids
        plain = {k: v for k, v in PAIRS.items() if k != "pair_ids"}
        case.close(model(**inputs(case, plain)).loss.detach(), "out/no_ids/loss_vtc")


@pytest.mark.parametrize("how", ["cls", "avg"])
def test_svitt_multimodal_pruning(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the authors' fusion layers prune where a configuration reaches them."""
    case = Case("svitt/pretrain_exact")
    given = case.meta["fusion_pruning"][how]
    first = case.meta["config"]["text"]["fusion_layer"]
    model = case.model(
        multimodal_keep_rate=given["token_keep_rate"],
        multimodal_prune_layers=[layer - first for layer in given["token_drop_loc"]],
        multimodal_prune_by={"cls": "cls", "avg": "mean"}[how],
    )
    mask, where = case["in/attention_mask"], f"out/fusion_pruning/{how}/"
    with torch.no_grad():
        video = model.encode_video(case["in/video"])
        text = model.encode_text(case["in/input_ids"], mask)
        fused = model.fuse(text.states, mask, video.states)
        case.close(fused.states, f"{where}fusion_states")
        kept = case[f"{where}kept_0"]
        if how == "avg":  # places among those that the first pruning left
            kept = kept.gather(1, case[f"{where}kept_1"].long())
        assert torch.equal(fused.video_indices.int(), kept)
        hand_over_negatives(monkeypatch, case, *NEGATIVES)
        output = model(**inputs(case, PAIRS | MASKED))
    case.close(output.loss_vtm, f"{where}loss_vtm")
    case.close(output.loss_mlm, f"{where}loss_mlm")
    case.close(output.loss_vtc, "out/loss_vtc")


@pytest.mark.parametrize("how", ["contiguous", "strided"])
def test_svitt_match_scores_of_several_clips(how: str) -> None:
    case = Case("svitt/retrieval")
    model = case.model("multiple_choice", compat=OFFICIAL)
    assert isinstance(model, SViTTForMultipleChoice)
    frames = case["in/eval/video"]
    clips = [frames[:, k::2] if how == "strided" else frames[:, 4 * k : 4 * k + 4] for k in (0, 1)]
    clips = torch.stack(clips, 1).flatten(0, 1)
    ids, mask = case["in/eval/input_ids"], case["in/eval/attention_mask"]
    where = f"out/eval/{how}/"
    with torch.no_grad():
        video, text = model.encode_video(clips), model.encode_text(ids, mask)
        states = video.states.unflatten(0, (5, 2))
        embeds = video.embeds.unflatten(0, (5, 2))
        logits = [
            model.choose(states[:, [k]], ids.expand(5, -1, -1), mask.expand(5, -1, -1)).scores
            for k in (0, 1)
        ]
        chosen = {
            name: model.choose(states, ids.expand(5, -1, -1), mask.expand(5, -1, -1), merge=merge)
            for name, merge in MERGES.items()
        }
    similarity = embeds.mean(1) @ text.embeds.T
    case.close(embeds, f"{where}video_feat")
    case.close(similarity, f"{where}sim_v2t")
    case.close(torch.stack(logits, 1), f"{where}clip_match_logits")
    if how == "contiguous":
        case.close(states[:2], "out/eval/video_states")
        for layer, found in zip((3, 6, 9), video.indices_per_stage, strict=True):
            assert torch.equal(found.int(), case[f"out/eval/surviving/{layer}"])
    for name, found in chosen.items():
        assert torch.equal(found.choices, found.scores.argmax(1))
        same_best(case, similarity, found.scores, f"{where}{name}/score_v2t")
        same_best(case, similarity.T, found.scores.T, f"{where}{name}/score_t2v")


@pytest.mark.parametrize("task", ["pretraining", "retrieval"])
def test_a_retrieval_checkpoint(task: str, caplog: pytest.LogCaptureFixture) -> None:
    """It has no head for masked tokens."""
    model = Case("svitt/retrieval").model(task)
    if task == "retrieval":
        assert type(model) is SViTTForRetrieval and caplog.text == ""
        assert model.config.weights == dict.fromkeys(("vtc", "vtm", "mlm"), 1)
        return
    assert model.config.loss_weights == {"vtc": 1, "vtm": 1, "mlm": 0}
    assert "nothing for: token_head.bias" in caplog.text
    assert "the head for masked tokens starts from random" in caplog.text


def test_merges() -> None:
    scores = torch.tensor([[1.0, 3.0], [2.0, 5.0]])
    assert merge_clips(scores, "mean", 0).tolist() == [1.5, 4]
    assert merge_clips(scores, "max", 1).tolist() == [3, 5]
    torch.testing.assert_close(merge_clips(scores, "logsumexp", 1), scores.exp().sum(1).log())
    assert torch.equal(merge_clips(scores[:, :1], "concat", 1), scores[:, 0])
    with pytest.raises(ValueError, match="merge='concat' must have 1 clip, got 2"):
        merge_clips(scores, "concat", 1)
    with pytest.raises(
        ValueError, match="merge must be one of logsumexp, mean, max, concat, got 'sum'"
    ):
        merge_clips(scores, "sum", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "old", "new"), [("4to6", 4, 6), ("6to4", 6, 4), ("14to24", 14, 24)]
)
def test_bias_of_another_resolution_is_the_authors(name: str, old: int, new: int) -> None:
    case = Case("singularity/resize")
    table = case[f"in/table_{name}"]
    found = resize_bias_table(table, new, 1, source_grid=old)
    case.close(found, f"out/table_{name}", 1e-6)
    # Frame by frame: of a table of three frames each slice is resized alone, then they expand.
    slices = [table[:-3] * k for k in range(5)]
    deep = resize_bias_table(torch.cat([*slices, table[-3:]]), new, 6, source_grid=old)
    planes = deep[:-3].unflatten(0, (11, -1))
    wanted = case[f"out/table_{name}"][:-3]
    for plane, k in zip(planes, [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4], strict=True):
        torch.testing.assert_close(plane, wanted * k, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "new"), [("4to6", 6), ("16to24", 24), ("6to4", 4)])
def test_places_of_another_resolution_are_the_authors(name: str, new: int) -> None:
    case = Case("albef/resize")
    places = case[f"in/pos_{name}"]
    found = torch.cat([places[:, :1], resize_places(places[:, 1:], new)], 1)
    case.close(found, f"out/pos_{name}", 2e-6)

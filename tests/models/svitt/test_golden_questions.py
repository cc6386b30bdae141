"""Question answering: with the authors' weights, the authors' losses and rankings."""

import copy
import json

import pytest
import torch
from golden_cases import (
    ANSWERS,
    FOLDER,
    LIST,
    MERGES,
    OFFICIAL,
    QUESTIONS,
    Case,
    check_answers,
    check_corrected,
    check_ranking,
    inputs,
)

from svitt_ops.models import SViTTConfig, SViTTForQuestionAnswering, convert
from svitt_ops.models.parts.key_maps import placed, rename
from svitt_ops.models.parts.released import OFFICIAL_CHECKPOINT


def prune_like_the_case(model: SViTTForQuestionAnswering, case: Case) -> None:
    """Fusion pruning as meant, over the released tower."""
    given = case.meta["fusion_pruning"]
    first = case.meta["config"]["text"]["fusion_layer"]
    config = copy.deepcopy(model.config)
    config.compat = None
    config.multimodal_keep_rate = given["token_keep_rate"]
    config.multimodal_prune_layers = [layer - first for layer in given["token_drop_loc"]]
    model.fusion.config = config


def test_svitt_training() -> None:
    case = Case("svitt/vqa")
    model = case.model("question_answering", compat=OFFICIAL, multimodal_keep_rate=0.5)
    arguments = inputs(case, QUESTIONS | ANSWERS)
    clips = case["in/video"][:, :4]
    output = model(clips, **arguments)
    case.close(output.question_states.detach(), "out/train/question_states")
    case.close(output.answer_losses.detach(), "out/train/answer_loss")
    case.close(output.loss.detach(), "out/train/loss")
    assert torch.equal(output.loss, output.loss_lm)
    output.loss.backward()
    assert case.gradients_close(model) == 8
    with torch.no_grad():
        video = model.encode_video(clips)
        for layer, found in zip((3, 6, 9), video.indices_per_stage, strict=True):
            assert torch.equal(found.int(), case[f"out/train/surviving/{layer}"])
        case.close(video.states, "out/train/video_states")
        check_answers(model, case, output.question_states)
        prune_like_the_case(model, case)
        pruned = model(clips, **arguments)
        case.close(pruned.question_states, "out/train/fusion_pruning/question_states")
        case.close(pruned.loss, "out/train/fusion_pruning/loss")
        text = model.encode_text(*inputs(case, QUESTIONS).values())
        kept = model.fuse(text.states, case["in/question_mask"], video.states).video_indices
    assert torch.equal(kept.int(), case["out/train/fusion_pruning/kept"])


def test_svitt_training_corrected() -> None:
    case = Case("svitt/vqa")
    model = case.model("question_answering")
    with torch.no_grad():
        output = model(case["in/video"][:, :4], **inputs(case, QUESTIONS | ANSWERS))
        case.close(output.loss, "out/train/corrected/loss")
        # By default pruning acts, as with the question's two passes in the authors' layers.
        assert SViTTConfig().prunes_multimodally and not model.config.prunes_multimodally
        model.config.multimodal_keep_rate = 0.4
        model.config.multimodal_prune_layers = [0]
        pruned = model(case["in/video"][:, :4], **inputs(case, QUESTIONS | ANSWERS))
    assert abs(pruned.loss - output.loss) > 1e-3


@torch.no_grad()
def test_svitt_ranking() -> None:
    case = Case("svitt/vqa")
    model = case.model("question_answering", compat=OFFICIAL)
    answers, k = inputs(case, LIST), int(case["in/rank/k"])
    ids, mask = inputs(case, QUESTIONS).values()
    clips = case["in/video"].unflatten(1, (2, 4))
    video = model.encode_video(clips.flatten(0, 1)).states.unflatten(0, (4, 2))
    states = model.encode_questions(ids, mask, video)
    assert states.shape == (4, 2, *ids.shape[1:], 32)
    case.close(states[:, 0], "out/train/question_states")
    one = states[:, 0]
    for rows in (512, 5):
        found = model.rank_answers(one, mask, **answers, k=k, merge="concat", rows=rows)
        check_ranking(case, found, "out/rank/concat/")
    check_ranking(case, model.rank_answers(one, mask, **answers, k=k), "out/rank/lse_one_clip/")
    for name, merge in MERGES.items():
        found = model.rank_answers(states, mask, **answers, k=k, merge=merge)
        check_ranking(case, found, f"out/rank/{name}/")
    model.config.compat = None
    for merge in ("concat", *MERGES.values()):  # of one clip all are the same
        check_corrected(case, model.rank_answers(one, mask, **answers, k=k, merge=merge), "concat/")
    prune_like_the_case(model, case)
    pruned = model.encode_questions(ids, mask, video[:, 0])
    check_corrected(case, model.rank_answers(pruned, mask, **answers, k=k), "fusion_pruning/")
    model.config.compat = OFFICIAL
    found = model.rank_answers(pruned, mask, **answers, k=k, merge="concat")
    check_ranking(case, found, "out/rank/fusion_pruning/")


def test_every_tensor_of_a_checkpoint_is_accounted_for(caplog: pytest.LogCaptureFixture) -> None:
    """A released-style file: the golden's names, the indices beside the tables, new values."""
    case = Case("svitt/vqa")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: value if value.dtype == torch.int64 else torch.randn(value.shape, generator=generator)
        for name, value in case.state().items()
    }
    tensors |= {name: torch.zeros(101, 101, dtype=torch.int64) for name in case.meta["not_stored"]}
    words = tensors["text_decoder.bert.embeddings.word_embeddings.weight"]
    assert "text_decoder.cls.predictions.decoder.weight" in tensors
    tensors["text_decoder.cls.predictions.decoder.weight"] = words  # tied there
    model = convert.load_official(tensors, case.config(), task="question_answering")
    assert caplog.text == ""
    found = convert.convert_into(model, tensors, OFFICIAL_CHECKPOINT)
    assert found.unknown == () and found.missing == ()
    assert sorted((*found.loaded, *found.dropped)) == sorted(tensors)
    assert len(found.loaded) == len(model.state_dict())
    kinds = {name.split(".", 1)[1] if "_id" in name else name for name in found.dropped}
    kinds = {name for name in kinds if not name.endswith("relative_position_index")}
    assert kinds == {
        "embeddings.position_ids",
        "bert.embeddings.position_ids",
        "text_decoder.cls.predictions.decoder.weight",
        "text_decoder.cls.predictions.decoder.bias",
    }
    state = model.state_dict()
    for name in found.loaded:
        target = placed(rename(name, OFFICIAL_CHECKPOINT), model.config)
        assert target is not None and torch.equal(state[target], tensors[name])


def test_a_decoder_starts_as_the_authors_starts(caplog: pytest.LogCaptureFixture) -> None:
    """From a pretraining checkpoint: every tensor of it from the one that the authors copy."""
    case = Case("svitt/pretrain")
    tensors = case.state()
    layers, first = case.meta["config"]["text"]["layers"], 9
    model = convert.load_official(tensors, case.config(), task="question_answering")
    fusing = model.config.fusion_layer
    assert layers - fusing == 3 == model.config.decoder_layers
    assert f"{len(model.decoder.state_dict())} of its {len(model.decoder.state_dict())}" in (
        caplog.text
    )
    assert "no counterpart for: " in caplog.text and "nothing for" not in caplog.text
    copied = json.loads((FOLDER / "singularity/key_maps.json").read_text())["tasks"]["vqa"][
        "loaded"
    ]
    count = 0
    for name, source in copied.items():
        target = rename(name, OFFICIAL_CHECKPOINT)
        if not name.startswith("text_decoder.") or not target:
            continue
        parts = source.split(".")
        if "layer" in parts:
            at = parts.index("layer") + 1
            parts[at] = str(int(parts[at]) - first + fusing)
        assert torch.equal(model.state_dict()[target], tensors[".".join(parts)]), name
        count += 1
    assert count == 16

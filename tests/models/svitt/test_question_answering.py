"""SViTTForQuestionAnswering: losses, ranking, what it starts from, saving and loading."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from svitt_ops.models import (
    SViTTConfig,
    SViTTForPreTraining,
    SViTTForQuestionAnswering,
    SViTTForRetrieval,
    convert,
)

MakeConfig = Callable[..., SViTTConfig]
SHALLOW: dict[str, Any] = {"num_hidden_layers": 2, "text_num_hidden_layers": 3, "decoder_layers": 2}


@pytest.fixture
def model(make_config: MakeConfig) -> SViTTForQuestionAnswering:
    torch.manual_seed(0)
    return SViTTForQuestionAnswering(make_config(initializer_range=0.2, decoder_layers=2)).eval()


@pytest.fixture
def questions(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Three questions with 2, 0 and 3 answers of 1 to 3 tokens."""
    ids = torch.tensor([[2, 7, 3, 0, 0], [2, 8, 9, 3, 0], [2, 7, 3, 0, 0], [2, 4, 5, 6, 3]])
    ids = torch.cat([ids, torch.tensor([[2, 8, 6, 3, 0]])])
    return {
        **{name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")},
        "answer_ids": ids,
        "answer_mask": (ids != 0).long(),
        "answers_per_question": torch.tensor([2, 0, 3]),
        "answer_weights": torch.tensor([1.0, 0.5, 2.0, 0.0, 0.25]),
    }


def likelihood(model: Any, states: Tensor, mask: Tensor, answer: Tensor) -> Tensor:
    """Of one answer without padding to one question, token by token."""
    total = torch.zeros(())
    for k in range(1, len(answer)):
        decoded = model.decoder(answer[None, :k], states[None], mask[None] == 0)
        words = model.decoder.embeddings.word.weight
        total = total + model.token_head(decoded, words)[0, -1].log_softmax(-1)[answer[k]]
    return total


def test_every_parameter_learns(
    model: SViTTForQuestionAnswering, questions: dict[str, Tensor]
) -> None:
    assert not model.train().leaves_parameters_unused
    model.before_step()
    output = model(**questions)
    output.loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # An attention over one row of keys alone cannot tell their biases apart.
    assert [name for name in unused if not name.endswith("key.bias")] == []
    assert not any("projection" in name or "match" in name for name in model.state_dict())
    assert model.encode_video(questions["pixel_values"]).embeds is None


def test_losses(model: SViTTForQuestionAnswering, questions: dict[str, Tensor]) -> None:
    output = model(**questions)
    states, mask = output.question_states, questions["attention_mask"]
    for row, (question, length) in enumerate(zip((0, 0, 2, 2, 2), (3, 4, 3, 5, 4), strict=True)):
        answer = questions["answer_ids"][row, :length]
        wanted = -likelihood(model, states[question], mask[question], answer)
        torch.testing.assert_close(output.answer_losses[row], wanted)
    weighted = (output.answer_losses * questions["answer_weights"]).sum() / 3
    torch.testing.assert_close(output.loss, weighted)
    plain = {k: v[:3] for k, v in questions.items() if k not in list(questions)[-2:]}
    torch.testing.assert_close(model(**plain).loss, model(**plain).answer_losses.sum() / 3)
    one = {k: v[:1] for k, v in plain.items()}
    assert model(**one).loss.isfinite()


def test_padding_changes_nothing(
    model: SViTTForQuestionAnswering, questions: dict[str, Tensor]
) -> None:
    wanted = model(**questions).loss
    for name in ("answer_ids", "answer_mask", "input_ids", "attention_mask"):
        questions[name] = torch.nn.functional.pad(questions[name], (0, 4))
    torch.testing.assert_close(model(**questions).loss, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers_per_question": torch.tensor([2, 1, 3])}, "add up to the 5 rows of .* got 6"),
        ({"answers_per_question": torch.tensor([2, 3])}, r"must have shape \(3,\), got \(2,\)"),
        ({"answers_per_question": None}, "answers_per_question must be given for 5 answers to 3"),
        ({"answer_weights": torch.ones(4)}, r"answer_weights must have shape \(5,\), got \(4,\)"),
        ({"answer_mask": torch.ones(5, 4)}, r"answer_mask must have shape \(5, 5\), got \(5, 4\)"),
        ({"answer_ids": torch.ones(5, 17).long()}, r"answer_ids must have .* 2 to 16 tokens\), "),
        ({"answer_ids": torch.ones(5, 1).long()}, r"answer_ids must have .* got \(5, 1\)"),
        ({"answer_ids": torch.ones(5).long()}, r"answer_ids must have .* got \(5,\)"),
    ],
)
def test_wrong_answers(
    model: SViTTForQuestionAnswering,
    questions: dict[str, Tensor],
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=f"SViTTForQuestionAnswering: .*{message}"):
        model(**{**questions, **changes})


@torch.no_grad()
def test_multimodal_pruning_acts(
    make_config: MakeConfig, model: SViTTForQuestionAnswering, questions: dict[str, Tensor]
) -> None:
    def loss(**changes: Any) -> Tensor:
        other = SViTTForQuestionAnswering(make_config(decoder_layers=2, **changes)).eval()
        other.load_state_dict(model.state_dict())
        torch.manual_seed(0)  # the released code draws its patterns in evaluation too
        return other(**questions).loss

    assert abs(loss(multimodal_keep_rate=1.0) - loss()) > 1e-3
    official = {"compat": "svitt-official"}  # never prunes, whatever the rate
    assert torch.equal(loss(**official, multimodal_keep_rate=1.0), loss(**official))


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 3, 9])
def test_ranking_is_by_likelihood(
    model: SViTTForQuestionAnswering, questions: dict[str, Tensor], k: int
) -> None:
    mask, ids = questions["attention_mask"], questions["answer_ids"]
    answer_mask = questions["answer_mask"]
    states = model(**questions).question_states
    found = model.rank_answers(states, mask, ids, answer_mask, k=k)
    assert found.answers.shape == found.scores.shape == (3, min(k, 5))
    scores = torch.stack(
        [
            torch.stack([likelihood(model, states[q], mask[q], a[m > 0]) for a, m in pairs])
            for q in range(3)
            for pairs in [list(zip(ids, answer_mask, strict=True))]
        ]
    )
    torch.testing.assert_close(found.scores, scores.gather(1, found.answers))
    starts = torch.stack(
        [torch.stack([likelihood(model, states[q], mask[q], a[:2]) for a in ids]) for q in range(3)]
    )
    best = starts.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(found.answers.sort(1).values, best.sort(1).values)
    assert (found.scores.diff(dim=1) <= 0).all()
    if k == 9:  # rows 0 and 2 are one answer: the first comes first
        places = [[row.tolist().index(a) for a in (0, 2)] for row in found.answers]
        assert all(later == first + 1 for first, later in places)
    alone = model.rank_answers(states[1:2], mask[1:2], ids, answer_mask, k=k, rows=1)
    torch.testing.assert_close(alone.scores, found.scores[1:2])
    assert torch.equal(alone.answers, found.answers[1:2])


@torch.no_grad()
def test_ranking_of_answers_of_one_token(
    model: SViTTForQuestionAnswering, questions: dict[str, Tensor]
) -> None:
    """A list cut to [CLS] and a token: the first token is all there is."""
    states, mask = model(**questions).question_states, questions["attention_mask"]
    ids = torch.tensor([[2, 9], [2, 4], [2, 30]])
    found = model.rank_answers(states, mask, ids, torch.ones_like(ids))
    for q in range(3):
        wanted = torch.stack([likelihood(model, states[q], mask[q], a) for a in ids])
        torch.testing.assert_close(found.scores[q], wanted.sort(descending=True).values)


@torch.no_grad()
def test_ranking_over_clips(model: SViTTForQuestionAnswering, questions: dict[str, Tensor]) -> None:
    ids, mask = questions["input_ids"], questions["attention_mask"]
    answers = questions["answer_ids"], questions["answer_mask"]
    clips = torch.stack([questions["pixel_values"], questions["pixel_values"].flip(1)], 1)
    video = model.encode_video(clips.flatten(0, 1)).states.unflatten(0, (3, 2))
    states = model.encode_questions(ids, mask, video)
    each = [model.encode_questions(ids, mask, video[:, k]) for k in (0, 1)]
    torch.testing.assert_close(states, torch.stack(each, 1))
    of_clips = [model.rank_answers(one, mask, *answers) for one in each]
    scores = torch.stack([x.scores.gather(1, x.answers.argsort(1)) for x in of_clips])
    for merge, wanted in (("mean", scores.mean(0)), ("logsumexp", scores.logsumexp(0))):
        found = model.rank_answers(states, mask, *answers, merge=merge)
        torch.testing.assert_close(found.scores.gather(1, found.answers.argsort(1)), wanted)
    with pytest.raises(ValueError, match="merge='concat' must have 1 clip, got 2"):
        model.rank_answers(states, mask, *answers, merge="concat")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer_ids": torch.ones(0, 5).long(), "answer_mask": torch.ones(0, 5)}, "one answer"),
        ({"answer_mask": torch.tensor([[1, 1], [1, 0]])}, "first two tokens .* got 0 in row 1"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"merge": "sum"}, "merge must be one of logsumexp, mean, max, concat, got 'sum'"),
        (
            {"question_mask": torch.ones(3, 5)},
            r"question_mask of shape \(3, 5\), got \(3, 1, 6, 24\)",
        ),
        ({"question_states": torch.ones(3, 6)}, r"question_states must have .* got \(3, 1, 6\)"),
    ],
)
def test_wrong_rankings(
    model: SViTTForQuestionAnswering, changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "question_states": torch.ones(3, 6, 24),
        "question_mask": torch.ones(3, 6),
        "answer_ids": torch.ones(2, 2).long(),
        "answer_mask": torch.ones(2, 2),
    }
    with pytest.raises(ValueError, match=message):
        model.rank_answers(**{**arguments, **changes})


def fusion_start(source: Any, name: str) -> Tensor:
    name = name.replace("decoder.embeddings.", "text.embeddings.")
    return source.state_dict()[name.replace("decoder.layers.", "fusion.layers.")]


def test_it_starts_from_a_pretrained_folder(
    make_config: MakeConfig,
    questions: dict[str, Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    source = SViTTForPreTraining(
        make_config(
            initializer_range=0.2, text_hidden_size=32, text_num_attention_heads=2, decoder_layers=2
        )
    )
    source.save_pretrained(tmp_path / "a")
    with caplog.at_level(logging.WARNING):
        model = SViTTForQuestionAnswering.from_pretrained(tmp_path / "a", num_frames=8)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "starts from the fusion layers" in lines[0]
    assert "57 of its 57 tensors" in lines[0]
    decoder = [name for name in model.state_dict() if name.startswith("decoder.")]
    for name in (*decoder, "token_head.bias", "fusion.layers.1.mlp.up.weight"):
        assert torch.equal(model.state_dict()[name], fusion_start(source, name)), name
    # It is no view of what it starts from.
    with torch.no_grad():
        model.text.embeddings.word.weight.add_(1)
    assert torch.equal(model.decoder.embeddings.word.weight, source.text.embeddings.word.weight)
    caplog.clear()
    model.save_pretrained(tmp_path / "b")
    again = SViTTForQuestionAnswering.from_pretrained(tmp_path / "b")
    assert caplog.text == "" and again.config.num_frames == 8
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    questions["pixel_values"] = questions["pixel_values"].repeat(1, 2, 1, 1, 1)
    assert torch.equal(again.eval()(**questions).loss, model.eval()(**questions).loss)
    with pytest.raises(ValueError, match="decoder_layers must be 2, that of the weights in"):
        SViTTForQuestionAnswering.from_pretrained(tmp_path / "b", decoder_layers=3)


def test_what_has_no_start_is_said(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A head that the folder has not, more layers than fuse, and other widths than the video's."""
    SViTTForRetrieval(make_config()).save_pretrained(tmp_path / "a")
    with caplog.at_level(logging.WARNING):
        model = SViTTForQuestionAnswering.from_pretrained(tmp_path / "a", decoder_layers=3)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3 and "53 of its 83 tensors" in lines[0]
    head, decoder = sorted(lines[1:], key=lambda line: "token_head" not in line)
    assert head.endswith("the head for masked tokens starts from random or initial weights")
    assert decoder.endswith("the answer decoder starts from random or initial weights")
    for part in ("layers.0.cross_attention.key.weight", "layers.1.cross_attention.value.weight"):
        assert f"decoder.{part}" in decoder
    assert "decoder.layers.2.attention.query.weight" in decoder
    kept = model.decoder.layers[1].cross_attention.query.weight
    assert torch.equal(kept, model.fusion.layers[1].cross_attention.query.weight)


def test_bert_starts_a_decoder_too(make_config: MakeConfig) -> None:
    from transformers import BertConfig, BertForPreTraining

    config = make_config(decoder_layers=2)
    bert = BertForPreTraining(
        BertConfig(
            vocab_size=50,
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=40,
            max_position_embeddings=16,
        )
    )
    model = SViTTForQuestionAnswering(config)
    random = model.decoder.layers[0].cross_attention.query.weight.clone()
    convert.load_bert(model, bert)
    ours, theirs = model.decoder.layers[1], bert.bert.encoder.layer[3]
    assert torch.equal(ours.attention.query.weight, theirs.attention.self.query.weight)
    assert torch.equal(model.token_head.bias, bert.cls.predictions.bias)
    assert torch.equal(model.decoder.layers[0].cross_attention.query.weight, random)


def test_questions_are_one_graph(make_config: MakeConfig, questions: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = SViTTForQuestionAnswering(make_config(**SHALLOW, prune_layers=[0])).eval()
    torch._dynamo.reset()
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(forward(**questions).loss, model(**questions).loss)


def test_gradient_checkpointing(
    model: SViTTForQuestionAnswering, questions: dict[str, Tensor]
) -> None:
    model.train()
    grads = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        model(**questions).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_bf16_and_meta(model: SViTTForQuestionAnswering, questions: dict[str, Tensor]) -> None:
    wanted = model(**questions)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**questions)
        ranked = model.rank_answers(
            output.question_states,
            questions["attention_mask"],
            questions["answer_ids"],
            questions["answer_mask"],
        )
    assert output.loss.dtype == ranked.scores.dtype == torch.float32
    torch.testing.assert_close(output.loss, wanted.loss, rtol=0.1, atol=0.1)
    assert len(ranked.scores[0, [0, 2]].unique()) == 2  # no ties of rounded scores
    on_meta = {name: x.to("meta") for name, x in questions.items()}
    output = model.to("meta").train()(**on_meta)
    output.loss.backward()
    assert output.answer_losses.shape == (5,) and output.question_states.shape == (3, 6, 24)

"""Questions: files of every form, broken ones, answers as tokens, and what accuracy counts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizer

from svitt_ops.training import cli
from svitt_ops.training.data.annotations import Annotations, read_annotations
from svitt_ops.training.data.augment import Augmentation
from svitt_ops.training.data.datasets import ClipSpec
from svitt_ops.training.data.text import append_sep, train_tokenizer
from svitt_ops.training.engine.build import build_model
from svitt_ops.training.engine.recipes import load_recipe
from svitt_ops.training.tasks.parts.evaluation import Evaluation, Reading
from svitt_ops.training.tasks.parts.questions import (
    QUESTIONS,
    Question,
    clean_answer,
    encode_answers,
    read_answers,
)
from svitt_ops.training.tasks.qa import (
    Asked,
    QuestionCollator,
    QuestionDataset,
    answer_questions,
    model_inputs,
    render,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "svitt" / "tokenizer.json").read_text())
GOOD = {"video": "a.mp4", "question": "What is it?", "answer": "A  Dog"}
CSV = "video,question,answer,type\na.mp4,What is it?,a dog,3\n"


def read(folder: Path, content: Any, **options: Any) -> Annotations[Question]:
    path = folder / "anno.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_annotations(path, form=QUESTIONS, **options)


@pytest.mark.parametrize("form", ["json", "json lines", "csv", "tsv", "parquet"])
def test_every_form(tmp_path: Path, form: str) -> None:
    row = {**GOOD, "type": 3}
    content: Any = [row]
    if form == "json lines":
        content = json.dumps(row).encode()  # of one line
    elif form in ("csv", "tsv"):
        content = CSV.replace(",", "," if form == "csv" else "\t").encode()
    elif form == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").Table.from_pylist([row])
        parquet.write_table(table, tmp_path / "table")
        content = (tmp_path / "table").read_bytes()
    (found,) = read(tmp_path, content, root="/r").entries
    assert (found.media, found.captions) == (("/r/a.mp4",), ("what is it",))
    assert (found.answers, found.weights, found.type) == (("a dog",), (1.0,), "3")


def test_several_answers_weigh_by_how_often_they_were_given(tmp_path: Path) -> None:
    given = ["Yes", "yes", "no", " yes "]
    (found,) = read(tmp_path, [{**GOOD, "answer": given}]).entries
    assert (found.answers, found.weights) == (("yes", "no"), (0.75, 0.25))
    listed = b'video,question,answer\na.mp4,who,"[""yes"", ""no""]"\n'
    (found,) = read(tmp_path, listed).entries
    assert (found.answers, found.type) == (("yes", "no"), "who")
    assert found.counts == (1, 1)
    (found,) = read(tmp_path, [{**GOOD, "answer": given, "dataset": "vqa"}]).entries
    assert (found.counts, found.weights) == ((3, 1), (0.75, 0.25))
    (found,) = read(tmp_path, [{**GOOD, "dataset": "vg"}]).entries
    assert (found.counts, found.weights) == ((1,), (0.5,))
    (found,) = read(tmp_path, [{**GOOD, "question": "Seen a dog?"}]).entries
    assert found.type == "other"


def test_broken_questions_are_left_out_with_a_reason(tmp_path: Path) -> None:
    bad = {
        "has no field 'answer'": {"video": "a.mp4", "question": "what"},
        "has no field 'question'": {"video": "a.mp4", "answer": "x", "caption": "x"},
        "has no field 'video'": {"question": "what", "answer": "x"},
        "field 'answer' must be text, got NoneType": {**GOOD, "answer": None},
        "field 'answer' is empty": {**GOOD, "answer": ""},
        "field 'answer' has no words": {**GOOD, "answer": "  "},
        "field 'answer' is an empty list": {**GOOD, "answer": []},
        "field 'answer' must be a list, got '[half'": {**GOOD, "answer": "[half"},
        "field 'question' has no words": {**GOOD, "question": "?"},
        "must be one text, got 2": {**GOOD, "question": ["what", "who"]},
        "must name one file, got 2": {**GOOD, "video": ["a.mp4", "b.mp4"]},
    }
    found = read(tmp_path, [*bad.values(), GOOD])
    assert len(found.entries) == 1
    for number, (reason, problem) in enumerate(zip(bad, found.problems, strict=True)):
        assert f"entry {number}: " in problem
        assert reason in problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "must hold at least one answer, got none"),
        (b"", "must hold at least one answer, got none"),
        (b'[" "]', "must hold at least one answer, got none"),
        (b'["a", 3]', "answer 1 must be text, got int"),
        (b'{"a": 1}', "must be a list of texts, got dict"),
        (b'["a"', "must be JSON, but"),
        (b"\xff\xfe\x00", "must be UTF-8"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^--answers: .*list: {message}"):
        read_answers(tmp_path / "list", "--answers")


def test_lists_of_answers(tmp_path: Path) -> None:
    (tmp_path / "list").write_text('["Yes", "no", "yes"]')
    assert read_answers(tmp_path / "list") == ["yes", "no"]
    (tmp_path / "list").write_text("a  dog\r\n\nno\n")
    assert read_answers(tmp_path / "list") == ["a dog", "no"]
    with pytest.raises(ValueError, match="cannot be read"):
        read_answers(tmp_path / "none")


@pytest.mark.parametrize("append", [False, True])
def test_answers_are_the_authors_tokens(append: bool) -> None:
    vocabulary = {piece: number for number, piece in enumerate(GOLDEN["vocab"])}
    tokenizer = append_sep(BertTokenizer(vocab=vocabulary, do_lower_case=True), append)
    texts = [clean_answer(case["raw"]) for case in GOLDEN["answers"]]
    ids, mask = encode_answers(tokenizer, texts, GOLDEN["max_a_len"])
    found = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    assert found == [case["ids"] for case in GOLDEN["answers"]]


def test_a_batch_has_the_answers_of_its_questions(corpus: Path) -> None:
    entries = read_annotations(corpus / "train_qa.json", form=QUESTIONS).entries
    several = [
        Question(**{**vars(e), "answers": ("left", *e.answers), "weights": (0.25, 0.75)})
        for e in entries[:3]
    ]
    dataset = QuestionDataset([*several, entries[3]], ClipSpec(num_frames=2), seed=0)
    clips = [dataset[number, 0] for number in range(4)]
    tokenizer = train_tokenizer(["left", *(a for e in entries for a in e.answers)], 100)
    collate = QuestionCollator(tokenizer=tokenizer, augmentation=Augmentation(flip=True))
    batch = collate(clips)
    assert batch["answers_per_question"].tolist() == [2, 2, 2, 1]
    assert batch["answer_weights"].tolist() == [0.25, 0.75] * 3 + [1]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in batch["answer_ids"]]
    assert texts == [a for clip in clips for a in clip.answers]
    # An answer names a side.
    flips = [collate([dataset[2, epoch], dataset[3, epoch]])["flips"] for epoch in range(9)]
    assert not any(first for first, _ in flips)
    assert any(second for _, second in flips)


def test_questions_share_the_clip_of_their_video(corpus: Path, answering: Any) -> None:
    entries = read_annotations(corpus / "train_qa.json", form=QUESTIONS).entries[:6]
    of_video = [[e.media for e in entries].index(e.media) // 2 for e in entries]
    assert of_video == [0, 0, 1, 1, 2, 2]
    model, tokenizer, _ = answering
    crop = Augmentation(crop_scale=(0.5, 1.0), flip=True)
    batches = []
    for share in (True, False):
        dataset = QuestionDataset(entries, ClipSpec(num_frames=4), seed=3, share_clips=share)
        collate = QuestionCollator(tokenizer=tokenizer, augmentation=crop, share_clips=share)
        batches.append(collate([dataset[number, 1] for number in range(6)]))
    once, each = batches
    assert "clip_numbers" not in each and len(each["clips"]) == len(each["boxes"]) == 6
    assert once["clip_numbers"].tolist() == of_video
    assert len(once["clips"]) == len(once["boxes"]) == len(once["flips"]) == 3
    # The loss is that of a batch in which every question brings its video's clip along.
    recipe = load_recipe("qa-msrvtt", ["output=unused", "data.train=[]", "data.short_side=null"])
    shared = model_inputs(recipe, model.config, once)
    apart = dict(shared)
    apart["pixel_values"] = shared["pixel_values"][apart.pop("clip_numbers")]
    ours, theirs = (model(**inputs) for inputs in (shared, apart))
    torch.testing.assert_close(ours.answer_losses, theirs.answer_losses)
    # And a question that names a side keeps the clip from being mirrored for all.
    sided = [Question(**{**vars(entries[0]), "captions": ("what is left",)}), *entries[1:]]
    dataset = QuestionDataset(sided, ClipSpec(num_frames=2), share_clips=True)
    collate = QuestionCollator(tokenizer=tokenizer, augmentation=crop, share_clips=True)
    flips = [collate([dataset[k, epoch] for k in range(6)])["flips"] for epoch in range(9)]
    assert not any(first for first, *_ in flips)
    assert any(second for _, second, _ in flips)


def test_a_broken_video_brings_the_answers_of_its_substitute(corpus: Path, tmp_path: Path) -> None:
    entries = [*read_annotations(corpus / "train_qa.json", form=QUESTIONS).entries[:2]]
    (tmp_path / "broken.mp4").write_bytes(b"")
    broken = {**vars(entries[0]), "media": (str(tmp_path / "broken.mp4"),), "answers": ("none",)}
    dataset = QuestionDataset([Question(**broken), entries[1]], ClipSpec(num_frames=2))
    clip = dataset[0, 0]
    assert (clip.caption, clip.answers) == (entries[1].captions[0], entries[1].answers)
    assert len(clip.skipped) >= 1


@pytest.fixture(scope="module")
def answering(make_recipe: Any, corpus: Path) -> tuple[Any, Any, list[Question]]:
    """A model, its tokenizer, and the questions of the test clips."""
    questions = [*read_annotations(corpus / "test_qa.json", form=QUESTIONS).entries]
    texts = [text for q in questions for text in (*q.captions, *q.answers)]
    tokenizer = train_tokenizer([*texts, *read_answers(corpus / "answers.json")], 100)
    torch.manual_seed(0)
    model = build_model(make_recipe(Path("unused")), tokenizer, "question_answering")
    return model.eval(), tokenizer, questions


def test_what_accuracy_counts(answering: Any, corpus: Path, monkeypatch: Any) -> None:
    model, tokenizer, questions = answering
    answers = read_answers(corpus / "answers.json")
    unknown = Question(**{**vars(questions[0]), "answers": ("maroon",)})
    asked = Asked.of([*questions, unknown], answers)
    assert len(asked.left_out) == 1
    assert "answer 'maroon' is not in the list" in asked.left_out[0]

    def first(*given: Any, **options: Any) -> Any:
        ranking = type(model).rank_answers(model, *given, **options)
        return type(ranking)(answers=ranking.answers * 0, scores=ranking.scores)

    monkeypatch.setattr(model, "rank_answers", first)
    found = answer_questions(model, tokenizer, asked)
    wanted = sum(answers[0] in q.answers for q in questions)
    assert found["accuracy"] == 100 * wanted / len(questions)
    assert found["accuracy_all"] == 100 * wanted / (len(questions) + 1)
    assert (found["questions"], found["videos"], found["answers"]) == (16, 8, 11)
    assert found["by_type"]["shape"] == {"accuracy": 0.0, "questions": 8}
    counts = [sum(a in q.answers for q in questions) for a in answers]
    assert found["chance"] == 100 * max(counts) / 16
    text = render(found)
    assert "1 more have an answer that is not in the list" in text
    assert "colour" in text


def test_the_official_accuracy(answering: Any, corpus: Path, monkeypatch: Any) -> None:
    model, tokenizer, questions = answering
    answers = read_answers(corpus / "answers.json")
    said = {"answers": (answers[0], "other"), "weights": (0.2, 0.8), "counts": (2, 8)}
    asked = Asked.of([Question(**{**vars(q), **said}) for q in questions], answers)

    def first(*given: Any, **options: Any) -> Any:
        ranking = type(model).rank_answers(model, *given, **options)
        return type(ranking)(answers=ranking.answers * 0, scores=ranking.scores)

    monkeypatch.setattr(model, "rank_answers", first)
    found = answer_questions(model, tokenizer, asked, metric="vqa")
    assert found["accuracy"] == pytest.approx(60)  # two of ten
    assert found["chance"] == pytest.approx(100)
    assert answer_questions(model, tokenizer, asked)["accuracy"] == 100
    few = Asked.of(questions, answers)
    with pytest.raises(ValueError, match=r"qa: the metric vqa .* at least 4 people .* got 1 in "):
        answer_questions(model, tokenizer, few, metric="vqa")
    with pytest.raises(ValueError, match="qa: metric must be one of exact, vqa, got 'soft'"):
        answer_questions(model, tokenizer, few, metric="soft")
    with pytest.raises(ValueError, match=r"evaluation: metric must be one of .*, got 'soft'"):
        load_recipe(None, ["task=qa", "evaluation.metric=soft"])


@pytest.mark.parametrize("merge", ["logsumexp", "mean", "max", "concat"])
def test_batches_change_nothing(answering: Any, corpus: Path, merge: str) -> None:
    model, tokenizer, questions = answering
    asked = Asked.of(questions, read_answers(corpus / "answers.json"))
    found = [
        answer_questions(
            model,
            tokenizer,
            asked,
            settings=Evaluation(clips=2, merge=merge, batch_size=size, top_k=k),
            reading=Reading(text_length=25),
        )
        for size, k in ((2, 0), (32, 10), (32, 99))
    ]
    assert found[0] == found[1] == found[2]
    assert not model.training


def test_a_model_that_is_broken_is_refused(answering: Any, corpus: Path) -> None:
    model, tokenizer, questions = answering
    asked = Asked.of(questions, read_answers(corpus / "answers.json"))
    bias = next(model.token_head.parameters())
    kept = bias.detach().clone()
    try:
        with torch.no_grad():
            bias.fill_(torch.nan)
        with pytest.raises(ValueError, match=r"qa: scores of answers: .* not finite"):
            answer_questions(model, tokenizer, asked)
    finally:
        with torch.no_grad():
            bias.copy_(kept)


def test_what_the_command_refuses(
    make_recipe: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ("task=qa", "data.answers=x")
    with pytest.raises(ValueError, match=r"data\.answer_length must be at least 2, got 1"):
        load_recipe(None, [*recipe, "data.answer_length=1"])
    validation = "data.validation=[{annotations: x}]"
    with pytest.raises(ValueError, match=r"data\.answers must be a file of the answers"):
        load_recipe(None, ["task=qa", validation])
    with pytest.raises(ValueError, match="data"):
        load_recipe(None, ["data.answers=x"])  # pretraining has none
    words = ["evaluate", "qa", "none", "--annotations", "x", "--answer-length", "1"]
    assert cli.main(words) == 2
    assert "--answer-length: must be at least 2, got 1" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    words = ["evaluate", "retrieval", str(tmp_path), "--annotations", "x", "--answers", "y"]
    assert cli.main(words) == 2
    assert "--answers: is no option of retrieval" in capsys.readouterr().err

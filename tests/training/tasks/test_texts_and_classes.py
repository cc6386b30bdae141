"""Annotations of scored pairs of texts, and of pictures with classes: every form, broken ones."""

from pathlib import Path
from typing import Any

import pytest
from picturing import FORMS, in_form, read

from svitt_ops.training.tasks import hashing, text_similarity


@pytest.mark.parametrize("form", FORMS)
def test_texts_in_every_form(form: str, tmp_path: Path) -> None:
    row = {"sentence1": "A dog.", "sentence2": "Two dogs!", "score": 3.5, "genre": "news"}
    (pair,) = read(tmp_path, in_form(tmp_path, row, form), text_similarity.FORM).entries
    assert (pair.captions, pair.score, pair.set) == (("a dog", "two dogs"), 3.5, "news")
    assert (Path(pair.file).stem, pair.media) == ("annotations", ())


def test_broken_texts(tmp_path: Path) -> None:
    good = {"sentence1": "a", "sentence2": "b", "score": 1}
    wrong = [
        ({**good, "score": "much"}, "field 'score' must be a number, got 'much'"),
        ({**good, "score": None}, "field 'score' must be a number, got None"),
        ({**good, "score": True}, "field 'score' must be a number, got True"),
        ({**good, "score": float("nan")}, "field 'score' must be a number, got nan"),
        ({**good, "score": 10**400}, "field 'score' must be a number, got 1000"),
        ({**good, "sentence1": "..."}, "field 'sentence1' has no words"),
        ({**good, "sentence2": ["a", "b"]}, "field 'sentence2' must be one text, got 2"),
        ({"sentence1": "a", "score": 1}, "has no field 'sentence2'"),
        (3, "must be an object, got int"),
    ]
    found = read(tmp_path, [good, *(row for row, _ in wrong)], text_similarity.FORM)
    assert len(found.entries) == 1
    for problem, (_, message) in zip(found.problems, wrong, strict=True):
        assert message in problem


@pytest.mark.parametrize("form", FORMS)
def test_classes_in_every_form(form: str, tmp_path: Path) -> None:
    row = {"image": "a.jpg", "labels": ["dog", "cat", "dog"]}
    (image,) = read(tmp_path, in_form(tmp_path, row, form), hashing.FORM, kind="image").entries
    assert image.labels == ("cat", "dog") and image.media == (str(tmp_path / "a.jpg"),)


def test_broken_classes(tmp_path: Path) -> None:
    good: dict[str, Any] = {"image": "a.jpg", "labels": [3, "dog"]}
    wrong = [
        ({**good, "labels": [1.5]}, "field 'labels' must be names or numbers of classes, got 1.5"),
        ({**good, "labels": [None]}, "field 'labels' must be names or numbers of classes, got"),
        ({**good, "labels": [0, 1, 0]}, "must be names or numbers of classes, got [0, 1, 0]"),
        ({**good, "labels": ["\0"]}, "field 'labels' has a NUL at position 0"),
        ({**good, "image": ["a.jpg", "b.jpg"]}, "must name one file, got 2"),
        ({"image": "a.jpg"}, "has no field 'labels'"),
    ]
    content = [good, {**good, "labels": []}, *(row for row, _ in wrong)]
    found = read(tmp_path, content, hashing.FORM, kind="image")
    assert [image.labels for image in found.entries] == [("3", "dog"), ()]
    for problem, (_, message) in zip(found.problems, wrong, strict=True):
        assert message in problem

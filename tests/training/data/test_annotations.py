"""Annotation files as users have them, and as they should not be."""

import json
from pathlib import Path
from typing import Any

import pytest

from svitt_ops.training.data.annotations import Annotations, read_annotations
from svitt_ops.training.data.text import (
    clean_caption,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)


def read(folder: Path, content: Any, **options: Any) -> Annotations:
    path = folder / "anno.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return read_annotations(path, **options)


@pytest.mark.parametrize("field", ["video", "image"])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_either_key_for_either_kind(tmp_path: Path, field: str, kind: Any) -> None:
    found = read(tmp_path, [{field: "a.mp4", "caption": "A film"}], root="/r", kind=kind)
    (entry,) = found.entries
    assert (entry.media, entry.captions, entry.kind) == (("/r/a.mp4",), ("a film",), kind)


def test_lists_of_captions_and_of_videos(tmp_path: Path) -> None:
    content = [{"video": ["a.mp4", "b.mp4"], "caption": ["One.", "Two."]}]
    (entry,) = read(tmp_path, content).entries
    assert entry.media == (str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"))
    assert entry.captions == ("one", "two")
    (joined,) = read(tmp_path, content, captions="join").entries
    assert joined.captions == ("one two",)


def test_bad_entries_are_left_out_with_a_reason(tmp_path: Path) -> None:
    bad = {
        "has no field 'video'": {"caption": "x"},
        "has no field 'caption'": {"video": "a.mp4"},
        "field 'video' must be text, got int": {"video": 3, "caption": "x"},
        "field 'caption' must be text, got NoneType": {"video": "a.mp4", "caption": None},
        "field 'caption' must be text, got int": {"video": "a.mp4", "caption": ["x", 4]},
        "field 'caption' has no words": {"video": "a.mp4", "caption": " ...!"},
        "field 'caption' is an empty list": {"video": "a.mp4", "caption": []},
        "field 'video' is empty": {"video": "", "caption": "x"},
        "must be an object, got list": ["a.mp4", "x"],
    }
    content = [*bad.values(), {"video": "a.mp4", "caption": "kept"}]
    found = read(tmp_path, content)
    assert [entry.captions for entry in found.entries] == [("kept",)]
    for number, (reason, problem) in enumerate(zip(bad, found.problems, strict=True)):
        assert f"entry {number}: {reason}" in problem
    with pytest.raises(ValueError, match=r"no usable entry among 9; the first: .*entry 0"):
        read(tmp_path, list(bad.values()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"video": "a"', "must be JSON, but line 1, column"),
        (b'[{"video": "a.mp4", "caption": "na\xefve"}]', "must be UTF-8, got byte 0xef at offset"),
        (b'{"video": "a"}', "must be a JSON list of objects, got dict"),
        (b"[]", "no usable entry"),
        (b"", "must be JSON"),
        (b"[" * 100000, "nested too deeply"),
    ],
)
def test_unreadable_files_name_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "anno.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_annotations(path)
    assert str(path) in str(error.value)


def test_missing_file_and_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.json', which cannot be read: No such file"):
        read_annotations(tmp_path / "no.json")
    wrong: Any = "audio"
    with pytest.raises(ValueError, match="kind: must be one of"):
        read_annotations(tmp_path / "no.json", kind=wrong)


def test_byte_order_mark_and_entries_that_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "anno.json"
    text = json.dumps([{"video": "a", "caption": "x", "scene": 3}, {"video": "b", "caption": "y"}])
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = read_annotations(path, keep_together="scene")
    assert [entry.together for entry in found.entries] == ["3"]
    assert "has no field 'scene'" in found.problems[0]


def test_clean_caption() -> None:
    assert clean_caption('  A <person>, dog\'s day?  Black-and/white: ("yes")~ ') == (
        "a person dogs day black and white yes"
    )
    assert clean_caption("one two three", max_words=2) == "one two"


def test_trained_tokenizer(tmp_path: Path) -> None:
    captions = ["a red square then a blue circle", "a green cross"]
    tokenizer = train_tokenizer(captions, 80)
    assert len(tokenizer) <= 80
    ids = tokenizer(captions[0])["input_ids"]
    assert ids[0] == tokenizer.cls_token_id
    assert ids[-1] == tokenizer.sep_token_id
    assert tokenizer.decode(ids[1:-1]) == captions[0]
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(str(tmp_path))(captions)["input_ids"] == tokenizer(captions)["input_ids"]
    for size in (50, 80):  # with and without room for all merges
        vocabularies = [train_tokenizer(reversed(captions), size).get_vocab() for _ in range(5)]
        assert all(found == vocabularies[0] for found in vocabularies)
    with pytest.raises(ValueError, match=r"tokenizer\.name: must be a folder"):
        load_tokenizer(str(tmp_path / "none"))

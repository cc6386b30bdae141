"""Rows of Hugging Face datasets: classes, lists, nulls, and what is refused before any is read."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")
pytest.importorskip("av")

import datasets
from datasets import ClassLabel, Features, List, Value

from svitt_ops.training.data.annotations import read_annotations
from svitt_ops.training.data.places import label
from svitt_ops.training.data.sources import find_source


def saved(folder: Path, columns: dict[str, list[Any]], **types: Any) -> Path:
    features = Features(types) if types else None
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder)
    return folder


def test_without_rows(tmp_path: Path) -> None:
    columns = {"video": ["a.mp4"], "caption": ["A dog."]}
    empty = datasets.Dataset.from_dict(columns).select([])
    empty.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    empty.to_parquet(tmp_path / "parquet" / "a.parquet")
    for folder in (tmp_path / "saved", tmp_path / "parquet"):
        with pytest.raises(ValueError) as error:
            read_annotations(folder)
        assert str(error.value) == f"annotations {folder}: has no rows"


def test_a_clone_of_the_hub_says_which_folder_to_name(tmp_path: Path) -> None:
    for name in ("README.md", "data/train-00000-of-00001.parquet", "more/a.tar", ".git/HEAD"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    wanted = f"got '{tmp_path}': name {tmp_path}/data or {tmp_path}/more, which has them"
    with pytest.raises(ValueError, match=f"{re.escape(wanted)}$"):
        find_source(tmp_path)


def test_a_class_is_its_name(tmp_path: Path) -> None:
    """Also in a list, and in a parquet file without media; a class that is not known is none."""
    kind = ClassLabel(names=["no", "yes"])
    columns = {
        "image": ["a.png", "b.png", "c.png"],
        "caption": [1, 0, -1],
        "several": [[1, 0], [0], [1]],
    }
    types = {"image": Value("string"), "caption": kind, "several": List(kind)}
    folder = saved(tmp_path / "saved", columns, **types)
    file = tmp_path / "a.parquet"
    datasets.load_from_disk(folder).to_parquet(file)
    for source in (folder, file):
        read = read_annotations(source, kind="image")
        assert [entry.captions for entry in read.entries] == [("yes",), ("no",)]
        (problem,) = read.problems
        assert problem.endswith("row 2: field 'caption' must be text, got NoneType")
        several = read_annotations(source, kind="image", columns={"caption": "several"})
        assert [entry.captions for entry in several.entries] == [("yes", "no"), ("no",), ("yes",)]


def test_pictures_of_a_list_that_lie_outside(tmp_path: Path) -> None:
    """Those without bytes are their paths, as a single picture is; without either it is a fault."""
    there = {"bytes": b"picture", "path": None}
    outside, neither = {"bytes": None, "path": "/b.png"}, {"bytes": None, "path": None}
    images = [[there, outside], [outside], [neither], None, []]
    columns = {"image": images, "caption": ["A.", "B.", "C.", "D.", "E."]}
    kind = {"bytes": Value("binary"), "path": Value("string")}
    types = {"image": List(kind), "caption": Value("string")}
    folder = saved(tmp_path / "saved", columns, **types)
    read = read_annotations(folder, kind="image")
    assert [[label(name) for name in entry.media] for entry in read.entries] == [
        [f"{folder}, row 0", "/b.png"],
        ["/b.png"],
    ]
    assert [problem.partition(": ")[2] for problem in read.problems] == [
        "row 2: field 'image' must be text, got NoneType",
        "row 3: field 'image' must be text, got NoneType",
        "row 4: field 'image' is an empty list",
    ]


def test_a_column_that_holds_no_media_is_refused_once(tmp_path: Path) -> None:
    columns = {"pictures": [[{"url": "x"}], [{"url": "y"}]], "caption": ["A.", "B."]}
    folder = saved(tmp_path / "saved", columns)
    with pytest.raises(ValueError) as error:
        read_annotations(folder, kind="image", columns={"image": "pictures"})
    assert re.fullmatch(
        rf"annotations {folder}: column 'pictures' must hold media \(bytes, or bytes and path\) or"
        r" paths, one or a list, got list<\w+: struct<url: string>>",
        str(error.value),
    )


def test_a_null_among_captions_is_passed_over_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [["A dog.", None, "A cat."], [None, None], ["A cow.", float("nan")], ["A.", 3]]
    entries = [{"video": f"{k}.mp4", "caption": text} for k, text in enumerate(texts)]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(entries))
    with caplog.at_level(logging.WARNING):
        read = read_annotations(file)
        joined = read_annotations(file, captions="join")
    assert [entry.captions for entry in read.entries] == [("a dog", "a cat"), ("a cow",)]
    assert joined.entries[0].captions == ("a dog a cat",)
    assert [problem.partition(": ")[2] for problem in read.problems] == [
        "entry 1: field 'caption' must be text, got NoneType",
        "entry 3: field 'caption' must be text, got int",
    ]
    said = f"annotations {file}: passed over 2 null in lists of field 'caption'"
    assert caplog.messages == [said, said]

"""Annotations in the forms that people have, told by content, and hints where they are others."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from svitt_ops.training.data.annotations import read_annotations

PAIRS = [("a.mp4", "a dog jumps"), ("b.mp4", "a cat, then a dog")]
CLEAN = [("a.mp4", "a dog jumps"), ("b.mp4", "a cat then a dog")]
LINES = "\n".join(json.dumps({"video": v, "caption": c}) for v, c in PAIRS)
CSV = 'video,caption\na.mp4,a dog jumps\nb.mp4,"a cat, then a dog"\n'
TSV = "video\tcaption\na.mp4\ta dog jumps\nb.mp4\ta cat, then a dog\n"
FORMS: dict[str, bytes] = {
    "json": json.dumps([{"video": v, "caption": c} for v, c in PAIRS]).encode(),
    "json with a mark": b"\xef\xbb\xbf" + LINES.encode(),
    "utf-16 with a mark": TSV.encode("utf-16"),
    "json lines": LINES.encode(),
    "json lines, old Mac": LINES.replace("\n", "\r").encode(),
    "json lines, blank lines": b"\n" + LINES.replace("\n", "\r\n\r\n").encode() + b"\n",
    "csv": CSV.encode(),
    "csv, old Mac": CSV.replace("\n", "\r").encode(),
    "csv, Windows": CSV.replace("\n", "\r\n").encode(),
    "csv, semicolons": b"Video; Caption \na.mp4;a dog jumps\nb.mp4;a cat, then a dog\n",
    "csv, more fields": b',n,caption,video\n0,3,a dog jumps,a.mp4\n1,5,"a cat, then a dog",b.mp4\n',
    "csv, all quoted": b'"video","caption"\n"a.mp4","a dog jumps"\n"b.mp4","a cat, then a dog"\n',
    "tsv": TSV.encode(),
    "tsv, an index": b"\tvideo\tcaption\n0\ta.mp4\ta dog jumps\n1\tb.mp4\ta cat, then a dog\n",
    "tsv, a quote": b'video\tcaption\na.mp4\t"a dog" jumps\nb.mp4\t"a cat, then a dog\n',
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["anno.json", "anno.txt"])
def test_every_form_under_every_name(tmp_path: Path, form: str, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[form])
    found = read_annotations(tmp_path / name, root="/r")
    assert [(e.media[0], e.captions[0]) for e in found.entries] == [
        (f"/r/{video}", caption) for video, caption in CLEAN
    ]
    assert found.problems == ()


def test_msrvtt_and_clip4clip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("video0.mp4", "video1.webm", "video1.mkv", "video1.txt", "12.avi"):
        (videos / name).touch()
    msrvtt = {
        "info": {"year": 2016},
        "videos": [
            {"video_id": "video0", "split": "train"},
            {"video_id": "video1", "split": "test"},
        ],
        "sentences": [
            {"caption": "a dog", "video_id": "video0", "sen_id": 0},
            {"caption": "a cat", "video_id": "video1", "sen_id": 1},
            {"caption": "a bird", "video_id": "video7", "sen_id": 2},
            {"caption": "a fish", "video_id": 12, "sen_id": 3},
        ],
    }
    path = tmp_path / "MSRVTT_data.json"
    path.write_text(json.dumps(msrvtt))
    found = read_annotations(path, root=videos, keep_together="sen_id")
    names = ["video0.mp4", "video1.webm", "video7", "12.avi"]  # of what is missing the id stays
    assert [e.media for e in found.entries] == [(str(videos / name),) for name in names]
    assert [e.captions for e in found.entries] == [("a dog",), ("a cat",), ("a bird",), ("a fish",)]
    assert found.entries[1].together == "1"
    assert "all of them are read: train 1, test 1" in caplog.text
    path = tmp_path / "MSRVTT_JSFUSION_test.csv"
    path.write_text("key,vid_key,video_id,sentence\nret0,msr1,video1,a cat plays\n")
    (entry,) = read_annotations(path, root=videos).entries
    assert (entry.media, entry.captions) == ((str(videos / "video1.webm"),), ("a cat plays",))
    path.write_text("video_id\nvideo0\n")
    with pytest.raises(ValueError, match=r"line 2: has no field 'caption'; has 'video_id'"):
        read_annotations(path, root=videos)


def test_parquet_through_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "anno"
    path.write_bytes(b"PAR1 whatever PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"anno: is parquet, which needs pyarrow: pip install"):
        read_annotations(path)

    class ArrowException(Exception): ...

    rows: list[Any] = [
        {"video": "a.mp4", "caption": ["A dog", "A cat"]},
        {"video": "b.mp4", "caption": None},
        {"video": "c.mp4", "caption": float("nan")},
    ]

    def read_table(file: Any) -> Any:
        assert file.read() == path.read_bytes()
        return SimpleNamespace(to_pylist=lambda: rows, schema=SimpleNamespace(metadata=None))

    arrow, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    vars(arrow).update(ArrowException=ArrowException, parquet=parquet)
    vars(parquet).update(read_table=read_table, read_schema=lambda file: [])
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    found = read_annotations(path)
    assert [e.captions for e in found.entries] == [("a dog", "a cat")]
    assert "row 1: field 'caption' must be text, got NoneType" in found.problems[0]
    assert "row 2: field 'caption' must be text, got NaN" in found.problems[1]

    def broken(_: Any) -> Any:
        raise ArrowException("Couldn't deserialize thrift\nand more")

    vars(parquet).update(read_table=broken)
    with pytest.raises(
        ValueError, match=r"cannot be read as parquet: Couldn't deserialize thrift$"
    ):
        read_annotations(path)


def test_real_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"video": [v for v, _ in PAIRS], "caption": [[c] for _, c in PAIRS]})
    parquet.write_table(table, tmp_path / "anno")
    found = read_annotations(tmp_path / "anno", root="/r")
    assert [e.captions[0] for e in found.entries] == [caption for _, caption in CLEAN]
    content = (tmp_path / "anno").read_bytes()
    (tmp_path / "anno").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        read_annotations(tmp_path / "anno")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"video": "b.mp4", "caption": "cut', "line 2: must be JSON, but Unterminated string"),
        ('{"video": "b.mp4", "caption": "\\ud83d"}', "'caption' has half a character, U+D83D, at"),
        ('{"video": "b.mp4", "caption": "a\\u0000b"}', "field 'caption' has a NUL at position 1"),
        ('{"video": "b\\u0000.mp4", "caption": "b"}', "field 'video': must be a path, got"),
        ('{"video": "b\\ud83d.mp4", "caption": "b"}', "field 'video': must be a path, got"),
        ('{"video": "b.mp4", "caption": NaN}', "field 'caption' must be text, got NaN"),
        ('{"video": "b.mp4", "captions": "b"}', "no field 'caption'; has 'video', 'captions'"),
        ('{"video_id": true, "caption": "b"}', "field 'video_id' must be text, got bool"),
        ('["b.mp4", "b"]', "line 2: must be an object, got list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "anno.jsonl"
    path.write_text('{"video": "a.mp4", "caption": "a"}\n' + line)
    found = read_annotations(path)
    assert len(found.entries) == 1
    (text,) = found.problems
    assert text.startswith(f"{path}: line 2: ") and problem in text
    text.encode()  # can be printed


def test_a_comma_without_quotes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "anno.csv"
    path.write_text('video,caption\na.mp4,a dog\n\nb.mp4,"two\nlines"\nc.mp4,a cat, then\n')
    found = read_annotations(path)
    assert [e.captions for e in found.entries] == [("a dog",), ("two lines",)]
    assert "line 6: has 3 fields where the first line has 2" in found.problems[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'video,caption\na.mp4,"open\n' + b"b.mp4,x\n" * 30000, r"line 2: .*is a quote left open"),
        (b"v,c\na.mp4,a dog\n", r"names the fields .*but its first line is 'v,c'"),
        (b"  \n", "must be JSON, .*but it is empty"),
        (b"\x1f\x8b\x08\x00", "must be JSON, .*but is compressed by gzip: unpack it"),
        (b"PK\x03\x04\x14", "but is a zip archive"),
        ("video,caption\n".encode("utf-16-le"), "holds NUL bytes"),
        (b"\x00\x00\x00\x20ftypisom", "holds NUL bytes"),
        (b"video,caption\na.mp4,na\xefve\n", "must be UTF-8, got byte 0xef at offset 22"),
        (b'{"data": [], "version": 1}', "got dict with the fields 'data', 'version'"),
        (b"[" + b"9" * 5000 + b"]", "must be JSON, but Exceeds the limit"),
        (b'"a text"', "must be a JSON list of objects, got str"),
        (
            b'{"video": ["a", "b"], "caption": ["x", "y"]}',
            "must be a list of rows, got an object of columns",
        ),
        (b'{"video": 1}\n{"video"', "must be JSON|no usable entry"),
    ],
)
def test_what_is_something_else_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "anno.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_annotations(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").touch()
    (tmp_path / "anno.json").write_text(
        json.dumps([{"video": "a", "caption": "x"}, {"video": "~/b.mp4", "caption": "y"}])
    )
    found = read_annotations("~/anno.json", root="~/v")
    wanted = [(str(tmp_path / "v" / "a.mp4"),), (str(tmp_path / "b.mp4"),)]
    assert [e.media for e in found.entries] == wanted

"""Files of rows with named fields, by what they are and not by what they are called.

JSON lists, JSON lines, CSV, TSV, parquet, and MSR-VTT's JSON of videos and sentences.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
OTHERS = {
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"PK\x03\x04": "a zip archive, as spreadsheets are: unpack it, or save it as CSV",
    b"BZh": "compressed by bzip2: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"\x89HDF": "of HDF5",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
}
"""Beginnings of files that are something else, and what."""
FORMS = "JSON, JSON lines, CSV, TSV or parquet"
DELIMITERS = (",", "\t", ";")
SHOWN_FIELDS = 12


@dataclass(frozen=True)
class Row:
    """One entry of a file."""

    place: str
    """Where it stands, such as "entry 3" or "line 17"."""
    content: Any
    """By field, where it is as it should be."""
    problem: str = ""
    """Why there is no content."""


def read_rows(path: Path, media: Sequence[str], texts: Sequence[str]) -> list[Row]:
    """The rows of a file.

    Args:
        path: the file.
        media: fields of which every row has one; and one of them or of `texts` stands in the first
            line of a CSV or TSV file.
        texts: fields of which every row has one.

    Raises:
        ValueError: the file cannot be read, or is nothing of this kind; says what it is.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"annotations {path}: cannot be read ({error.strerror})") from error
    if content.startswith(b"PAR1"):
        return _parquet(path, content)
    for start, what in OTHERS.items():
        if content.startswith(start):
            raise ValueError(f"annotations {path}: must be {FORMS}, but is {what}")
    text = _text(path, content)
    del content
    wanted = (*media, *texts)
    beginning = text[:4096].lstrip()[:1]
    if beginning in ("[", "{", '"') and not (beginning == '"' and _delimiter(text, wanted)):
        return _json(path, text, media, texts)
    if beginning and (delimiter := _delimiter(text, wanted)):
        return _csv(path, text, delimiter)
    first = text.strip().split("\n")[0].strip()
    said = f"its first line is {first[:80]!r}" if first else "it is empty"
    raise ValueError(
        f"annotations {path}: must be {FORMS}, where the first line of CSV and TSV names the fields"
        f" (one of {', '.join(wanted)}), but {said}"
    )


@contextmanager
def needs(package: str, what: str) -> Iterator[None]:
    """Say of what cannot be imported which package that would be."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"{what}, which needs {package}: pip install {package}") from error


def class_names(schema: Any) -> dict[str, list[str]]:
    """Names of the classes of an Arrow schema's columns, where Hugging Face datasets left them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: names for name in features if (names := _names_in(features[name]))}
    except (KeyError, TypeError, ValueError):
        return {}


def _names_in(feature: Any) -> list[str] | None:
    """Those of a `ClassLabel`, or of a list of it, as any release writes one."""
    if isinstance(feature, list):
        return _names_in(feature[0])
    if feature.get("_type") == "ClassLabel":
        return feature["names"]
    return _names_in(feature["feature"]) if "feature" in feature else None


def named(value: Any, names: Sequence[str]) -> Any:
    """The name of a class, of each in a list; None where it has none, as -1 has not."""
    if isinstance(value, list):
        return [named(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def fields_of(content: Any) -> str:
    """The names of an entry's fields, for messages."""
    names = [repr(name) for name in content][:SHOWN_FIELDS]
    return ", ".join(names) + (", ..." if len(content) > SHOWN_FIELDS else "") or "none"


def _text(path: Path, content: bytes) -> str:
    encoding = "utf-8-sig"
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):  # of spreadsheets, "Unicode text"
        encoding = "utf-16"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"annotations {path}: must be UTF-8, got byte 0x{error.object[error.start]:02x}"
            f" at offset {error.start}"
        ) from error
    if "\0" in text[:4096]:
        raise ValueError(f"annotations {path}: must be {FORMS} in UTF-8, but holds NUL bytes")
    return text


def _json(path: Path, text: str, fields: Sequence[str], texts: Sequence[str]) -> list[Row]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        rows = _json_lines(text)
        if rows is not None:
            return rows
        raise ValueError(
            f"annotations {path}: must be JSON, but line {error.lineno}, column {error.colno}:"
            f" {error.msg}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"annotations {path}: nested too deeply to be annotations") from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"annotations {path}: must be JSON, but {error}") from error
    if isinstance(content, list):
        return [Row(f"entry {number}", item) for number, item in enumerate(content)]
    if isinstance(content, dict):
        if isinstance(content.get("sentences"), list) and isinstance(content.get("videos"), list):
            return _sentences(path, content)
        media = ({"video", "image", *fields} - {"video_id", "image_id"}) & set(content)
        name = next((name for name in texts if name in content), None)
        if name is not None and len(media) == 1:
            if isinstance(content[media.pop()], list) and isinstance(content[name], list):
                raise ValueError(
                    f"annotations {path}: must be a list of rows, got an object of columns"
                )
            return [Row("line 1", content)]  # JSON lines, of one line
        found = f"dict with the fields {fields_of(content)}"
    else:
        found = type(content).__name__
    raise ValueError(f"annotations {path}: must be a JSON list of objects, got {found}")


def _json_lines(text: str) -> list[Row] | None:
    """The rows if the first line is JSON by itself; others that are not have a problem."""
    rows = []
    # Not splitlines(), which also ends lines at characters that JSON allows inside of texts.
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            rows.append(Row(place, json.loads(line)))
        except (ValueError, RecursionError) as error:
            if not rows:
                return None
            rows.append(Row(place, None, f"must be JSON, but {str(error).split(':')[0]}"))
    return rows if len(rows) > 1 else None


def _sentences(path: Path, content: dict[str, Any]) -> list[Row]:
    """MSR-VTT's form: sentences that name their videos."""
    splits = Counter(
        str(video["split"])
        for video in content["videos"]
        if isinstance(video, dict) and "split" in video
    )
    if len(splits) > 1:
        parts = ", ".join(f"{name} {count}" for name, count in splits.items())
        log.warning("%s: holds several splits, and all of them are read: %s", path, parts)
    return [Row(f"sentence {number}", item) for number, item in enumerate(content["sentences"])]


def _delimiter(text: str, wanted: Sequence[str]) -> str | None:
    """What separates the fields of the first line, if a wanted one is among them."""
    first = re.split(r"\r\n|\n|\r", text.lstrip("\r\n "), maxsplit=1)[0]
    for delimiter in DELIMITERS:
        if set(_header(next(csv.reader([first], delimiter=delimiter), []))) & set(_header(wanted)):
            return delimiter
    return None


def _header(names: Sequence[str]) -> list[str]:
    return [name.strip().lower() for name in names]


def _csv(path: Path, text: str, delimiter: str) -> list[Row]:
    try:
        return _separated(text, delimiter, strict=True)
    except csv.Error as error:
        if delimiter == "\t":  # often written without any quoting
            return _separated(text, delimiter, quoting=csv.QUOTE_NONE)
        raise ValueError(f"annotations {path}: {error} (is a quote left open?)") from error


def _separated(text: str, delimiter: str, **dialect: Any) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **dialect)
    names: list[str] = []
    rows: list[Row] = []
    line = 1
    try:
        for values in reader:
            place, line = f"line {line}", reader.line_num + 1
            if not any(values):
                continue
            if not names:
                names = _header(values)
            elif len(values) == len(names):
                rows.append(Row(place, dict(zip(names, values, strict=True))))
            else:
                problem = (
                    f"has {len(values)} fields where the first line has {len(names)}"
                    f" (a text that holds {delimiter!r} stands in quotes)"
                )
                rows.append(Row(place, None, problem))
    except csv.Error as error:
        raise csv.Error(f"line {line}: {error}") from error
    return rows


def _parquet(path: Path, content: bytes) -> list[Row]:
    with needs("pyarrow", f"annotations {path}: is parquet"):
        import pyarrow
        import pyarrow.parquet
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
        items = table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"annotations {path}: cannot be read as parquet: {reason}") from error
    for column, names in class_names(table.schema).items():
        for item in items:
            item[column] = named(item[column], names)
    return [Row(f"row {number}", item) for number, item in enumerate(items)]

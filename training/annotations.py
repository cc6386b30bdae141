"""Annotation files: JSON lists of {"video" or "image": path, "caption": text or texts}."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from svitt_ops.training.text import clean_caption

Kind = Literal["video", "image"]
Captions = Literal["each", "join"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one entry of an annotation file says."""

    media: tuple[str, ...]
    """Files, joined with the root. Several where a caption describes several videos (SSv2)."""
    captions: tuple[str, ...]
    """Clean texts, none of them empty."""
    kind: Kind
    together: str | None = None
    """Entries that share this value are to share a training batch."""


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """The usable entries of a file, and why the others are not."""

    entries: tuple[Entry, ...]
    problems: tuple[str, ...]


def read_annotations(
    path: str | Path,
    *,
    root: str | Path | None = None,
    kind: Kind = "video",
    captions: Captions = "each",
    keep_together: str | None = None,
    max_words: int | None = None,
) -> Annotations:
    """Read an annotation file.

    An entry that lacks a field, has one of a wrong type, or an empty caption is left out and
    described in `problems`; a file that cannot be read as JSON, or has no usable entry, raises.

    Args:
        path: JSON in UTF-8: a list of objects with `caption` and `video` or `image`. Either key is
            accepted for either kind, because published files do not agree.
        root: the folder that the media paths are relative to; default: the file's own.
        kind: what the files are.
        captions: "each" keeps a list of captions as several texts; "join" makes one paragraph of
            it (DiDeMo, ActivityNet Captions).
        keep_together: the field whose value says which entries share a batch.
        max_words: where captions are cut.

    Raises:
        ValueError: the file is missing, is not UTF-8, is not a JSON list, or has no usable entry.
    """
    for name, value, known in (("kind", kind, Kind), ("captions", captions, Captions)):
        if value not in get_args(known):
            raise ValueError(f"{name}: must be one of {get_args(known)}, got {value!r}")
    path = Path(path)
    base = path.parent if root is None else Path(root)
    entries: list[Entry] = []
    problems: list[str] = []
    for number, item in enumerate(_read_list(path)):
        try:
            entries.append(_entry(item, base, kind, captions, keep_together, max_words))
        except ValueError as error:
            problems.append(f"{path}: entry {number}: {error}")
    if not entries:
        detail = f"; the first: {problems[0]}" if problems else ""
        raise ValueError(f"annotations {path}: no usable entry among {len(problems)}{detail}")
    return Annotations(entries=tuple(entries), problems=tuple(problems))


def _read_list(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"annotations {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"annotations {path}: must be UTF-8, got byte 0x{error.object[error.start]:02x}"
            f" at offset {error.start}"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"annotations {path}: must be JSON, but line {error.lineno}, column {error.colno}:"
            f" {error.msg}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"annotations {path}: nested too deeply to be annotations") from error
    if not isinstance(content, list):
        raise ValueError(
            f"annotations {path}: must be a JSON list of objects, got {type(content).__name__}"
        )
    return content


def _entry(
    item: Any,
    base: Path,
    kind: Kind,
    captions: Captions,
    keep_together: str | None,
    max_words: int | None,
) -> Entry:
    if not isinstance(item, dict):
        raise ValueError(f"must be an object, got {type(item).__name__}")
    other = "image" if kind == "video" else "video"
    field = kind if kind in item else other
    if field not in item:
        raise ValueError(f"has no field {kind!r}")
    media = tuple(str(base / name) for name in _texts(item, field))
    texts = list(_texts(item, "caption"))
    if captions == "join":
        texts = [" ".join(texts)]
    cleaned = tuple(filter(None, (clean_caption(text, max_words) for text in texts)))
    if not cleaned:
        raise ValueError("field 'caption' has no words")
    together = None
    if keep_together is not None:
        if keep_together not in item:
            raise ValueError(f"has no field {keep_together!r}")
        together = str(item[keep_together])
    return Entry(media=media, captions=cleaned, kind=kind, together=together)


def _texts(item: dict[str, Any], field: str) -> Iterator[str]:
    """The value of a field that holds a text or a list of texts."""
    if field not in item:
        raise ValueError(f"has no field {field!r}")
    value = item[field]
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"field {field!r} is an empty list")
    for text in values:
        if not isinstance(text, str):
            raise ValueError(f"field {field!r} must be text, got {type(text).__name__}")
        if not text and field != "caption":
            raise ValueError(f"field {field!r} is empty")
        yield text

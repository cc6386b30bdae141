"""Annotations: lists of {"video" or "image": path, "caption": text or texts}, however kept."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

from svitt_ops.training.data.files import FILMS, PICTURES
from svitt_ops.training.data.paths import expand
from svitt_ops.training.data.places import Place, place
from svitt_ops.training.data.sources import find_source
from svitt_ops.training.data.tables import Row, fields_of
from svitt_ops.training.data.text import clean_caption

log = logging.getLogger(__name__)
Kind = Literal["video", "image"]
Captions = Literal["each", "join"]
CAPTION = ("caption", "sentence")
"""Fields of a text: ours, and that of MSR-VTT's tables."""
SUFFIXES = (*FILMS, *PICTURES, ".npy")
"""Of the files that a video's or image's id is looked for as, the first before the others."""


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


Example = TypeVar("Example", bound=Entry, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Annotations(Generic[Example]):
    """The usable entries of a file, and why the others are not."""

    entries: tuple[Example, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Form(Generic[Example]):
    """What the entries of a file hold besides their media."""

    texts: tuple[str, ...]
    """Fields of which every entry has one."""
    parse: Callable[[Record], Example]
    """What a record says; a ValueError where it cannot be used."""
    media: tuple[str, ...] = ()
    """Fields of files, where they are others than those of a video or of an image."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One object of a file, asked field by field; a ValueError says what is wrong with one."""

    content: dict[str, Any]
    place: str
    """Where it stands: the file, and which entry or line of it."""
    kind: Kind
    files: _Files
    join: bool
    """Lists of captions are paragraphs."""
    keep_together: str | None
    max_words: int | None
    fps: float | None = None
    """Of folders of frames, if it has none."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Nulls beside texts in a list, by the field, of all records that share this."""

    @property
    def media(self) -> tuple[str, ...]:
        """The paths of its files."""
        field = self.field(*_media_fields(self.kind))
        return self.paths(self.texts(field), field)

    def paths(self, names: Iterable[str], field: str) -> tuple[str, ...]:
        """The paths of files that a field names."""
        return tuple(self._timed(self.files.find(name, field)) for name in names)

    def _timed(self, path: str) -> str:
        """With the rate of a folder of frames, where one is given."""
        given = self.content.get("fps", self.fps)
        if given is None or not os.path.isdir(path):
            return path
        try:
            fps = float(given)
        except (TypeError, ValueError):
            fps = math.nan
        if not 0 < fps < math.inf:
            raise ValueError(f"field 'fps' must be a positive number, got {given!r:.80}")
        return str(place(path, "frames", fps))

    @property
    def captions(self) -> tuple[str, ...]:
        """Its texts, clean; those without words are left out, but for the last."""
        field = self.field(*CAPTION)
        texts = self.several(field)
        return self.clean([" ".join(texts)] if self.join else texts, field)

    def several(self, field: str) -> list[str]:
        """Whole texts of a field; nulls beside them in a list are passed over and counted."""
        value = self.content[field]
        if isinstance(value, list) and (there := [text for text in value if not _is_null(text)]):
            self.passed_over[field] += len(value) - len(there)
            value = there
        listed = replace(self, content={field: value})
        return [self.whole(text, field) for text in listed.texts(field)]

    @property
    def together(self) -> str | None:
        """What it shares with others of its batch."""
        name = self.keep_together
        return None if name is None else str(self.content[self.field(name)])

    def field(self, *names: str) -> str:
        """The first of the fields that it has."""
        for name in names:
            if name in self.content:
                return name
        raise ValueError(f"has no field {names[0]!r}; has {fields_of(self.content)}")

    def texts(self, field: str) -> Iterator[str]:
        """The value of a field that holds a text or a list of texts."""
        value = self.content[field]
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ValueError(f"field {field!r} is an empty list")
        for text in values:
            if field.endswith("_id") and isinstance(text, int) and not isinstance(text, bool):
                text = str(text)
            if not isinstance(text, str):
                missing = _is_null(text) and text is not None
                raise ValueError(
                    f"field {field!r} must be text, got {'NaN' if missing else type(text).__name__}"
                )
            if not text and field not in CAPTION:
                raise ValueError(f"field {field!r} is empty")
            yield text

    def value(self, field: str) -> Any:
        """The value of a field; a list that is written as JSON, as in a table, is one."""
        value = self.content[field]
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except ValueError:
                raise ValueError(f"field {field!r} must be a list, got {value[:40]!r}") from None
        return value

    def options(self, field: str) -> list[str]:
        """A list of whole texts; in a table without lists, it is written as JSON."""
        listed = replace(self, content={field: self.value(field)})
        return [self.whole(text, field) for text in listed.texts(field)]

    def label(self, *classes: str) -> int:
        """The number of the class that the field `label` names, in capitals or not."""
        field = self.field("label", "gold_label")
        value = self.content[field]
        names = [name.lower() for name in classes]
        name = value.strip().lower() if isinstance(value, str) else str(value).lower()
        if name not in names:
            raise ValueError(
                f"field {field!r} must be one of {', '.join(classes)}, got {value!r:.80}"
            )
        return names.index(name)

    def clean(self, texts: Sequence[str], field: str) -> tuple[str, ...]:
        """Clean texts that have words, one at least."""
        cleaned = tuple(filter(None, (clean_caption(text, self.max_words) for text in texts)))
        if not cleaned:
            raise ValueError(f"field {field!r} has no words")
        return cleaned

    @staticmethod
    def whole(text: str, field: str) -> str:
        """A text that can be encoded: half a character, as of a text cut in UTF-16, cannot."""
        wrong = re.search(r"[\0\ud800-\udfff]", text)
        if wrong and not isinstance(text, Place):
            what = "a NUL" if wrong[0] == "\0" else f"half a character, U+{ord(wrong[0]):04X},"
            raise ValueError(f"field {field!r} has {what} at position {wrong.start()}")
        return text


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _captioned(record: Record) -> Entry:
    return Entry(
        media=record.media,
        captions=record.captions,
        kind=record.kind,
        together=record.together,
    )


CAPTIONED = Form(texts=CAPTION, parse=_captioned)


def read_annotations(
    path: str | Path,
    *,
    root: str | Path | None = None,
    kind: Kind = "video",
    captions: Captions = "each",
    keep_together: str | None = None,
    max_words: int | None = None,
    form: Form[Example] = CAPTIONED,  # type: ignore[assignment]  # where none is given
    columns: Mapping[str, str] | None = None,
    fps: float | None = None,
) -> Annotations[Example]:
    """Read an annotation file, webdataset shards or a Hugging Face dataset.

    An entry that lacks a field, has one of a wrong type, or an empty caption is left out and
    described in `problems`; a file that cannot be read, or has no usable entry, raises.

    Args:
        path: a JSON list, JSON lines, CSV, TSV or parquet, whatever its name: the content tells.
            Its entries have `caption` (or `sentence`) and `video` or `image` (or `video_id`,
            `image_id`). Either kind's field is accepted for either kind, because published files do
            not agree. MSR-VTT's JSON of `videos` and `sentences` is read as a list of sentences.
            Or what else `sources.find_source` finds.
        root: the folder that the media paths are relative to; default: the file's own. A name or
            an id without a suffix is that of the file with a known one, if there is one. A folder
            is a video, of numbered frames.
        kind: what the files are.
        captions: "each" keeps a list of captions as several texts; "join" makes one paragraph of
            it (DiDeMo, ActivityNet Captions).
        keep_together: the field whose value says which entries share a batch.
        max_words: where captions are cut.
        form: what the entries hold besides, if it is not captions.
        columns: names of fields, and what they are called there, such as {"video": "clip"}.
        fps: frames a second of folders of frames; an entry's own `fps` goes before.

    Raises:
        ValueError: the file is missing, is not UTF-8, is of no such form, or has no usable entry.
    """
    columns = columns or {}
    for name, value, known in (("kind", kind, Kind), ("captions", captions, Captions)):
        if value not in get_args(known):
            raise ValueError(f"{name}: must be one of {get_args(known)}, got {value!r}")
    source = find_source(path)
    file, own = source.name, source.files[0].parent if source.files else Path()
    files = _Files(own if root is None else expand(root, "root"))
    entries: list[Example] = []
    problems: list[str] = []
    passed_over: Counter[str] = Counter()

    def parse(row: Row) -> Example:
        if row.problem:
            raise ValueError(row.problem)
        if not isinstance(row.content, dict):
            raise ValueError(f"must be an object, got {type(row.content).__name__}")
        record = Record(
            content=_renamed(row.content, columns),
            place=f"{file}: {row.place}",
            kind=kind,
            files=files,
            join=captions == "join",
            keep_together=keep_together,
            max_words=max_words,
            fps=fps,
            passed_over=passed_over,
        )
        return form.parse(record)

    for row in source.rows(form.media or _media_fields(kind), form.texts, columns):
        try:
            entries.append(parse(row))
        except ValueError as error:
            problems.append(f"{file}: {row.place}: {error}")
    if not entries:
        detail = f"; the first: {problems[0]}" if problems else ""
        raise ValueError(f"annotations {file}: no usable entry among {len(problems)}{detail}")
    for name, count in (+passed_over).items():
        log.warning("annotations %s: passed over %d null in lists of field %r", file, count, name)
    return Annotations(entries=tuple(entries), problems=tuple(problems))


def _renamed(content: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """With the fields that `columns` has, besides; those of a CSV are in small letters."""
    found = dict(content)
    for ours, theirs in columns.items():
        name = theirs if theirs in content else theirs.lower()
        if name not in content:
            raise ValueError(f"has no field {theirs!r}; has {fields_of(content)}")
        found[ours] = content[name]
    return found


def _media_fields(kind: Kind) -> tuple[str, ...]:
    other: Kind = "image" if kind == "video" else "video"
    return kind, other, f"{kind}_id", f"{other}_id"


class _Files:
    """The files below a folder, by the names that annotations have for them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._stems: dict[Path, dict[str, str]] = {}

    def find(self, name: str, field: str) -> str:
        """The path of a name; without a suffix, that of the file with a known one."""
        if isinstance(name, Place):
            return str(name)
        try:
            path = self.root / expand(name, f"field {field!r}")
        except ValueError as error:
            raise ValueError(f"{error}, which can name no file") from None
        if path.suffix.lower() in SUFFIXES:
            return str(path)
        stems = self._stems.get(path.parent)
        if stems is None:
            stems = self._stems[path.parent] = _stems(path.parent)
        return str(path.parent / stems.get(path.name, path.name))


def _stems(folder: Path) -> dict[str, str]:
    """The files of a folder by their names without a known suffix, and by their whole names."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # the files are missing, which is said when they are read
        return {}
    order = {suffix: number for number, suffix in enumerate(SUFFIXES)}
    known = [name for name in names if os.path.splitext(name)[1].lower() in order]
    known.sort(key=lambda name: order[os.path.splitext(name)[1].lower()], reverse=True)
    return {os.path.splitext(name)[0]: name for name in known} | {name: name for name in names}

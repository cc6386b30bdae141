"""Which files, or texts, folders, patterns and annotation files stand for."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from svitt_ops.training.data.annotations import SUFFIXES, Kind, read_annotations
from svitt_ops.training.data.columns import FileNames
from svitt_ops.training.data.files import FILMS, UnusableVideoError
from svitt_ops.training.data.frame_folders import number_frames
from svitt_ops.training.data.paths import expand, input_file, input_folder
from svitt_ops.training.data.places import parse
from svitt_ops.training.data.sources import SHARD
from svitt_ops.training.data.text import clean_caption

log = logging.getLogger(__name__)
ANNOTATIONS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
"""Of files that are lists of others."""
MEDIA = tuple(suffix for suffix in SUFFIXES if suffix != ".npy")


def list_media(
    sources: Sequence[str | Path], kind: Kind, *, root: str | Path | None = None
) -> list[str]:
    """Files in order, each once, however it is spelled.

    Args:
        sources: files; folders, of which all pictures and videos below are meant; patterns such as
            ``clips/*.mp4``; or annotation files, of which the media are meant. Where videos are
            meant, a folder of two numbered frames or more, and of no film, is one.
        kind: what the files are.
        root: of annotation files, the folder that their paths are relative to.

    Raises:
        ValueError: a source is not there, or none has a file.
    """
    found: dict[str, str] = {}
    name_of = FileNames()
    for source in sources:
        for path in _media_of(source, kind, root):
            found.setdefault(name_of(path), path)
    if not found:
        raise ValueError(f"--{kind}s: must name a file at least, got none in {_quoted(sources)}")
    return list(found.values())


def _media_of(source: str | Path, kind: Kind, root: str | Path | None) -> Iterable[str]:
    option = f"--{kind}s"
    path = expand(source, option)
    if path.is_dir():
        return _below(input_folder(path, option), kind)
    if not path.exists() and glob.has_magic(str(path)):
        found: list[str] = []
        for match in sorted(glob.glob(str(path), recursive=True)):
            if not os.path.isdir(match):
                found += _in_file(match, kind, root)
            elif _is_video(match, os.listdir(match), kind):
                found.append(match)
        return found
    return _in_file(path, kind, root)


def _in_file(source: str | Path, kind: Kind, root: str | Path | None) -> list[str]:
    """A file, or those that it is a list of."""
    option = f"--{kind}s"
    path = input_file(source, option)
    if path.suffix.lower() not in (*ANNOTATIONS, SHARD):
        return [str(path)]
    read = read_annotations(path, root=root, kind=kind)
    for problem in read.problems:
        log.warning("left out: %s", problem)
    places = [parse(media) for entry in read.entries for media in entry.media]
    if any(form in ("member", "row") for _, form, _ in places):
        raise ValueError(f"{option}: must name files, got {path}, which holds {kind}s itself")
    return [file for file, _, _ in places]


def _is_video(folder: str, names: Sequence[str], kind: Kind) -> bool:
    """Whether a folder, in which these lie, is a video by its frames."""
    if kind == "image" or any(os.path.splitext(name)[1].lower() in FILMS for name in names):
        return False
    try:
        return len(number_frames(names)) > 1
    except UnusableVideoError as error:
        log.warning("%s: is taken for pictures, not for a video: %s", folder, error)
        return False


def _below(folder: Path, kind: Kind) -> Iterable[str]:
    """The pictures and videos in a folder and its folders, in order of their names."""
    others: Counter[str] = Counter()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if _is_video(place, names, kind):
            yield place
            continue
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in MEDIA:
                yield os.path.join(place, name)
            else:
                others[suffix or name] += 1
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        log.warning("%s: passed over what is no picture or video by its name: %s", folder, kinds)


def list_texts(
    sources: Sequence[str], *, root: str | Path | None = None, max_words: int | None = None
) -> list[str]:
    """Clean texts in order, each once.

    Args:
        sources: texts; files ending in .txt with a text a line; or annotation files, of which the
            captions are meant.
        root: as of `list_media`.
        max_words: where texts are cut.

    Raises:
        ValueError: a file is not there, or nothing has words.
    """
    found: list[str] = []
    for source in sources:
        suffix = Path(source).suffix.lower()
        if suffix == ".txt":
            lines = input_file(source, "--texts").read_text(encoding="utf-8").splitlines()
        elif suffix in ANNOTATIONS:
            entries = read_annotations(input_file(source, "--texts"), root=root).entries
            lines = [caption for entry in entries for caption in entry.captions]
        elif suffix == SHARD:
            raise ValueError(f"--texts: must be texts or lists of them, got {source!r}")
        else:
            lines = [source]
        found += [clean_caption(line, max_words) for line in lines]
    texts = [text for text in dict.fromkeys(found) if text]
    if not texts:
        raise ValueError(f"--texts: must have words, got {_quoted(sources)}")
    return texts


def _quoted(sources: Sequence[object]) -> str:
    return ", ".join(repr(str(source)) for source in sources[:3])

"""What a recipe's `annotations` may name: a file, webdataset shards, or a Hugging Face dataset."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from svitt_ops.training.data.paths import expand, in_folder, input_file, input_folder, matching
from svitt_ops.training.data.rows import HUB, SAVED, SEVERAL, TABLE, holds_media, read_dataset
from svitt_ops.training.data.shards import read_shards
from svitt_ops.training.data.tables import Row, needs, read_rows

SHARD = ".tar"
TAR, PARQUET = b"ustar", b"PAR1"
SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")  # as the Hub exports them
AT = 257  # where an archive says that it is one
LOOKED_AT, SHOWN = 10_000, 3  # files below a folder that has none, and folders in a message


@dataclass(frozen=True, kw_only=True)
class Source:
    """Something that has rows."""

    name: str
    kind: Literal["file", "shards", "dataset"]
    files: tuple[Path, ...]
    """None of them of a dataset that the library finds."""

    def rows(
        self, media: Sequence[str], texts: Sequence[str], columns: Mapping[str, str]
    ) -> Iterable[Row]:
        """Its rows; `media` and `texts` as of `read_rows`, `columns` as of `read_dataset`."""
        if self.kind == "shards":
            return read_shards(self.files)
        if self.kind == "dataset":
            return read_dataset(self.name, media, columns)
        given = [[columns.get(field, field) for field in fields] for fields in (media, texts)]
        return read_rows(self.files[0], *given)


def find_source(path: str | Path, name: str = "annotations") -> Source:
    """What a path stands for; a ValueError begins with `name` where that is nothing to read.

    Args:
        path: a file of annotations, see `read_annotations`; a tar archive, a folder of them, or a
            pattern such as ``shards/{00000..00099}.tar`` or ``shards/*.tar``; ``hf://user/data``
            and what `rows.open_dataset` takes besides.
        name: of the key or option.
    """
    if isinstance(path, str) and path.startswith(HUB):
        return _dataset(path, ())
    file = expand(path, name)
    if file.is_dir():
        return _in_folder(input_folder(file, name), name)
    if not file.exists() and (glob.has_magic(str(file)) or "{" in str(file)):
        return _of_pattern(str(file), name)
    file = input_file(path, name)
    start = b""
    if file.is_file():  # a pipe can be read once
        with file.open("rb") as stream:
            start = stream.read(512)
    if file.suffix.lower() == SHARD or (start[AT:].startswith(TAR) and b"\0" in start):
        return _shards(str(file), [file])
    if start.startswith(PARQUET) and holds_media(file):
        return _dataset(str(file), [file])
    return Source(name=str(file), kind="file", files=(file,))


def _in_folder(folder: Path, name: str) -> Source:
    if (folder / SEVERAL).exists():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{SAVED}")))
        raise ValueError(f"{name}: must be one split, {folder} has {splits}: {folder}/NAME")
    if (folder / SAVED).exists():
        return _dataset(str(folder), sorted(folder.glob("*.arrow")))
    if packed := sorted(x.name for x in folder.iterdir() if x.name.endswith((".tar.gz", ".tgz"))):
        raise ValueError(f"{name}: archives must not be compressed, {folder} has {packed[0]}")
    parts = sorted({match[1] for match in map(SPLIT.fullmatch, os.listdir(folder)) if match})
    if len(parts) > 1:
        raise ValueError(
            f"{name}: must be one split, {folder} has {', '.join(parts)}: '{folder}/NAME-*{TABLE}'"
        )
    for suffix, source in BY_SUFFIX:
        if found := in_folder(folder, suffix):
            return source(str(folder), [input_file(path, name) for path in found])
    raise ValueError(
        f"{name}: must be a file, or a folder with {SHARD} shards, {TABLE} files or a dataset of"
        f" save_to_disk, got {str(folder)!r}{_below(folder)}"
    )


def _below(folder: Path) -> str:
    """Which folders to name instead, for a message: those of a clone from the Hub, say."""
    some = itertools.islice(folder.glob("*/*"), LOOKED_AT)
    known = {suffix for suffix, _ in BY_SUFFIX}
    found = {x.parent for x in some if x.suffix.lower() in known or x.name in (SAVED, SEVERAL)}
    return f": name {' or '.join(map(str, sorted(found)[:SHOWN]))}, which has them" if found else ""


def _of_pattern(pattern: str, name: str) -> Source:
    with needs("braceexpand", f"{name}: {pattern} has braces"):
        try:
            found = matching(pattern)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    files = [input_file(path, name) for path in found]
    if not files:
        raise ValueError(f"{name}: must match a file at least, got {pattern!r}")
    for suffix, source in BY_SUFFIX:
        if all(file.suffix.lower() == suffix for file in files):
            return source(pattern, files)
    known = " or ".join(suffix for suffix, _ in BY_SUFFIX)
    raise ValueError(
        f"{name}: must match {known} files alone, got {', '.join(map(str, files[:2]))}"
    )


def _shards(name: str, files: Sequence[Path]) -> Source:
    with needs("webdataset", f"annotations {name}: is webdataset shards"):
        import webdataset  # noqa: F401
    return Source(name=name, kind="shards", files=tuple(files))


def _dataset(name: str, files: Sequence[Path]) -> Source:
    with needs("datasets", f"annotations {name}: is a Hugging Face dataset"):
        import datasets  # noqa: F401
    return Source(name=name, kind="dataset", files=tuple(files))


BY_SUFFIX = ((SHARD, _shards), (TABLE, _dataset))

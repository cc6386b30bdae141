"""Webdataset shards: tar archives whose members of one name, but for the suffix, are a sample.

Each archive is gone through once, header by header, for where its members lie. Then any sample is
read at any time, as any file is: shuffled over all shards, by any number of processes, from any
step on.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from svitt_ops.training.data.files import FILMS, PICTURES
from svitt_ops.training.data.places import Place, place
from svitt_ops.training.data.tables import Row, needs

META = re.compile(r"__[^/]*__($|/)")  # what webdataset passes over
MEDIA = ("video", "image", "images", "video_id", "image_id")
"""Fields that the archive says, whatever the sample's JSON does."""
LONGEST = 2**24  # bytes of a text


def read_shards(shards: Sequence[Path]) -> Iterator[Row]:
    """The samples of some archives, with the fields of the JSON and one for each other member.

    These are called as their suffixes are. Of `video` and `image` there is one each where one
    member has such a suffix; of several pictures there are `images`; and `caption` is the text of
    the member ``txt``, where there is one.

    Raises:
        ValueError: an archive cannot be read to its end.
    """
    for shard in shards:
        with needs("webdataset", f"annotations {shard}: is a webdataset shard"):
            from webdataset.tariterators import group_by_keys
        double: list[str] = []

        def note(error: Exception, double: list[str] = double) -> bool:
            double.append(str(error.args[0]).split(":")[0])
            return True

        with shard.open("rb") as stream:
            keys = set()
            for sample in group_by_keys(_members(shard, stream), handler=note):
                key = sample["__key__"]
                where = f"{shard.name}: sample {key}"
                if key in keys or double:
                    what = f"has {double[0]!r} twice" if double else "is there twice"
                    yield Row(where, None, what)
                else:
                    yield _sample(where, shard, stream, sample)
                keys.add(key)
                double.clear()


def _members(shard: Path, stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """Names of the files in an archive, as webdataset has them, and where their bytes are."""
    try:
        archive: Any = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115  # closes nothing
        while (member := archive.next()) is not None:
            archive.members = []  # or it keeps them all
            hidden = os.path.basename(member.name).startswith(".")  # as macOS adds them
            if member.isreg() and not hidden and not META.match(member.name):
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is sparse: pack it without holes")
                span = (member.offset_data, member.size)
                yield {"fname": member.name, "data": span, "__url__": str(shard)}
        end = archive.offset
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(
            f"annotations {shard}: cannot be read as a tar archive: {error}"
        ) from error
    if os.pread(stream.fileno(), 512, end) != bytes(512):
        raise ValueError(f"annotations {shard}: is cut off or damaged at byte {end}")
    while rest := os.pread(stream.fileno(), 2**20, end):
        if any(rest):
            raise ValueError(f"annotations {shard}: holds more after its end at byte {end}")
        end += len(rest)


def _sample(where: str, shard: Path, stream: BinaryIO, sample: dict[str, Any]) -> Row:
    fields: dict[str, Any] = {}
    films: list[Place] = []
    pictures: list[Place] = []
    said: Any = {}
    for suffix, (start, size) in sorted((k, v) for k, v in sample.items() if isinstance(v, tuple)):
        last = f".{suffix.rpartition('.')[2]}"
        if last in (*FILMS, *PICTURES, ".npy"):
            member = place(shard, "member", f"{sample['__key__']}.{suffix}", start, size)
            fields[suffix] = member
            (pictures if last in PICTURES else films).append(member)
        elif last in (".txt", ".json"):
            if size > LONGEST:
                return Row(where, None, f"its {suffix} has {size} bytes")
            try:
                text = os.pread(stream.fileno(), size, start).decode("utf-8-sig")
                fields[suffix] = json.loads(text) if last == ".json" else text
            except (ValueError, RecursionError) as error:
                return Row(where, None, f"its {suffix} cannot be read: {error}")
    if "json" in fields:
        said = fields.pop("json")
        if not isinstance(said, dict):
            return Row(where, None, f"its json must be an object, got {type(said).__name__}")
    if "txt" in fields:
        fields["caption"] = fields["txt"]
    if len(films) == 1:
        fields["video"] = films[0]
    if len(pictures) == 1:
        fields["image"] = pictures[0]
    elif pictures:
        fields["images"] = pictures
    return Row(where, {**{k: v for k, v in said.items() if k not in MEDIA}, **fields})

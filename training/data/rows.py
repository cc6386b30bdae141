"""Hugging Face datasets: their rows, and the media that lie in them.

They are opened map-style, from the disk: any row is read at any time, so that order, workers and
a resumed run are those of files. The library decodes nothing: media are read as all others are.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from svitt_ops.training.data.files import UnusableVideoError
from svitt_ops.training.data.paths import in_folder, matching
from svitt_ops.training.data.places import place
from svitt_ops.training.data.tables import Row, class_names, named, needs

HUB = "hf://"
KEYWORDS = ("name", "split", "revision")
"""Of `datasets.load_dataset`, as in hf://user/data?split=train."""
TABLE = ".parquet"
AT_ONCE = 1000  # rows
SAVED, SEVERAL = "state.json", "dataset_dict.json"
"""Files that `save_to_disk` writes into the folder of a dataset, and of several splits."""


@lru_cache(maxsize=16)
def open_dataset(name: str) -> Any:
    """A `datasets.Dataset`.

    Args:
        name: ``hf://user/data?split=train``; a folder that `save_to_disk` has written; or a
            folder or a pattern of parquet files.

    Raises:
        ValueError: there is none, or it has no rows.
    """
    with needs("datasets", f"annotations {name}: is a Hugging Face dataset"):
        import datasets
    try:
        if name.startswith(HUB):
            repository, _, query = name.removeprefix(HUB).partition("?")
            if not repository:
                raise ValueError("must name a dataset")
            given = dict(parse_qsl(query, keep_blank_values=True))
            if unknown := sorted(given.keys() - set(KEYWORDS)):
                raise ValueError(f"takes {', '.join(KEYWORDS)}, got {unknown[0]}")
            found = datasets.load_dataset(repository, **{"split": "train", **given})
        elif os.path.exists(os.path.join(name, SAVED)):
            held = json.loads(Path(name, SAVED).read_text(encoding="utf-8"))["_data_files"]
            found = datasets.load_from_disk(name) if held else ()
        else:
            files = in_folder(name, TABLE) if os.path.isdir(name) else matching(name)
            found = datasets.load_dataset(
                "parquet", data_files=[glob.escape(file) for file in files], split="train"
            )
    except Exception as error:  # of many packages
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if reason.endswith("corresponds to no data!"):
            raise ValueError(f"annotations {name}: has no rows") from error
        raise ValueError(f"annotations {name}: cannot be opened as a dataset: {reason}") from error
    if not len(found):
        raise ValueError(f"annotations {name}: has no rows")
    return found


def read_dataset(name: str, fields: Sequence[str], columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a dataset: media that lie in it are named, and not read; classes are their names.

    Args:
        name: as of `open_dataset`.
        fields: of media, the first that is there before the others.
        columns: our names of fields, and the columns that have them.

    Raises:
        ValueError: as of `open_dataset`, there is no such column, or media cannot be in it.
    """
    dataset = open_dataset(name)
    for column in columns.values():
        if column not in dataset.column_names:
            known = ", ".join(map(repr, dataset.column_names))
            raise ValueError(f"annotations {name}: has no column {column!r}; has {known}")
    schema = dataset.with_format("arrow")[:1].schema
    _check_media(name, schema, [columns.get(field, field) for field in fields])
    media = [field.name for field in schema if is_media(field.type)]
    classes = class_names(dataset.features.arrow_schema)
    number = 0
    for table in dataset.with_format("arrow").iter(AT_ONCE):
        rows = table.drop_columns(media).to_pylist() if len(media) < len(schema) else None
        rows = rows or [{} for _ in range(len(table))]
        for column in media:
            for offset, cell in enumerate(_cells(name, column, table[column], number)):
                rows[offset][column] = cell
        for column, names in classes.items():
            for row in rows:
                row[column] = named(row[column], names)
        for row in rows:
            yield Row(f"row {number}", row)
            number += 1


def read_cell(name: str, column: str, row: int, item: int) -> tuple[bytes, str, str, int, int]:
    """The bytes of a place, and what identifies them.

    Raises:
        UnusableVideoError: there are none.
    """
    view = _column(name, column)
    value = view[row][column][0].as_py()
    value = value[item] if isinstance(value, list) else value
    content = value["bytes"] if isinstance(value, dict) else value
    if content is None:
        raise UnusableVideoError("has no bytes")
    return content, view._fingerprint, column, row, item


@lru_cache(maxsize=64)
def _column(name: str, column: str) -> Any:
    return open_dataset(name).select_columns([column]).with_format("arrow")


def is_media(kind: Any) -> bool:
    """Whether a type of Arrow is that of files in a column: bytes, or bytes and path; or lists."""
    from pyarrow import types

    kind = kind.value_type if _is_list(kind) else kind
    if types.is_struct(kind):
        return {"bytes", "path"} <= {field.name for field in kind}
    return types.is_binary(kind) or types.is_large_binary(kind)


def _check_media(name: str, schema: Any, columns: Sequence[str]) -> None:
    """Refuse once, and not row by row, what has neither bytes nor paths."""
    from pyarrow import types

    column = next((column for column in columns if column in schema.names), None)
    if column is None:
        return
    kind = schema.field(column).type
    if not is_media(kind) and types.is_nested(kind.value_type if _is_list(kind) else kind):
        raise ValueError(
            f"annotations {name}: column {column!r} must hold media (bytes, or bytes and path) or"
            f" paths, one or a list, got {kind}"
        )


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def holds_media(file: Path) -> bool:
    """Whether a parquet file has media in its columns, and not their names."""
    with needs("pyarrow", f"annotations {file}: is parquet"):
        import pyarrow
        import pyarrow.parquet
    try:
        return any(is_media(field.type) for field in pyarrow.parquet.read_schema(file))
    except (pyarrow.ArrowException, OSError):  # said where it is read
        return False


def _cells(name: str, column: str, values: Any, first: int) -> Iterator[Any]:
    """Of each row the place of its bytes, of each of a list; or a path; or None."""
    from pyarrow import compute, types

    lengths: list[int | None] = [1] * len(values)
    several = _is_list(values.type)
    if several:
        lengths = compute.list_value_length(values).to_pylist()
        values = compute.list_flatten(values)
    paths = [None] * len(values)
    if types.is_struct(values.type):
        paths = compute.struct_field(values, "path").to_pylist()
        values = compute.struct_field(values, "bytes")
    each = zip(values.is_valid().to_pylist(), paths, strict=True)
    for row, length in enumerate(lengths, first):
        cells = [
            place(name, "row", column, row, item) if held else path
            for item, (held, path) in enumerate(itertools.islice(each, length or 0))
        ]
        yield (None if length is None else cells) if several else cells[0]

"""A corpus of pictures and a tokenizer for the tasks about them."""

import json
from pathlib import Path
from typing import Any

from svitt_ops.training.data.annotations import Annotations, Form, read_annotations


def read(folder: Path, content: Any, form: Form[Any], **options: Any) -> Annotations[Any]:
    """What a file of some content says."""
    path = folder / "annotations"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_annotations(path, form=form, **options)


def in_form(folder: Path, row: dict[str, Any], form: str) -> bytes:
    """A row as a file of some form; lists are JSON in the cells of a table."""
    import csv
    import io

    import pyarrow
    import pyarrow.parquet

    if form == "json":
        return json.dumps([row]).encode()
    if form == "json lines":
        return json.dumps(row).encode()
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "table")
        return (folder / "table").read_bytes()
    cells = {k: json.dumps(v) if isinstance(v, list) else str(v) for k, v in row.items()}
    table = io.StringIO()
    writer = csv.DictWriter(table, cells, delimiter="," if form == "csv" else "\t")
    writer.writeheader()
    writer.writerow(cells)
    return table.getvalue().encode()


FORMS = ("json", "json lines", "csv", "tsv", "parquet")

"""The one format of results: what `python -m bench` writes and `bench.report` reads.

    {"schema": 1, "op": "...", "command": "...", "complete": true, "environment": {}, "results": []}

`machine`, where a native probe could be built, holds what `native.ceilings` measured.
`complete` says that no case, provider or direction was left out, and that the run reached its end:
a run saves after every case. Each entry of `results` is one case in one direction, as
`harness.CaseRun.run` makes it; its `providers` are rows whose `status` is "ok" (gate passed, times
follow; the results of a peer may be off by several of our error budgets), "failed" (no times,
`reason` says at what) or "absent" (could not run, `reason` says why). Times are in milliseconds.
`gated_after` says which call was checked once more after timing,
`memory_method` of which the peak memory was read. A change of meaning raises `SCHEMA`.

An op may have several files of one machine, each with cases of its own: `join` puts them together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.measure import environment

Document = dict[str, Any]
SCHEMA = 1

_TOP = {
    "schema": int,
    "op": str,
    "command": str,
    "complete": bool,
    "environment": dict,
    "results": list,
}
_RESULT = {
    "case": str,
    "direction": str,
    "dtype": str,
    "device": str,
    "fields": dict,
    "facts": dict,
    "useful_flops": float,
    "bytes": float,
    "ceilings": dict,
    "floor_ms": float,
    "floor_bound": str,
    "setup_ms": dict,
    "providers": list,
}
_ROW = {
    "provider": str,
    "role": str,
    "same_function": bool,
    "note": str,
    "status": str,
    "reason": str,
    "gate": dict,
}
_TIMED = {
    "ms": float,
    "p20": float,
    "p80": float,
    "min": float,
    "samples": int,
    "method": str,
    "gflops": float,
    "gemm_ratio": float,
    "floor_ratio": float,
}


def inexactness(row: dict[str, Any]) -> float:
    """The largest error of a row's results, in terms of the budget that ours must keep."""
    return max(
        (x["error"] / x["budget"] for x in row["gate"].values() if x["error"] and x["budget"]),
        default=0.0,
    )


class SchemaError(ValueError):
    """A result that is not of this format."""


def save(path: Path, document: Document) -> None:
    """Write a result, once it is seen to be one."""
    validate(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")  # a reader, or a kill, never meets half a file
    part.write_text(json.dumps(_rounded(document), indent=1, allow_nan=False) + "\n")
    part.replace(path)


def load(path: Path) -> Document:
    """Read a result."""
    document = json.loads(path.read_text())
    try:
        validate(document)
    except SchemaError as error:
        raise SchemaError(f"{path.name}: {error}") from None
    return document


def load_all(folder: Path) -> list[Document]:
    """All results of a folder, joined; t4 before t16."""
    paths = sorted(folder.glob("*.json"), key=lambda path: _counted(path.stem))
    return join(load(path) for path in paths)


def join(documents: Iterable[Document]) -> list[Document]:
    """One document for each op on each machine; its `sources` are those that it was made of.

    Raises:
        SchemaError: where two have the same case and direction: one of them would be a choice.
    """
    joined: dict[tuple[str, str], Document] = {}
    for document in documents:
        key = (document["op"], environment.slug("", document["environment"]))
        before = joined.setdefault(key, document | {"results": [], "sources": []})
        known = {(x["case"], x["direction"]) for x in before["results"]}
        for result in document["results"]:
            if (result["case"], result["direction"]) in known:
                what = f"{document['op']} {result['case']} {result['direction']}"
                raise SchemaError(f"{what} stands in two files of one machine: delete one")
        before["results"] += document["results"]
        before["sources"].append(document)
    return list(joined.values())


def validate(document: Any) -> None:
    """Raise `SchemaError` unless the document is a result of this schema."""
    _check(document, _TOP, "document")
    if document["schema"] != SCHEMA:
        raise SchemaError(f"schema must be {SCHEMA}, got {document['schema']}")
    for result in document["results"]:
        _check(result, _RESULT, "result")
        where = f"{result['case']} {result['direction']}"
        for row in result["providers"]:
            _check(row, _ROW, where)
            here = f"{where} {row['provider']}"
            if row["status"] not in ("ok", "failed", "absent"):
                raise SchemaError(f"{here}: unknown status {row['status']!r}")
            if row["status"] == "ok":
                _check(row, _TIMED, here)
            elif any(key in row for key in _TIMED):
                raise SchemaError(f"{here}: has a time, but its status is {row['status']}")
            elif not row["reason"]:
                raise SchemaError(f"{here}: is {row['status']} without a reason")


def best_peer(result: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest peer that computes the same function; None where there is none."""
    rows = [
        row
        for row in result["providers"]
        if row["status"] == "ok" and row["role"] == "peer" and row["same_function"]
    ]
    return min(rows, key=lambda row: row["ms"], default=None)


def row_of(result: dict[str, Any], provider: str) -> dict[str, Any] | None:
    """The row of a provider, if it was asked."""
    return next((row for row in result["providers"] if row["provider"] == provider), None)


def timed(result: dict[str, Any], provider: str) -> dict[str, Any] | None:
    """The row of a provider, if it has a time."""
    row = row_of(result, provider)
    return row if row is not None and row["status"] == "ok" else None


def ours(result: dict[str, Any]) -> dict[str, Any] | None:
    """Our own row, if it has a time."""
    rows = (x for x in result["providers"] if x["role"] == "ours" and x["status"] == "ok")
    return next(rows, None)


def _counted(name: str) -> list[tuple[int, str]]:
    """A key by which numbers in names sort as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _check(value: Any, wanted: dict[str, type], where: str) -> None:
    if not isinstance(value, dict):
        raise SchemaError(f"{where}: must be an object, got {type(value).__name__}")
    for key, kind in wanted.items():
        if key not in value:
            raise SchemaError(f"{where}: lacks {key}")
        allowed = (int, float) if kind is float else kind
        if not isinstance(value[key], allowed):
            raise SchemaError(f"{where}: {key} must be {kind.__name__}, got {value[key]!r}")


def _rounded(value: Any) -> Any:
    """Five digits: more than any timing holds, and diffs stay readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value

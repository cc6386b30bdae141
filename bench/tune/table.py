"""From what was timed to a table that launchers use."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svitt_ops.kernels import tile_table

MARGIN = 0.02
"""Of the time: what is closer counts as the same."""


def write_whole(path: Path, text: str) -> None:
    """Never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def classes(rows: Sequence[Mapping[str, Any]]) -> dict[tile_table.Key, list[Mapping[str, Any]]]:
    """Rows by what a table looks up; those of a case that nobody could time are left out."""
    keys = {x["group"]: _key(x["entry"]) for x in rows if "entry" in x}
    found: dict[tile_table.Key, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["group"] in keys:
            found.setdefault(keys[row["group"]], []).append(row)
    return found


def entry(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The best tile of a class; None if that is today's.

    A tile is in if it was faster than today's beyond noise in one case of the class, slower in
    none, and neither refused nor failed in any. Of these the one whose times have the least
    geometric mean, each in units of today's, is the best. Where today's cannot run, as for want of
    shared memory, what can is faster; of one that crashed or hung nothing is known.
    """
    tried: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["tile"] and "status" in row:
            tried.setdefault(row["label"], []).append(row)
    best: tuple[float, Mapping[str, Any]] | None = None
    for given in tried.values():
        if any(x["status"] != "ok" for x in given):
            continue
        verdicts = {_verdict(x) for x in given}
        logs = [math.log(x["ms"] / (x["today"]["ms"] if x["today"] else 1)) for x in given]
        mean = sum(logs) / len(logs)
        first = given[0]
        if "faster" in verdicts and "slower" not in verdicts and (not best or mean < best[0]):
            best = mean, first
    if best is None:
        return None
    row = best[1]
    measured = {"case": f"{row['op']} {row['case']} {row['direction']}", "ms": row["ms"]}
    return row["entry"] | measured | {"today_ms": row["today"] and row["today"]["ms"]}


def _verdict(row: Mapping[str, Any]) -> str:
    today = row["today"]
    if today is None:
        return "faster" if row["today_fails"] else "alone"
    if row["p80"] < today["p20"] and row["ms"] < (1 - MARGIN) * today["ms"]:
        return "faster"
    slower = row["p20"] > today["p80"] and row["ms"] > (1 + MARGIN) * today["ms"]
    return "slower" if slower else "same"


def _key(found: Mapping[str, Any]) -> tile_table.Key:
    return tile_table.key(found["table"], found["pass"], found["dtype"], found["shape"])


def kept(path: Path, arch: int, where: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a file that there may be, if it is of the same architecture and `where`."""
    try:
        tile_table.read(path, arch)
        old = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    same = all(old[name] == value for name, value in where.items())
    return list(old["entries"]) if same else []


def document(
    rows: Sequence[Mapping[str, Any]],
    arch: int,
    where: Mapping[str, Any],
    old: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The table of what was timed.

    Args:
        rows: see `bench.tune.parent.run`.
        arch: the architecture.
        where: "device" and "versions".
        old: entries that stay where their class was not tried, or not to the end without a better.
    """
    entries = {_key(x): x for x in old}
    for key, found in classes(rows).items():
        if best := entry(found):
            entries[key] = best
        elif all("status" in x for x in found):
            entries.pop(key, None)
    made = {"schema": tile_table.SCHEMA, "architecture": tile_table.architecture(arch)}
    made |= {**where, "entries": list(entries.values())}
    tile_table.check(made, arch)
    return made


def render(table: Mapping[str, Any]) -> str:
    """A table as text, an entry a line."""
    head = {name: value for name, value in table.items() if name != "entries"}
    lines = ",\n".join(f"  {json.dumps(x)}" for x in table["entries"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "entries": [\n{lines}\n ]\n}}\n'


def summary(rows: Sequence[Mapping[str, Any]], shown: int = 4) -> str:
    """A few lines for each group: today's tile, the best ones, and who was refused."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    lines = []
    for name, found in groups.items():
        timed = sorted((x for x in found if x.get("status") == "ok"), key=lambda x: x["ms"])
        today = next((x for x in timed if not x["tile"]), None)
        missing = sum("status" not in x for x in found)
        now = f"{today['ms']:.4f} ms" if today else "?"
        lines.append(f"{name}: today {now}" + f", {missing} not reached" * bool(missing))
        for row in [x for x in timed if x["tile"]][:shown]:
            against = f"{row['today']['ms']:.4f}" if row["today"] else "?"
            lines.append(f"    {row['ms']:.4f}  beside {against}  {_verdict(row)}  {row['label']}")
        for row in found:
            if row.get("status") in ("failed", "refused"):
                lines.append(f"    {row['status']}  {row['label']}: {row['reason'][:90]}")
    return "\n".join(lines)

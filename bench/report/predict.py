"""What the kernels were predicted to take on a GPU, beside what they took where one was at hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from bench.report.markdown import head, line

NOTE = """\
Predictions, not measurements: a model of time (`svitt bench --predict h100`) that reads each
kernel's compiled code. It takes the largest of what DRAM, L2, tensor cores, exponentials, integer
units, shared memory and the issue of instructions need, and of the latency of one warp's way
through the kernel, times how often programs follow each other. `bench/predict/model.py` has it."""
CHECKED = """\
### Against what was measured

With the kernels of the commit that was measured, as the files of `bench/results` name it. The two
fitted constants are fitted to these very rows, so this says how well one pair of constants does for
all, not how well it does elsewhere."""
CANDIDATES = """\
### Tiles that a tuner timed

Other tiles than those of the fit, and other shapes, commits and a GPU's minutes of their own: a
line is one pass of one case. `ratio` is the geometric mean of predicted over measured; `rank` is
Spearman's correlation of the two orders; `first` is what the tile that is predicted to be the
fastest took, over what the fastest one took. `svitt tune` tries candidates in the order of such
predictions (`python -m bench.predict.rank`), which it reads from a file: on a GPU they cost no
time."""
BEFORE = """\
### Before and after

*Before* are the kernels of commit {before}, *after* those of the commit that has this file. Floors
are of the model's card: bytes at its copy bandwidth, useful FLOP at the rate of a large product."""


def render(folder: Path) -> str:
    """Markdown of all that is committed; "" where nothing is."""
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not documents:
        return ""
    parts = [NOTE, "\n".join(f"- {x}" for x in documents[0]["assumptions"])]
    if checked := [row for x in documents for row in x["results"] if "measured_ms" in row]:
        parts += [CHECKED, _checked(checked)]
    if timed := [row for x in documents for row in x.get("candidates", [])]:
        parts += [CANDIDATES, _candidates(timed)]
    open_ended = [x for x in documents if any("measured_ms" not in row for row in x["results"])]
    for after in (x for x in open_ended if not x["kernels"]):
        earlier = (x for x in open_ended if x["kernels"] and x["card"] == after["card"])
        if before := next(earlier, None):
            parts += [BEFORE.format(before=before["kernels"]), _compared(before, after)]
    return "\n\n".join(parts)


def _checked(rows: list[dict[str, Any]]) -> str:
    columns = ["op", "case", "direction", "predicted, ms", "measured, ms", "ratio", "bound by"]
    lines = head(columns, texts=3)
    errors = []
    for row in rows:
        ratio = row["ms"] / row["measured_ms"]
        errors.append(abs(math.log(ratio)))
        cells = [row["op"], row["case"], row["direction"].replace("_", " + ")]
        cells += [f"{row['ms']:.3f}", f"{row['measured_ms']:.3f}", f"{ratio:.2f}", row["bound"]]
        lines.append(line(cells))
    typical = math.exp(math.sqrt(sum(x * x for x in errors) / len(errors)))
    said = f"Off by {typical:.2f} x in the quadratic mean, {math.exp(max(errors)):.2f} x at most."
    return "\n".join([*lines, "", said])


def _candidates(rows: list[dict[str, Any]]) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    lines = head(["op, case, direction, pass", "tiles", "ratio", "rank", "first"])
    for group, found in groups.items():
        ours, theirs = ([x[name] for x in found] for name in ("ms", "measured_ms"))
        if len(found) > 2:
            ratio = geometric_mean(a / b for a, b in zip(ours, theirs, strict=True))
            first = theirs[ours.index(min(ours))] / min(theirs)
            rank = _spearman(ours, theirs)
            lines.append(
                line([group, f"{len(found)}", f"{ratio:.2f}", f"{rank:.2f}", f"{first:.2f}"])
            )
    return "\n".join(lines)


def _spearman(a: list[float], b: list[float]) -> float:
    n = len(a)
    ranks = [sorted(range(n), key=x.__getitem__) for x in (a, b)]
    first, second = ([order.index(i) for i in range(n)] for order in ranks)
    apart = sum((x - y) ** 2 for x, y in zip(first, second, strict=True))
    return 1 - 6 * apart / (n * (n * n - 1))


def _compared(before: dict[str, Any], after: dict[str, Any]) -> str:
    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["op"], row["case"], row["direction"]

    known = {key(row): row for row in before["results"]}
    columns = ["op", "case", "direction", "before, ms", "after, ms", "floor, ms", "x floor"]
    lines = head([*columns, "bound by"], texts=3)
    for row in after["results"]:
        old = known.get(key(row))
        cells = [row["op"], row["case"], row["direction"].replace("_", " + ")]
        cells += [f"{old['ms']:.3f}" if old else "-", f"{row['ms']:.3f}", f"{row['floor_ms']:.4f}"]
        cells += [f"{row['ms'] / row['floor_ms']:.1f}", row["bound"]]
        lines.append(line(cells))
    return "\n".join(lines)

"""`python -m bench.report`: tables and figures, made from the committed results.

python -m bench.report            write docs/results.md, docs/benchmarks.md, and the figures
python -m bench.report --check    exit 1 where the texts differ from the results

docs/results.md keeps a short table of each op; docs/benchmarks.md has every row. Several files of
one op on one machine, such as those of runs with `--case`, become one table.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import svitt_ops
from bench.measure import environment, results
from bench.measure.results import Document
from bench.report import (
    demo,
    demo_pictures,
    determinism,
    figures,
    predict,
    search_cost,
    standing,
    step,
)
from bench.report.markdown import head, line

END = "<!-- /bench -->"
TITLES = figures.TITLES | {"step": "Training step"}
FIGURES = "../bench/results/figures"
FACTS = {"mac_ratio": "of dense MACs", "edge_ratio": "edge ratio"}
"""Of results, and their columns; only the first one that there is."""
DIGITS = {"mac_ratio": 2, "edge_ratio": 1}
DOCS_ONLY = ("frame_attention", "momentum_step", "plugins", "sigmoid_nce")
"""What the short page has no section of."""
INTRODUCTION = """\
# Benchmarks

Written by `python -m bench.report` from `bench/results/*.json`: all that was measured, with the
machine, the versions, the commit and the command of each run. `make bench` measures your machine,
`make bench BENCH_ARGS="--op info_nce"` one op, and `--compare OLD.json` says what changed. The
results of several runs of one op on one machine, each of other cases, stand in one table; the
commands above it say which.

[Where a peer is ahead](#where-a-peer-is-ahead) names the exceptions, [the training
step](#the-training-step) and [scaling](#scaling) follow the ops, and [tuning.md](tuning.md) is the
record of what was tried.
"""
METHOD = """\
## How it was measured

- Medians (p20-p80) of milliseconds. Providers are timed in turns, each call after an untimed one.
- Each provider is gated before and after: its results must agree with the fp64 reference, ours
  within the error budget of the tests, a peer's within 8 times that. What fails has no time.
- Calls of more than a second are timed at least three times, of more than 15 s twice, without an
  untimed one before each; `samples` in a result has the number. Of a training step the last timed
  call is the one that is gated, and the memory of a slow one is that of the gate's first call.
- In italics: another function than the op's, such as dense attention. It is no best peer.
- `x best peer`: the time of the fastest peer that computes the same function, over ours.
- `of gemm`: useful FLOP/s over those of a large matrix product in the same rounds.
- `of floor`: max(bytes / copy bandwidth, FLOP / product rate) over the time.
- `+MiB`: peak memory beyond the inputs, results included.
"""
STANDING = """\
## Where a peer is ahead

A row is a case in one direction. It counts where a peer that computes the same function was timed;
within 3 % of the best peer it is level. The floor of a bf16 row takes the rate of a large bf16
product, where there are matrix units theirs, for all of the work; that of an fp32 row the rate of
fp32 multiply-adds, which `block_sparse_attention` and the contrastive ops make up from bf16
products on AMX.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check; 0, or 1 where a text does not hold what the results say."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    pages = environment.REPOSITORY / "docs"
    parser.add_argument("--short", type=Path, default=pages / "results.md")
    parser.add_argument("--docs", type=Path, default=pages / "benchmarks.md")
    parser.add_argument("--results", type=Path, default=environment.RESULTS)
    parser.add_argument("--no-figures", action="store_true")
    arguments = parser.parse_args(argv)
    by_op: dict[str, list[Document]] = {}
    try:
        for document in results.load_all(arguments.results):
            by_op.setdefault(document["op"], []).append(document)
    except results.SchemaError as error:
        print(error, file=sys.stderr)
        return 1
    if not (arguments.check or arguments.no_figures):
        for documents in by_machine(by_op).values():
            figures.draw(documents, arguments.results / "figures")
    short = arguments.short.read_text()
    try:
        for op in by_op:
            if op not in DOCS_ONLY:
                short = replace_section(short, op, _section(op, by_op))
        if by_op:
            short = replace_section(short, "standing", _standing(by_op, standing.render_short))
        if demos := demo.load(arguments.results / "demo"):
            short = replace_section(short, "demo", demo.render(demos))
    except ValueError as error:
        print(f"{arguments.short.name}: {error}", file=sys.stderr)
        return 1
    more = {
        "The cost of searching": search_cost.render(arguments.results / "search_cost", FIGURES),
        "Determinism": determinism.render(arguments.results / "determinism", FIGURES),
        "Predicted times on a GPU": predict.render(arguments.results / "predict"),
        "Demos on pictures": demo_pictures.render(demo.load_pictures(arguments.results / "demo")),
    }
    docs, stale = render_docs(by_op, more), []
    for path, wanted in ((arguments.short, short), (arguments.docs, docs)):
        if path.exists() and path.read_text() == wanted:
            continue
        stale.append(path.name)
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted)
    if arguments.check:
        drawn = [x for found in by_machine(by_op).values() for x in figures.names(found)]
        paths = [f"{name}-{theme.name}.png" for name in drawn for theme in figures.THEMES]
        folder = arguments.results / "figures"
        stale += [f"figures/{name}" for name in paths if not (folder / name).is_file()]
    if stale and arguments.check:
        names = " and ".join(stale)
        print(f"{names} not as bench/results has it: run python -m bench.report", file=sys.stderr)
        return 1
    return 0


def replace_section(text: str, op: str, section: str) -> str:
    """The text with another section between an op's markers."""
    start = f"<!-- bench:{op} -->"
    head, found, rest = text.partition(start)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"lacks the markers {start} and {END}")
    return f"{head}{start}\n{section}\n{END}{tail}"


def by_machine(by_op: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """All results of each machine, in the order of the ops."""
    found: dict[str, list[Document]] = {}
    for op in [*svitt_ops.OPS, *sorted(set(by_op) - set(svitt_ops.OPS))]:
        for document in by_op.get(op, []):
            found.setdefault(environment.slug("", document["environment"]), []).append(document)
    return found


def _section(op: str, by_op: dict[str, list[Document]]) -> str:
    """What the short page says of an op."""
    if op == "scaling":
        return _pictures(by_op)
    parts = []
    for document in by_op[op]:
        text = render_short(document)
        if op in step.OPS:
            text = f"{_source(document)}\n\n{step.render_short(document)}"
        parts.append(text)
    if op in step.OPS:
        parts.append(step.NOTES[op])
    return "\n\n".join(parts)


def _pictures(by_op: dict[str, list[Document]]) -> str:
    """The figures of every machine whose scaling was measured."""
    parts = []
    for documents in by_machine(by_op).values():
        sources = [_source(x) for x in documents if x["op"] == "scaling"]
        if sources:
            parts += [*sources, *_drawn(documents, lambda x: not x.startswith("tokens"))]
    return "\n\n".join(parts)


def _drawn(documents: list[Document], wanted: Callable[[str], bool]) -> list[str]:
    found = figures.names(documents).items()
    return [figures.markdown(name, words, FIGURES) for name, words in found if wanted(name)]


def _standing(by_op: dict[str, list[Document]], render: Callable[[Sequence[Document]], str]) -> str:
    return "\n\n".join(render(documents) for documents in by_machine(by_op).values())


def render_docs(by_op: dict[str, list[Document]], more: dict[str, str]) -> str:
    """Markdown of all results of all ops, and what else was measured, by title."""
    parts = [INTRODUCTION, METHOD]
    if by_op:
        parts += [STANDING, _standing(by_op, standing.render) + "\n"]
    for op in [op for op in (*svitt_ops.OPS, "frame_attention", "plugins") if op in by_op]:
        parts += [f"## `{op}`\n", render(by_op[op]) + "\n"]
    if any(op in by_op for op in step.OPS):
        parts.append("## The training step\n")
    for op in step.OPS:
        if op in by_op:
            parts.append(f"{step.NOTES[op]}\n")
        for document in by_op.get(op, []):
            table = step.render(document)
            parts.append(f"{_source(document)}\n\n{table}\n\n{_footnotes(document)}\n")
    if "scaling" in by_op:
        parts.append(f"## Scaling\n\n{_pictures(by_op)}\n")
    parts += [_render_one(document) + "\n" for document in by_op.get("scaling", [])]
    parts += [f"## {title}\n\n{text}\n" for title, text in more.items() if text]
    missing = [f"`{op}`" for op in svitt_ops.OPS if op not in by_op]
    if missing:
        parts.append(f"No results are committed yet of {', '.join(missing)}.\n")
    return "\n".join(parts)


def render(documents: Iterable[Document]) -> str:
    """Markdown of all results of one op: a part for each machine."""
    parts = []
    for document in documents:
        parts += _drawn([document], lambda x: x.startswith("tokens"))
        parts.append(_render_one(document))
    return "\n\n".join(parts)


def render_short(document: Document) -> str:
    """A line for each case: ours, the best peer and how far they are apart, and what is not one."""
    directions = [x for x in TITLES if any(r["direction"] == x for r in document["results"])]
    others = any(_other(result) for result in document["results"])
    columns = ["case"]
    for direction in directions:
        columns += [f"{TITLES[direction].lower()}, ms", "best peer, ms", "x best peer"]
        columns += [*["*other function*, ms"] * others, "of floor"]
    lines = [_source(document), "", *head(columns)]
    found = {(x["case"], x["direction"]): x for x in document["results"]}
    for case in dict.fromkeys(x["case"] for x in document["results"]):
        cells = [case]
        for direction in directions:
            result = found.get((case, direction))
            cells += [""] * (4 + others) if result is None else _short_cells(result, others)
        lines.append(line(cells))
    return "\n".join(lines)


def _short_cells(result: dict[str, Any], others: bool) -> list[str]:
    mine, best = next(iter(_rows(result, "ours")), None), results.best_peer(result)
    peer = "-" if best is None else f"{best['provider']} {best['ms']:.2f}"
    other = _other(result)
    beside = ["-" if other is None else f"*{other['provider']} {other['ms']:.2f}*"] * others
    if mine is None or mine["status"] != "ok":
        return ["-" if mine is None else mine["status"], peer, "-", *beside, "-"]
    ratio = "-" if best is None else f"{best['ms'] / mine['ms']:.1f}"
    return [f"{mine['ms']:.2f}", peer, ratio, *beside, f"{1 / mine['floor_ratio']:.0%}"]


def _other(result: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest row of a peer that computes another function."""
    rows = [x for x in _rows(result, "peer") if x["status"] == "ok" and not x["same_function"]]
    return min(rows, key=lambda row: row["ms"], default=None)


def _source(document: Document) -> str:
    """Where results come from: hardware, versions, and the commit and the command of each run."""
    where = document["environment"]
    parts = [f"**{where['hardware']}**", f"torch {where['versions']['torch']}"]
    if any(result["device"] == "cuda" for result in document["results"]):
        parts.append(f"Triton {where['versions']['triton']}")
    runs: dict[str, list[str]] = {}
    for run in document["sources"]:
        where = run["environment"]
        commit = (where["commit"] or "unknown")[:10] + (" with changes" if where["dirty"] else "")
        runs.setdefault(commit, []).append(f"`{run['command']}`")
    said = [f"commit {commit}: {', '.join(commands)}" for commit, commands in runs.items()]
    return ", ".join(parts) + ", " + "; ".join(said)


def _render_one(document: Document) -> str:
    lines = [_source(document)]
    for direction, title in TITLES.items():
        chosen = [x for x in document["results"] if x["direction"] == direction]
        if chosen:
            lines += ["", *_table(title, chosen)]
    lines += ["", _footnotes(document)]
    return "\n".join(lines)


def _table(title: str, chosen: list[dict[str, Any]]) -> list[str]:
    ours, peers = _names(chosen, "ours"), _names(chosen, "peer")
    variants = _names(chosen, "variant")
    named = [*ours, *variants, *peers]
    # Attention alone has edges to leave out, and of its models the products tell more.
    facts = [x for x in FACTS if any(x in result["facts"] for result in chosen)][:1]
    columns = [f"{title}, ms", *named, "x best peer", *map(FACTS.__getitem__, facts)]
    columns += ["of gemm", "of floor", "+MiB"]
    lines = head(columns)
    for result in chosen:
        mine = next(iter(_rows(result, "ours")), None)
        cells = [result["case"]]
        cells += [_time(results.row_of(result, name)) for name in named]
        best = results.best_peer(result)
        if mine is None or mine["status"] != "ok":
            cells += ["-"] * (4 + len(facts))
        else:
            cells.append(f"{best['ms'] / mine['ms']:.1f}" if best else "-")
            for ratio in map(result["facts"].get, facts):
                cells.append("-" if ratio is None else f"{ratio:.{DIGITS[facts[0]]}f}")
            cells += [f"{mine['gemm_ratio']:.2f}", f"{1 / mine['floor_ratio']:.0%}"]
            extra = mine.get("extra_bytes")
            cells.append("-" if extra is None else f"{extra / 2**20:.1f}")
        lines.append(line(cells))
    return lines


def _names(chosen: list[dict[str, Any]], role: str) -> list[str]:
    """Providers of a role that have a time in one of the results."""
    rows = [row for result in chosen for row in _rows(result, role)]
    wanted = [row["provider"] for row in rows if row["status"] == "ok" or role == "ours"]
    return list(dict.fromkeys(wanted))


def _rows(result: dict[str, Any], role: str) -> list[dict[str, Any]]:
    return [row for row in result["providers"] if row["role"] == role]


def _time(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"]
    text = f"{row['ms']:.2f} ({row['p20']:.2f}-{row['p80']:.2f})"
    return text if row["same_function"] else f"*{text}*"


def _footnotes(document: Document) -> str:
    rates = [x["ceilings"] for x in document["results"]]
    gemm = sorted(x["gemm_gflops"] for x in rates)
    copy = sorted(x["copy_gbs"] for x in rates)
    notes = [
        f"Large products ran at {gemm[0]:.0f} to {gemm[-1]:.0f} GFLOP/s, "
        f"copies at {copy[0]:.0f} to {copy[-1]:.0f} GB/s."
    ]
    growth = _memory_growth(document)
    if growth is not None:
        notes.append(f"Our extra memory grows as tokens^{growth:.2f}.")
    said: dict[str, None] = {}
    inexact: dict[str, float] = {}
    for result in document["results"]:
        for row in result["providers"]:
            if row["status"] == "ok" and (times := results.inexactness(row)) > 1:
                inexact[row["provider"]] = max(times, inexact.get(row["provider"], 0.0))
            if row["status"] != "ok":
                said[f"{row['provider']} {row['status']}: {row['reason']}."] = None
            elif row["note"]:
                said[f"{row['provider']}: {row['note']}."] = None
    for name, times in inexact.items():
        said[f"{name}: off by up to {times:.1f} of the error budgets that ours must keep."] = None
    return "\n".join(f"- {note}" for note in [*notes, *sorted(said)])


def _memory_growth(document: Document) -> float | None:
    """Exponent of our forward memory in tokens, over unpruned cases that differ in nothing else."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for result in document["results"]:
        fields = result["fields"]
        plain = result["case"] == f"n{fields.get('tokens')}-{result['dtype']}"
        for row in _rows(result, "ours"):
            if result["direction"] == "forward" and plain and row.get("extra_bytes"):
                point = (fields["tokens"], row["extra_bytes"])
                groups.setdefault(result["dtype"], []).append(point)
    for points in groups.values():
        (n0, m0), (n1, m1) = min(points), max(points)
        if n1 > n0:
            return math.log(m1 / m0) / math.log(n1 / n0)
    return None


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.report`: tables of the README and figures, made from the committed results.

python -m bench.report            write the tables between the markers, and the figures
python -m bench.report --check    exit 1 where the README differs from the results
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import environment, results

Document = dict[str, Any]
END = "<!-- /bench -->"
TITLES = {"forward": "Forward", "forward_backward": "Forward + backward"}


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check; 0, or 1 where the README does not hold what the results say."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--readme", type=Path, default=environment.REPOSITORY / "README.md")
    parser.add_argument("--results", type=Path, default=environment.RESULTS)
    parser.add_argument("--no-figures", action="store_true")
    arguments = parser.parse_args(argv)
    by_op: dict[str, list[Document]] = {}
    for path in sorted(arguments.results.glob("*.json")):
        document = results.load(path)
        by_op.setdefault(document["op"], []).append(document)
        if not (arguments.check or arguments.no_figures):
            draw(document, path.with_suffix(".png"))
    text = arguments.readme.read_text()
    wanted = text
    for op, documents in by_op.items():
        try:
            wanted = replace_section(wanted, op, render(documents))
        except ValueError as error:
            print(f"{arguments.readme.name}: {error}", file=sys.stderr)
            return 1
    if wanted == text:
        return 0
    if arguments.check:
        print("README.md differs from bench/results: run python -m bench.report", file=sys.stderr)
        return 1
    arguments.readme.write_text(wanted)
    return 0


def replace_section(text: str, op: str, section: str) -> str:
    """The text with another section between an op's markers."""
    start = f"<!-- bench:{op} -->"
    head, found, rest = text.partition(start)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"lacks the markers {start} and {END}")
    return f"{head}{start}\n{section}\n{END}{tail}"


def render(documents: Iterable[Document]) -> str:
    """Markdown of all results of one op: a part for each machine."""
    return "\n\n".join(_render_one(document) for document in documents)


def _render_one(document: Document) -> str:
    where = document["environment"]
    versions = where["versions"]
    source = (where["commit"] or "unknown")[:10] + (" with changes" if where["dirty"] else "")
    parts = [f"torch {versions['torch']}"]
    if any(result["device"] == "cuda" for result in document["results"]):
        parts.append(f"Triton {versions['triton']}")
    lines = [
        f"**{where['hardware']}**, {', '.join(parts)}, commit {source}: `{document['command']}`"
    ]
    for direction, title in TITLES.items():
        chosen = [x for x in document["results"] if x["direction"] == direction]
        if chosen:
            lines += ["", *_table(title, chosen)]
    lines += ["", _footnotes(document)]
    return "\n".join(lines)


def _table(title: str, chosen: list[dict[str, Any]]) -> list[str]:
    peers = list(dict.fromkeys(r["provider"] for x in chosen for r in _rows(x, "peer")))
    ours = list(dict.fromkeys(r["provider"] for x in chosen for r in _rows(x, "ours")))
    columns = [
        f"{title}, ms",
        *ours,
        *peers,
        "x best peer",
        "edge ratio",
        "of gemm",
        "of floor",
        "+MiB",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for result in chosen:
        mine = next(iter(_rows(result, "ours")), None)
        cells = [result["case"]]
        cells += [_time(results.row_of(result, name)) for name in [*ours, *peers]]
        best = results.best_peer(result)
        if mine is None or mine["status"] != "ok":
            cells += ["-"] * 5
        else:
            cells.append(f"{best['ms'] / mine['ms']:.1f}" if best else "-")
            ratio = result["facts"].get("edge_ratio")
            cells.append("-" if ratio is None else f"{ratio:.1f}")
            cells += [f"{mine['gemm_ratio']:.2f}", f"{1 / mine['floor_ratio']:.0%}"]
            extra = mine.get("extra_bytes")
            cells.append("-" if extra is None else f"{extra / 2**20:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


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
        "Medians (p20-p80), providers timed in turns, each call after an untimed one, each gated "
        "against the fp64 reference before and after; in italics: another function, "
        "and no best peer.",
        "`of gemm`: useful FLOP/s over those of a large matrix product in the same rounds "
        f"({gemm[0]:.0f} to {gemm[-1]:.0f} GFLOP/s); `of floor`: max(bytes / copy bandwidth, "
        f"FLOP / product rate) over the time (copies {copy[0]:.0f} to {copy[-1]:.0f} GB/s); "
        "`+MiB`: peak memory beyond the inputs.",
    ]
    growth = _memory_growth(document)
    if growth is not None:
        notes.append(f"Our extra memory grows as tokens^{growth:.2f}.")
    reasons: dict[str, None] = {}
    for result in document["results"]:
        for row in result["providers"]:
            if row["status"] != "ok":
                reasons[f"{row['provider']} {row['status']}: {row['reason']}."] = None
    return " ".join([*notes, *reasons])


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


def draw(document: Document, path: Path) -> None:
    """Time over tokens of every provider, for the cases that differ in tokens alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys((x["dtype"], x["direction"]) for x in document["results"]))
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=(4.2 * len(kinds), 3.6), squeeze=False, facecolor="white"
    )
    for axis, (dtype, direction) in zip(axes[0], kinds, strict=True):
        curves: dict[str, list[tuple[int, float, str]]] = {}
        for result in document["results"]:
            tokens = result["fields"].get("tokens")
            if (result["dtype"], result["direction"], result["case"]) != (
                dtype,
                direction,
                f"n{tokens}-{dtype}",
            ):
                continue
            for row in result["providers"]:
                if row["status"] == "ok":
                    curves.setdefault(row["provider"], []).append((tokens, row["ms"], row["role"]))
        for name, points in curves.items():
            points.sort()
            ours = points[0][2] == "ours"
            axis.plot(
                [x[0] for x in points],
                [x[1] for x in points],
                label=name,
                marker="o",
                linewidth=2.5 if ours else 1.2,
                color="black" if ours else None,
            )
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", facecolor="white")
        axis.set_title(f"{TITLES[direction]}, {dtype}")
        axis.grid(True, which="both", color="0.9")
        if curves:
            axis.legend(fontsize=7)
    figure.suptitle(f"{document['op']} on {document['environment']['hardware']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())

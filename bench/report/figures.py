"""The figures of the results, each for a light and for a dark page; drawn by `bench.report`.

Made to be read at 800 pixels: 8 inches wide, no text below 11 points.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import svitt_ops
from bench.cases import scaling
from bench.measure import environment, results
from bench.measure.results import Document

TITLES = {"forward": "Forward", "forward_backward": "Forward + backward"}
DPI = 200


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of one kind of page."""

    name: str
    page: str
    ink: str
    faint: str
    ours: str
    second: str
    dense: str
    costly: str
    third: str


_COLOURS = {  # on a light page, and on a dark one
    "page": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "faint": ("#d1d9e0", "#30363d"),
    "ours": ("#0969da", "#58a6ff"),
    "second": ("#54aeff", "#1f6feb"),
    "dense": ("#6e7781", "#9198a1"),
    "costly": ("#bc4c00", "#f0883e"),
    "third": ("#8250df", "#bc8cff"),
}
THEMES = tuple(
    Theme(name=name, **{part: colours[i] for part, colours in _COLOURS.items()})
    for i, name in enumerate(("light", "dark"))
)


def draw(documents: Sequence[Document], folder: Path) -> list[Path]:
    """Write every figure that the results of one machine have the data for."""
    written = []
    for name, paint in _figures(documents):
        for theme in THEMES:
            written.append(save(paint, theme, folder / f"{name}-{theme.name}.png"))
    return written


def markdown(name: str, words: str, folder: str) -> str:
    """A figure in a page that is light or dark; `name` as `draw` has it, without the theme."""
    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.png">\n'
        f'  <img alt="{words}" src="{folder}/{name}-light.png" width="800">\n'
        "</picture>"
    )


def source(document: dict[str, Any]) -> str:
    """Where the numbers of a document with a `command` of its own come from."""
    where = document["environment"]
    return (
        f"**{where['hardware']}**, torch {where['versions']['torch']}, commit"
        f" {(where['commit'] or 'unknown')[:10]}: `{document['command']}`"
    )


def names(documents: Sequence[Document]) -> dict[str, str]:
    """Figure -> what it shows, of those that `draw` writes."""
    words = {
        "sparsity": "Time of block-sparse attention, of dense attention's, against edges left out",
        "tokens": "Time of an op and its peers against tokens",
        "frames": "Time and memory of attention, sparse and dense, against frames",
        "floor": "Percent of the machine's floor that each op reaches",
    }
    return {name: words[name.partition("-")[0]] for name, _ in _figures(documents)}


def _figures(documents: Sequence[Document]) -> Iterator[tuple[str, Callable[[Any, Theme], None]]]:
    if not documents:
        return
    machine, by_op = _machine(documents[0]), {x["op"]: x for x in documents}
    if "scaling" in by_op:
        document = by_op["scaling"]
        kinds = _kinds(document)
        if any(len(_sparsity_points(document, dtype, d)) > 1 for dtype in kinds for d in TITLES):
            yield f"sparsity-{machine}", lambda f, t: _draw_sparsity(f, t, document)
        if _frame_points(document, kinds[0], "svitt_ops", False, "ms"):
            yield f"frames-{machine}", lambda f, t: _draw_frames(f, t, document)
    for op, document in by_op.items():
        if op in svitt_ops.OPS and len(_sizes(document, "svitt_ops")) > 1:
            yield f"tokens-{op}-{machine}", lambda f, t, d=document: _draw_tokens(f, t, d)  # type: ignore[misc]
    ops = [x for op, x in by_op.items() if op in svitt_ops.OPS and _floor_ratios(x)]
    if ops:
        yield f"floor-{machine}", lambda f, t: _draw_floor(f, t, ops)


def _machine(document: Document) -> str:
    return environment.slug("", document["environment"]).strip("-")


def _kinds(document: Document) -> list[str]:
    return list(dict.fromkeys(x["dtype"] for x in document["results"]))


def draw_both(paint: Callable[[Any, Theme], None], folder: Path, name: str) -> list[Path]:
    """The files of one figure, for a light and for a dark page."""
    return [save(paint, theme, folder / f"{name}-{theme.name}.png") for theme in THEMES]


def save(paint: Callable[[Any, Theme], None], theme: Theme, path: Path) -> Path:
    """Write a figure in the colours of a theme."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 12,
        "axes.titlesize": 13,
        "legend.fontsize": 11,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "figure.facecolor": theme.page,
        "axes.facecolor": theme.page,
        "savefig.facecolor": theme.page,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.faint,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 2.2,
        "lines.markersize": 6,
        "legend.frameon": False,
    }
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=(8, 4), layout="constrained")
        paint(figure, theme)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the version of matplotlib, so that the same data gives the same file.
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        pyplot.close(figure)
    return path


def _mark_log(axis: Any) -> None:
    """Marks at 1, 2 and 5 of each power of ten, of which a plot may hold a single one."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_tokens(figure: Any, theme: Theme, document: Document) -> None:
    kinds, peers = _kinds(document), (theme.dense, theme.costly, theme.third, theme.second)
    directions = [x for x in TITLES if any(r["direction"] == x for r in document["results"])]
    rows = [row for result in document["results"] for row in result["providers"]]
    names = [
        name
        for name in dict.fromkeys(row["provider"] for row in rows if row["role"] == "peer")
        if len(_sizes(document, name)) > 1
    ]
    curves = [(name, color, 1.4) for name, color in zip(names, peers * 2, strict=False)]
    curves.append(("svitt_ops", theme.ours, 3.0))
    tokens = sorted(_sizes(document, "svitt_ops"))
    figure.set_size_inches(8, 1 + 2.6 * len(kinds))
    axes = figure.subplots(len(kinds), len(directions), sharex=True, squeeze=False)
    lines: dict[str, Any] = {}
    for i, dtype in enumerate(kinds):
        for axis, direction in zip(axes[i], directions, strict=True):
            axis.set(title=f"{TITLES[direction]}, {dtype}", xscale="log", yscale="log")
            axis.minorticks_off()
            _mark_log(axis.yaxis)
            for name, color, width in curves:
                if points := _token_points(document, name, dtype, direction):
                    line = axis.plot(*zip(*points, strict=True), "o-", color=color, linewidth=width)
                    lines[name] = line[0]
            axis.set_xticks(tokens, [str(x) for x in tokens])
        axes[i, 0].set_ylabel("ms")
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)
    _caption(figure, document, document["op"])


def _token_points(
    document: Document, provider: str, dtype: str = "", direction: str = ""
) -> list[tuple[int, float]]:
    """(tokens, ms) of a provider, over the cases that differ in tokens alone."""
    points = set()
    for result in document["results"]:
        tokens, row = result["fields"].get("tokens"), results.timed(result, provider)
        plain = result["case"] == f"n{tokens}-{result['dtype']}"
        if not plain or row is None:
            continue
        if dtype in ("", result["dtype"]) and direction in ("", result["direction"]):
            points.add((tokens, row["ms"]))
    return sorted(points)


def _sizes(document: Document, provider: str) -> set[int]:
    return {tokens for tokens, _ in _token_points(document, provider)}


def _draw_sparsity(figure: Any, theme: Theme, document: Document) -> None:
    kinds = _kinds(document)
    measured = [x for x in TITLES if any(_sparsity_points(document, kind, x) for kind in kinds)]
    axes = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axis, direction in zip(axes, measured, strict=True):
        axis.plot([0, 100], [100, 0], "--", color=theme.dense, label="ideal")
        for dtype, color in zip(kinds, (theme.ours, theme.costly), strict=False):
            if points := _sparsity_points(document, dtype, direction):
                label = f"svitt_ops, {dtype}"
                axis.plot(*zip(*points, strict=True), "o-", color=color, label=label)
        axis.set(title=TITLES[direction], xlabel="edges left out, %", xlim=(0, 100))
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("time, % of dense SDPA")
    axes[0].legend(loc="lower left")
    _caption(figure, document, f"{scaling.BLOCK_FRAMES} frames")


def _sparsity_points(document: Document, dtype: str, direction: str) -> list[tuple[float, float]]:
    """(edges left out, time), in percent of dense attention's."""
    points = []
    for result in _results(document, dtype, direction):
        mine, dense = results.timed(result, "svitt_ops"), scaling.dense_row(result)
        if result["fields"]["frames"] != scaling.BLOCK_FRAMES or result["fields"]["bias"]:
            continue
        if mine is not None and dense is not None:
            left_out = 100 - 100 / result["facts"]["edge_ratio"]
            points.append((left_out, 100 * mine["ms"] / dense["ms"]))
    return sorted(points)


def _draw_frames(figure: Any, theme: Theme, document: Document) -> None:
    dtype = _kinds(document)[0]
    axes = figure.subplots(1, 2)
    curves = (
        ("SDPA with bias", "dense", True, theme.costly, "s--"),
        ("SDPA", "dense", False, theme.dense, "s-"),
        ("svitt_ops with bias", "svitt_ops", True, theme.second, "o--"),
        ("svitt_ops", "svitt_ops", False, theme.ours, "o-"),
    )
    for axis, key in zip(axes, ("ms", "extra_bytes"), strict=True):
        for label, who, bias, color, line in curves:
            points = _frame_points(document, dtype, who, bias, key)
            if points:
                axis.plot(*zip(*points, strict=True), line, color=color, label=label)
        axis.set(xscale="log", yscale="log", xlabel="frames")
        axis.set_xticks(scaling.FRAMES, [str(x) for x in scaling.FRAMES])
        axis.minorticks_off()
        _mark_log(axis.yaxis)
    axes[0].set(title="Time", ylabel="ms")
    axes[1].set(title="Peak memory", ylabel="MiB")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    _caption(figure, document, f"forward + backward, {dtype}, one clip")


def _frame_points(
    document: Document, dtype: str, who: str, bias: bool, key: str
) -> list[tuple[int, float]]:
    """(frames, ms or MiB) of one clip's attention, with the layout of SViTT."""
    points = []
    found = [
        x
        for x in _results(document, dtype, "forward_backward")
        if x["fields"]["bias"] == bias and x["fields"]["blocks"] == scaling.BLOCKS_OF_SVITT
    ]
    batch = min((x["fields"]["batch"] for x in found), default=0)
    for result in (x for x in found if x["fields"]["batch"] == batch):
        ours = results.timed(result, "svitt_ops")
        row = scaling.dense_row(result) if who == "dense" else ours
        if row is not None and row.get(key):
            scale = 2**20 if key == "extra_bytes" else 1
            points.append((result["fields"]["frames"], row[key] / scale))
    return sorted(points)


def _draw_floor(figure: Any, theme: Theme, documents: Sequence[Document]) -> None:
    kinds = list(dict.fromkeys(kind for x in documents for kind in _kinds(x)))
    figure.set_size_inches(8, 1.4 + 0.62 * len(documents))
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, dtype in zip(axes, kinds, strict=True):
        for shift, direction, color in (
            (-0.19, "forward", theme.ours),
            (0.19, "forward_backward", theme.second),
        ):
            for place, document in enumerate(documents):
                ratios = _floor_ratios(document).get((dtype, direction), [])
                if not ratios:
                    continue
                middle = statistics.median(ratios)
                label = TITLES[direction] if place == 0 else None
                axis.barh(place + shift, middle, 0.36, color=color, label=label)
                span = [[middle - min(ratios)], [max(ratios) - middle]]
                axis.errorbar(middle, place + shift, xerr=span, color=theme.ink, linewidth=1)
        axis.axvline(100, color=theme.dense, linestyle="--")
        axis.set(title=dtype, xlabel="% of floor")
        axis.set_xlim(left=0)
        axis.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(documents)), [x["op"] for x in documents])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2)
    _caption(figure, documents[0], "median of the cases, from the least to the most")


def _floor_ratios(document: Document) -> dict[tuple[str, str], list[float]]:
    """(dtype, direction) -> percent of the floor of our own row in each case."""
    found: dict[tuple[str, str], list[float]] = {}
    for result in document["results"]:
        for row in result["providers"]:
            if row["role"] == "ours" and row["status"] == "ok":
                key = (result["dtype"], result["direction"])
                found.setdefault(key, []).append(100 / row["floor_ratio"])
    return found


def _results(document: Document, dtype: str, direction: str) -> list[dict[str, Any]]:
    found = document["results"]
    return [x for x in found if (x["dtype"], x["direction"]) == (dtype, direction)]


def _caption(figure: Any, document: Document, what: str) -> None:
    figure.suptitle(f"{what}; {document['environment']['hardware']}", fontsize=11)

"""The table and the figure of what searching costs, with two streams and with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.measure import environment
from bench.report import figures
from bench.report.markdown import head, line

NOTE = """\
Searching N images by N texts: COOKIE, which encodes each image and each text once, beside a model
of as many layers that takes image and text together and has a pass for each pair, after the same
ResNet. The time of N x N passes is that of some, times their number."""


def render(folder: Path, drawn: str) -> str:
    """Markdown of all that was measured, with the figures in `drawn`; "" where nothing was."""
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join([NOTE, *(_one(x, drawn) for x in documents)]) if documents else ""


def _one(document: dict[str, Any], drawn: str) -> str:
    source = figures.source(document)
    lines = head(["N", "two streams, s", "one stream, s", "ratio"])
    for row in document["results"]:
        two, one = (row[name]["seconds"] for name in ("two_stream", "one_stream"))
        lines.append(line([f"{row['n']:,}", f"{two:.1f}", f"{one:,.0f}", f"{one / two:,.0f} x"]))
    words = "Time of searching N x N with two streams and with one, against N"
    picture = figures.markdown(name(document), words, drawn)
    remark = [document["remark"]] if "remark" in document else []
    return "\n\n".join([source, picture, "\n".join(lines), *remark])


def name(document: dict[str, Any]) -> str:
    """What the files of a document's figure are called before `-THEME.png`."""
    return environment.slug("search-cost", document["environment"])


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """The figure of what was measured, for a light and for a dark page."""
    return figures.draw_both(
        lambda figure, theme: _paint(figure, theme, document), folder, name(document)
    )


def _paint(figure: Any, theme: figures.Theme, document: dict[str, Any]) -> None:
    axis = figure.subplots()
    sizes = [row["n"] for row in document["results"]]
    for name, label, colour in (
        ("two_stream", "two streams, each item encoded once", theme.ours),
        ("one_stream", "one stream, a pass for each pair (from the time of one)", theme.costly),
    ):
        seconds = [row[name]["seconds"] for row in document["results"]]
        axis.plot(sizes, seconds, "o-", color=colour, label=label)
    axis.set(xscale="log", yscale="log", xlabel="images and texts", ylabel="seconds")
    axis.set_xticks(sizes, [str(n) for n in sizes])
    axis.minorticks_off()
    axis.legend(loc="upper left")
    axis.set_title(
        f"Searching N x N, {document['features']} features, {document['tokens']} tokens\n"
        f"{document['environment']['hardware']}",
        fontsize=11,
    )

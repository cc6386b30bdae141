"""The table and the figure of whose bits change from run to run and with the number of threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.measure import environment
from bench.report import figures
from bench.report.markdown import head, line

WORDS = "Bits of the results of runs with the same inputs: ours beside torch's"


def patterns(row: dict[str, Any]) -> dict[str, list[int]]:
    """Threads -> of each run, which of the row's bit patterns its results have, in their order."""
    known: dict[str, int] = {}
    return {
        threads: [known.setdefault(str(sorted(run.items())), len(known)) for run in runs]
        for threads, runs in row["digests"].items()
    }


def changing(row: dict[str, Any]) -> list[str]:
    """The results that have not the same bits in all runs."""
    runs = [run for group in row["digests"].values() for run in group]
    return [part for part in runs[0] if len({run[part] for run in runs}) > 1]


def table(document: dict[str, Any]) -> str:
    """How many bit patterns each way has, and what of its results changes."""
    rows = document["results"]
    counts = list(rows[0]["digests"])
    threads = (f"{x} thread{'s' * (x != '1')}" for x in counts)
    lines = head(["", "what changes", *threads, "all"], texts=2)
    for row in rows:
        found = patterns(row)
        every = {pattern for runs in found.values() for pattern in runs}
        cells = [row["name"], ", ".join(changing(row)) or "nothing"]
        lines.append(line([*cells, *(str(len(set(found[x]))) for x in counts), str(len(every))]))
    return "\n".join(lines)


def render(folder: Path, drawn: str) -> str:
    """Markdown of all that was measured, with the figures in `drawn`; "" where nothing was."""
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join(_one(document, drawn) for document in documents)


def _one(document: dict[str, Any], drawn: str) -> str:
    runs = len(next(iter(document["results"][0]["digests"].values())))
    source = figures.source(document)
    said = f"Bit patterns in {runs} runs of each number of threads:"
    picture = figures.markdown(name(document), WORDS, drawn)
    return "\n\n".join([source, picture, said, table(document)])


def name(document: dict[str, Any]) -> str:
    """What the files of a document's figure are called before `-THEME.png`."""
    return environment.slug("determinism", document["environment"])


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """The figure of what was measured, for a light and for a dark page."""
    return figures.draw_both(
        lambda figure, theme: _paint(figure, theme, document), folder, name(document)
    )


def _paint(figure: Any, theme: figures.Theme, document: dict[str, Any]) -> None:
    from matplotlib import colormaps

    rows = document["results"]
    figure.set_size_inches(8, 1.3 + 0.42 * len(rows))
    axis = figure.subplots()
    counts = list(rows[0]["digests"])
    runs = len(rows[0]["digests"][counts[0]])
    span = runs + 1  # a gap between the groups
    others = colormaps["autumn"]
    for place, row in enumerate(rows):
        found = patterns(row)
        last = max(pattern for group in found.values() for pattern in group)
        for group, threads in enumerate(counts):
            for run, pattern in enumerate(found[threads]):
                color = others((pattern - 1) / last) if pattern else theme.ours
                axis.barh(place, 0.86, 0.72, group * span + run, align="center", color=color)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    middles = [group * span + runs / 2 for group in range(len(counts))]
    axis.set_xticks(middles, [f"{x} thread{'s' * (x != '1')}" for x in counts])
    axis.tick_params(length=0)
    axis.grid(visible=False)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    figure.suptitle(
        "A cell is a run of a row's inputs; one colour, one pattern of bits\n"
        f"forward + backward, fp32; {document['environment']['hardware']}",
        fontsize=11,
    )

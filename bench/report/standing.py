"""Where a peer is ahead, and how far our rows are from their floors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.measure import results
from bench.measure.results import Document
from bench.report.markdown import head, line

LEVEL = 0.03
"""Ratios this close to 1 say nothing: two runs of the same code differ by more."""
FAR = 0.6
"""A row that reaches less of its floor than this is named as far from it."""
DIRECTIONS = {"forward": "forward", "forward_backward": "forward + backward"}


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One of our rows beside the best peer that computes the same function."""

    op: str
    case: str
    direction: str
    peer: str
    peer_ms: float
    ours_ms: float | None
    """None where ours failed."""

    @property
    def ratio(self) -> float:
        """Time of the peer over ours; 0 where ours failed."""
        return self.peer_ms / self.ours_ms if self.ours_ms else 0.0


def standings(documents: Sequence[Document]) -> list[Standing]:
    """Every row that has such a peer."""
    found = []
    for document, result in _rows(documents):
        best, mine = results.best_peer(result), results.ours(result)
        if best is not None:
            found.append(
                Standing(
                    op=document["op"],
                    case=result["case"],
                    direction=DIRECTIONS[result["direction"]],
                    peer=best["provider"],
                    peer_ms=best["ms"],
                    ours_ms=mine["ms"] if mine else None,
                )
            )
    return found


def render(documents: Sequence[Document]) -> str:
    """Of one machine: the count, a line for each row with a faster peer, and what floors allow."""
    found = standings(documents)
    lines = [f"**{documents[0]['environment']['hardware']}**: {_count(found)}"]
    behind = sorted((x for x in found if x.ratio < 1), key=lambda x: x.ratio)
    if behind:
        lines += ["", "| op | case | direction | ours, ms | best peer, ms | x best peer | |"]
        lines.append("|---|---|---|---:|---:|---:|---|")
    for x in behind:
        ours, ratio = (f"{x.ours_ms:.2f}", _two(x)) if x.ours_ms else ("failed", "-")
        cells = [x.op, x.case, x.direction, ours, f"{x.peer} {x.peer_ms:.2f}", ratio]
        lines.append(line([*cells, "level" if x.ratio > 1 - LEVEL else ""]))
    return "\n".join([*lines, "", *_floors(documents)])


def render_short(documents: Sequence[Document]) -> str:
    """Of one machine: the count, and the rows with a faster peer in one sentence."""
    found = standings(documents)
    behind = [x for x in found if x.ratio <= 1 - LEVEL]
    groups: dict[str, list[str]] = {}
    for x in behind:
        words = f"{x.case} ({x.peer}, {_two(x)})"
        groups.setdefault(f"`{x.op}` {x.direction}", []).append(words)
    text = f"**{documents[0]['environment']['hardware']}**: {_count(found)}"
    if behind:
        listed = "; ".join(f"{group}: {', '.join(words)}" for group, words in groups.items())
        text += f" Behind, with the best peer's time over ours: {listed}."
    return text


def _count(found: Sequence[Standing]) -> str:
    behind = sum(x.ratio <= 1 - LEVEL for x in found)
    level = sum(abs(x.ratio - 1) < LEVEL for x in found)
    ahead = len(found) - behind - level
    return (
        f"ahead of every peer in {ahead} of {len(found)} rows, level with the best in {level}, "
        f"behind in {behind or 'none'}."
    )


def _two(x: Standing) -> str:
    return f"{x.ratio:.2f}" if x.ratio else "ours failed"


def _floors(documents: Sequence[Document]) -> list[str]:
    """A line an op: how many rows are far from their floor, and what these reach."""
    reached: dict[str, dict[str, list[float]]] = {}
    for document, result in _rows(documents):
        if mine := results.ours(result):
            kind = f"{result['dtype']} {DIRECTIONS[result['direction']]}"
            kinds = reached.setdefault(document["op"], {})
            kinds.setdefault(kind, []).append(1 / mine["floor_ratio"])
    columns = list(dict.fromkeys(kind for kinds in reached.values() for kind in kinds))
    lines = head([f"under {FAR:.0%} of the floor", *columns])
    for op, kinds in reached.items():
        lines.append(line([op, *(_far(kinds.get(kind, [])) for kind in columns)]))
    return lines


def _far(shares: Sequence[float]) -> str:
    far = [x for x in shares if x < FAR]
    if not shares or not far:
        return f"none of {len(shares)}" if shares else ""
    span = list(dict.fromkeys(f"{x:.0%}" for x in (min(far), max(far))))
    return f"{len(far)} of {len(shares)}: {' to '.join(span)}"


def _rows(documents: Sequence[Document]) -> Iterator[tuple[Document, dict[str, Any]]]:
    for document in documents:
        for result in document["results"]:
            if result["direction"] in DIRECTIONS:
                yield document, result

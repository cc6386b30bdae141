"""What changed between two results of the same machine, beyond noise.

Times of two runs differ by the machine's mood as well as by the code. The large product that runs
in turns with every case tells the mood: times are compared in units of it. A change counts where
the interquantile ranges (p20 to p80) of the two do not overlap and the medians are more than
`TOLERANCE` apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TOLERANCE = 0.10
"""Two runs of the same code on a quiet machine were seen to differ by up to this much."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One provider in one case and direction, then and now."""

    case: str
    direction: str
    provider: str
    old_ms: float
    new_ms: float
    ratio: float
    """New over old, each in units of the large product of its own run."""
    verdict: Literal["same", "faster", "slower"]


def compare(old: dict[str, Any], new: Sequence[dict[str, Any]]) -> list[Change]:
    """Every row that both have, of the ops' own providers.

    Args:
        old: a result, see `bench.measure.results`.
        new: results; those of another op are passed over.

    Raises:
        ValueError: where the two are not of the same hardware.
    """
    then = dict(_rows(old))
    changes = []
    for document in new:
        if document["op"] != old["op"]:
            continue
        was, now = old["environment"]["hardware"], document["environment"]["hardware"]
        if was != now:
            raise ValueError(f"compare: results must be of one machine, got {was!r} and {now!r}")
        for key, (row, unit) in _rows(document):
            if key in then:
                changes.append(_change(key, *then[key], row, unit))
    return changes


def render(changes: Sequence[Change]) -> str:
    """Lines for a terminal: the changes beyond noise, and how many rows stayed as they were."""
    moved = [x for x in changes if x.verdict != "same"]
    lines = [
        f"{x.case} {x.direction} {x.provider}: {x.verdict}, {x.old_ms:.3f} -> {x.new_ms:.3f} ms, "
        f"{x.ratio:.2f} x in units of the machine's product"
        for x in sorted(moved, key=lambda x: -x.ratio)
    ]
    same = len(changes) - len(moved)
    lines.append(f"{same} of {len(changes)} rows: no change beyond noise")
    return "\n".join(lines)


def _rows(document: dict[str, Any]) -> Iterator[tuple[tuple[str, str, str], Any]]:
    """(case, direction, provider) -> the row, and ms per GFLOP of the product beside it."""
    for result in document["results"]:
        unit = 1e3 / result["ceilings"]["gemm_gflops"]
        for row in result["providers"]:
            if row["status"] == "ok" and row["role"] != "peer":
                yield (result["case"], result["direction"], row["provider"]), (row, unit)


def _change(
    key: tuple[str, str, str],
    old: dict[str, Any],
    old_unit: float,
    new: dict[str, Any],
    new_unit: float,
) -> Change:
    ratio = (new["ms"] / new_unit) / (old["ms"] / old_unit)
    verdict: Literal["same", "faster", "slower"] = "same"
    # Apart in both measures: the product's own noise alone must not make a change.
    if ratio > 1 + TOLERANCE and new["p20"] / new_unit > old["p80"] / old_unit:
        verdict = "slower" if new["p20"] > old["p80"] else "same"
    elif ratio < 1 / (1 + TOLERANCE) and new["p80"] / new_unit < old["p20"] / old_unit:
        verdict = "faster" if new["p80"] < old["p20"] else "same"
    case, direction, provider = key
    return Change(
        case=case,
        direction=direction,
        provider=provider,
        old_ms=old["ms"],
        new_ms=new["ms"],
        ratio=ratio,
        verdict=verdict,
    )

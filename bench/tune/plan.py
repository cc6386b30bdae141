"""Which tiles are tried, for which of the benchmark's cases."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

SHORT = {"rows": "r", "columns": "c", "chunk": "k", "slice": "s", "num_warps": "w"}
SHORT |= {"num_stages": "st", "programs": "p", "max_registers": "reg"}
PREDICTED = Path(__file__).with_name("predicted.json")
"""What `python -m bench.predict.rank` wrote: milliseconds by group and label."""
PREDICTED_PROCESSORS = 132  # of the card that it is of
START_S, CHECK_S, COMPILE_S, TIME_S = 25.0, 5.0, 6.0, 0.8
"""What a run, a case, a kernel on one core and a candidate take, as on an H200 with 16 cores."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One tile for one case."""

    op: str
    case: str
    """Its name among those of the benchmark on a GPU."""
    direction: str
    which: str
    """The pass of the tile table that the tile stands in for."""
    tile: Mapping[str, int] = field(default_factory=dict)
    """Fields of the tile that differ from today's; none: today's."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the case that differ, of a rehearsal."""
    plant: str = ""
    """Of a rehearsal: "exit", "hang" or "wrong"."""

    @property
    def group(self) -> str:
        """Those that are compared with each other."""
        return f"{self.op} {self.case} {self.direction} {self.which}"

    @property
    def label(self) -> str:
        """The tile in a few letters."""
        name = " ".join(f"{SHORT[k]}{v}" for k, v in self.tile.items()) or "today"
        return f"{name} {self.plant}".strip()

    @property
    def binary(self) -> str:
        """The same for candidates whose kernels are the same."""
        tile = {k: v for k, v in self.tile.items() if k != "programs"}
        kind = re.sub(r"\b[nbq]\d+-", "", self.case) if tile else self.case
        return json.dumps([self.op, kind, self.direction, self.which, tile, self.plant])


@dataclass(frozen=True)
class Tiles:
    """Tiles by the names of their fields; the first of a group is always today's."""

    names: str
    rows: Sequence[tuple[int, ...]]

    def dicts(self, most: int) -> list[dict[str, int]]:
        """Today's and the first `most`; programs are given in multiples of the processors."""
        return [{}, *(dict(zip(self.names.split(), x, strict=True)) for x in self.rows[:most])]


def on(tile: Mapping[str, int], processors: int) -> dict[str, int]:
    """A tile for a GPU of so many multiprocessors."""
    return {k: v * processors if k == "programs" else v for k, v in tile.items()}


CONTRAST = "rows columns chunk num_warps num_stages programs"
STATISTICS = Tiles(
    CONTRAST,
    (
        (128, 64, 256, 8, 2, 1),
        (128, 64, 64, 8, 3, 2),
        (64, 64, 64, 4, 3, 4),
        (128, 32, 256, 8, 3, 1),
        (64, 64, 256, 4, 2, 2),
        (64, 32, 256, 4, 2, 2),
        (128, 32, 256, 8, 2, 2),
        (64, 64, 256, 4, 2, 1),
        (128, 64, 256, 8, 3, 2),
        (64, 32, 256, 4, 3, 4),
    ),
)
GRADIENT_NAMES = "rows columns chunk slice num_warps num_stages programs max_registers"
GRADIENT = Tiles(
    GRADIENT_NAMES,
    # On an H200 the first six are faster than those that do not spill.
    (
        (128, 64, 256, 256, 8, 2, 1, 255),
        (128, 32, 256, 256, 8, 3, 1, 255),
        (64, 64, 256, 256, 4, 2, 2, 255),
        (64, 128, 256, 256, 8, 2, 1, 255),
        (64, 32, 256, 256, 4, 2, 2, 255),
        (64, 64, 256, 256, 8, 2, 2, 128),
        (64, 64, 256, 256, 8, 2, 1, 255),
        (64, 32, 64, 256, 8, 2, 1, 255),
        (64, 32, 256, 128, 4, 2, 2, 255),
        (128, 64, 64, 128, 8, 2, 1, 255),
    ),
)
WIDE_STATISTICS = Tiles(
    CONTRAST,
    (
        (128, 64, 64, 8, 2, 1),
        (128, 32, 64, 8, 3, 2),
        (64, 64, 128, 4, 3, 2),
        (128, 64, 128, 8, 2, 1),
        (64, 64, 64, 4, 3, 2),
    ),
)
WIDE_GRADIENT = Tiles(
    GRADIENT_NAMES,
    (
        (64, 64, 64, 256, 8, 2, 1, 255),
        (64, 32, 128, 256, 8, 2, 1, 255),
        (64, 64, 64, 128, 8, 2, 1, 255),
        (64, 64, 64, 128, 4, 3, 2, 255),
        (64, 32, 64, 128, 4, 2, 1, 255),
    ),
)
SMALL = Tiles(
    CONTRAST,
    (
        (16, 32, 256, 4, 2, 1),
        (32, 32, 256, 4, 2, 1),
        (16, 16, 256, 2, 1, 1),
        (32, 32, 64, 4, 2, 1),
        (16, 64, 64, 4, 2, 2),
    ),
)
SMALL_GRADIENT = Tiles(
    GRADIENT_NAMES,
    (
        (32, 32, 256, 256, 4, 2, 1, 255),
        (32, 32, 256, 64, 4, 2, 1, 255),
        (16, 32, 64, 128, 4, 2, 1, 255),
        (64, 32, 64, 64, 4, 2, 1, 255),
        (16, 32, 256, 64, 4, 1, 1, 255),
    ),
)
QUEUE = Tiles(
    "rows columns chunk slice num_warps num_stages programs",
    (
        (32, 64, 256, 256, 8, 2, 1),
        (32, 64, 256, 128, 4, 2, 1),
        (64, 64, 64, 256, 8, 2, 1),
        (32, 32, 256, 256, 8, 2, 1),
        (32, 64, 64, 128, 4, 3, 2),
        (64, 32, 64, 256, 8, 3, 1),
        (64, 32, 256, 256, 8, 2, 1),
        (64, 32, 64, 256, 8, 2, 2),
    ),
)
RANKS = {
    "bf16": Tiles(
        CONTRAST,
        (
            (64, 64, 256, 4, 2, 2),
            (64, 64, 64, 4, 3, 2),
            (64, 32, 256, 4, 3, 2),
            (32, 64, 256, 4, 2, 2),
            (64, 128, 256, 8, 2, 1),
            (128, 64, 256, 8, 3, 1),
        ),
    ),
    "fp32": Tiles(
        CONTRAST,
        (
            (64, 64, 16, 8, 2, 2),
            (64, 64, 32, 8, 2, 2),
            (64, 64, 16, 4, 2, 1),
            (32, 64, 16, 4, 2, 2),
            (64, 64, 16, 4, 1, 2),
            (32, 32, 16, 4, 2, 4),
        ),
    ),
}
SAMPLE = Tiles(
    CONTRAST,
    (
        (16, 32, 256, 4, 2, 1),
        (32, 64, 256, 4, 2, 1),
        (16, 128, 256, 4, 2, 1),
        (16, 64, 64, 4, 3, 1),
        (64, 64, 256, 4, 2, 1),
    ),
)
STEPS = "columns num_warps num_stages max_registers"
ATTENTION = {
    "forward": (
        (64, 4, 2, 112),
        (64, 4, 1, 168),
        (64, 4, 1, 128),
        (64, 4, 3, 168),
        (32, 4, 3, 128),
    ),
    "grad_query": (
        (64, 4, 2, 168),
        (64, 4, 1, 128),
        (64, 4, 3, 168),
        (32, 4, 3, 128),
        (64, 4, 1, 112),
    ),
    "grad_key": (
        (64, 4, 1, 255),
        (64, 4, 1, 168),
        (64, 4, 2, 168),
        (32, 4, 1, 168),
        (32, 4, 2, 168),
    ),
}
BIASED = {
    "forward": (
        (32, 4, 2, 128),
        (64, 4, 1, 168),
        (16, 4, 1, 128),
        (32, 4, 1, 112),
        (64, 4, 1, 255),
    ),
    "grad_query": (
        (32, 4, 1, 128),
        (64, 4, 1, 255),
        (64, 4, 1, 168),
        (32, 4, 2, 168),
        (16, 4, 1, 128),
    ),
    "grad_key": (
        (16, 4, 1, 168),
        (32, 4, 1, 168),
        (16, 4, 1, 128),
        (32, 8, 1, 128),
        (16, 8, 1, 128),
    ),
}
CROSS = {
    "forward": (
        (64, 4, 2, 255),
        (64, 4, 4, 255),
        (32, 4, 4, 128),
        (128, 4, 2, 255),
        (64, 4, 3, 128),
    ),
    "saliency": ((64, 4, 2, 255), (32, 4, 3, 128), (128, 4, 2, 255), (64, 8, 2, 128)),
    "grad": ((64, 4, 2, 255), (32, 4, 3, 255), (32, 4, 2, 168), (64, 8, 2, 255), (128, 8, 2, 255)),
    "grad_key": ((32, 4, 2, 255), (64, 4, 2, 255), (32, 4, 3, 168), (16, 4, 3, 128)),
}


@cache
def predicted() -> dict[str, dict[str, float]]:
    """Milliseconds of candidates by group and label, as predicted for an H100."""
    found: dict[str, dict[str, float]] = json.loads(PREDICTED.read_text())["predicted_ms"]
    return found


def plan(processors: int = 132) -> list[Candidate]:
    """All candidates for a GPU of so many multiprocessors, most valuable first.

    Of one group the most promising come first, by predictions for an H100: they cost no time here,
    and where the time does not suffice for all they say what to leave out.
    """
    found: list[Candidate] = []

    def add(op: str, case: str, direction: str, which: str, tiles: Tiles, most: int = 99) -> None:
        given = {"op": op, "case": case, "direction": direction, "which": which}
        group: list[tuple[float, Candidate]] = []
        # Today's tile, then the others by their predictions, those without one last.
        for tile in tiles.dicts(most):
            there = Candidate(tile=on(tile, PREDICTED_PROCESSORS), **given)
            ms = predicted().get(there.group, {}).get(there.label, math.inf) if tile else 0.0
            group.append((ms, Candidate(tile=on(tile, processors), **given)))
        found.extend(x for _, x in sorted(group, key=lambda pair: pair[0]))

    def losses(op: str, case: str, forward: Tiles, backward: Tiles, most: int = 99) -> None:
        prefix = "sigmoid_" * (op == "sigmoid_nce")
        add(op, case, "forward", f"{prefix}forward", forward, most)
        add(op, case, "forward_backward", f"{prefix}backward", backward, most)

    def attention(op: str, case: str, tiles: Mapping[str, Any], *passes: str) -> None:
        for which in passes:
            direction = "forward_backward" if which.startswith("grad") else "forward"
            add(op, case, direction, which, Tiles(STEPS, tiles[which]))

    sparse, cross = "block_sparse_attention", "cross_attention"
    three = ("forward", "grad_query", "grad_key")
    # Beside each case those that take the same tile with more loads, which it must leave room for.
    attention(sparse, "n785-bf16", ATTENTION, *three)
    attention(sparse, "n1569-bf16-saliency", ATTENTION, "forward")
    losses("info_nce", "b4096-d256-bf16", STATISTICS, GRADIENT)
    add("info_nce", "b4096-d256-bf16-ids", "forward_backward", "backward", GRADIENT)
    attention(cross, "n1569-bf16", CROSS, "forward", "grad")
    attention(cross, "n1569-bf16-masked", CROSS, "forward", "grad")
    attention(sparse, "n1569-bf16-bias", BIASED, *three)
    taught = ("queue_info_nce", "b32-q65536-bf16-teacher", "forward_backward", "taught_queue")
    add(*taught, QUEUE)
    losses("info_nce", "b32-d256-bf16", SMALL, SMALL_GRADIENT)
    losses("sigmoid_nce", "b4096-d256-bf16", STATISTICS, GRADIENT, 6)
    add("retrieval_ranks", "n1000-d256-fp32", "forward", "ranks", RANKS["fp32"])
    add("retrieval_ranks", "n1000-d256-bf16", "forward", "ranks", RANKS["bf16"])
    add("sample_hard_negatives", "b32-d256-bf16", "forward", "sample", SAMPLE)
    losses("info_nce", "b16384-d512-bf16", WIDE_STATISTICS, WIDE_GRADIENT)
    add("queue_info_nce", "b32-q65536-bf16", "forward_backward", "queue", QUEUE)
    attention(sparse, "n1569-bf16", ATTENTION, *three)
    attention(cross, "n1569-bf16-cls", CROSS, "saliency")
    attention(cross, "n1569-bf16-words5", CROSS, "forward", "grad")
    attention(cross, "n30-bf16-image", CROSS, "forward", "grad", "grad_key")
    add("info_nce", "b4096-d256-bf16-ids", "forward", "forward_ids", STATISTICS, 6)
    add("sigmoid_nce", "b4096-d256-bf16-ids", "forward", "sigmoid_forward_ids", STATISTICS, 6)
    ids = ("sigmoid_nce", "b4096-d256-bf16-ids", "forward_backward", "sigmoid_backward_ids")
    add(*ids, GRADIENT, 6)
    losses("sigmoid_nce", "b32-d256-bf16", SMALL, SMALL_GRADIENT)
    losses("sigmoid_nce", "b16384-d512-bf16", WIDE_STATISTICS, WIDE_GRADIENT)
    taught = ("queue_info_nce", "b256-q65536-bf16-teacher", "forward_backward", "taught_queue")
    add(*taught, QUEUE, 6)
    add("queue_info_nce", "b256-q65536-bf16", "forward_backward", "queue", QUEUE, 6)
    add("retrieval_ranks", "n4096-d256-bf16", "forward", "ranks", RANKS["bf16"])
    add("retrieval_ranks", "n4096-d256-fp32", "forward", "ranks", RANKS["fp32"])
    add("sample_hard_negatives", "b256-d256-bf16", "forward", "sample", SAMPLE)
    add("sample_hard_negatives", "b1024-d256-bf16", "forward", "sample", SAMPLE)
    add("sample_hard_negatives", "b4096-d256-bf16", "forward", "sample", SAMPLE)
    attention(sparse, "n3137-bf16", ATTENTION, *three)
    return found


def toys() -> list[Candidate]:
    """For the interpreter: beside today's tile a larger one, which needs fewer programs.

    And what would be refused or lost: wrong results, a crash, and a process that hangs.
    """
    large = {"rows": 128, "columns": 128, "programs": 1}
    found = []
    for op, case, direction, which in (
        ("retrieval_ranks", "n1000-d256-fp32", "forward", "ranks"),
        ("block_sparse_attention", "n785-bf16", "forward", "forward"),
        ("info_nce", "b4096-d256-bf16", "forward", "forward"),
        ("sigmoid_nce", "b4096-d256-bf16", "forward_backward", "sigmoid_backward"),
        ("queue_info_nce", "b32-q65536-bf16", "forward_backward", "queue"),
        ("sample_hard_negatives", "b4096-d256-bf16", "forward", "sample"),
        ("cross_attention", "n785-bf16", "forward_backward", "grad_key"),
    ):
        given: dict[str, Any] = {"op": op, "case": case, "direction": direction, "which": which}
        given["fields"] = {"rows": 128, "dim": 32}
        tile = dict(large)
        if op in ("block_sparse_attention", "cross_attention"):
            del tile["programs"]
            given["fields"] = {"queries": 100, "tokens": 101, "block_size": 100, "head_dim": 16}
        elif op == "queue_info_nce":
            given["fields"] = {"rows": 64, "queue": 300}
        found += [Candidate(**given), Candidate(**given, tile=tile)]
    ranks = {"op": "retrieval_ranks", "case": "n1000-d256-fp32", "direction": "forward"}
    ranks |= {"which": "ranks", "fields": {"rows": 128, "dim": 32}}
    wrong = {"rows": 128, "columns": 256, "programs": 1}
    plants = [Candidate(**ranks, tile=wrong, plant=name) for name in ("wrong", "exit", "hang")]
    return found[:2] + plants + found[2:]


def minutes(chosen: Sequence[Candidate], jobs: int) -> float:
    """About how long a run takes, by what one took."""
    kernels, cases = len({x.binary for x in chosen}), len({(x.op, x.case) for x in chosen})
    compiling = kernels * COMPILE_S / jobs
    return (START_S + compiling + cases * CHECK_S + len(chosen) * TIME_S) / 60

"""Predictions of the benchmark's cases, as rows of a table and as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from bench import cases
from bench.measure import floors
from bench.measure.harness import Case, Problem, runner
from bench.predict import cards, older

SCHEMA = 1
OPS = (
    "block_sparse_attention",
    "cross_attention",
    "info_nce",
    "sigmoid_nce",
    "queue_info_nce",
    "token_pruning",
    "retrieval_ranks",
    "sample_hard_negatives",
)
"""Those whose cases our Triton kernels serve."""
HEADER = f"{'case':<24} {'direction':<17} {'ms':>9} {'floor':>9} {'x floor':>8}  bound by"


class Predictor:
    """Predicts for one card; kernels that cases share are compiled once."""

    def __init__(self, card: cards.Card) -> None:
        # What names kernels is imported now, once it is settled which kernels.
        from bench.predict import facts, launches, model, steps
        from svitt_ops.kernels.machine_code import tool

        tool("nvdisasm")
        self.card, self.model = card, model
        self.compiler = facts.Compiler(card.arch)
        self.recorded, self.steps = launches.recorded, steps.steps
        self.opened: tuple[str, str] = ("", "")
        self.problem: Problem | None = None

    def open(self, op: str, case: Case, module: ModuleType) -> Problem:
        """The tensors of a case, in the CPU's memory; those of the last one are kept."""
        if self.problem is None or self.opened != (op, case.name):
            self.problem = None
            self.problem = module.problem(replace(case, device="cpu"))
            self.opened = (op, case.name)
        return self.problem

    def launches(
        self, problem: Problem, direction: Any, tiled: AbstractContextManager[Any] | None = None
    ) -> list[Any]:
        """A prediction for each launch of a call, within which other tiles may be chosen."""
        with self.recorded(self.card.arch) as found, tiled or nullcontext():
            runner(problem.provider("svitt_ops").build(), problem, direction)()
        predicted, moved, begun = [], 0.0, dict[int, float]()
        for launch in found:
            sizes = self.model.unique_bytes(launch)
            # What a launch touched is behind all that it moved itself, too.
            cached = sum(
                size
                for at, size in sizes.items()
                if at in begun and moved - begun[at] <= self.card.l2_bytes / 2
            )
            facts = self.compiler(launch) if launch.source is not None else None
            predicted.append(
                self.model.predict(launch, self.card, cached, facts, self.steps(launch))
            )
            begun |= dict.fromkeys(sizes, moved)
            moved += sum(sizes.values())
        return predicted

    def row(self, op: str, case: Case, direction: Any, module: ModuleType) -> dict[str, Any]:
        """One case in one direction."""
        problem = self.open(op, case, module)
        launches = self.launches(problem, direction)
        flops, moved = problem.flops[direction], problem.bytes[direction]
        floor, limit = floors.floor_ms(flops, moved, self.model.rates(self.card, case.dtype))
        longest = max(launches, key=lambda x: x.us)
        return {
            "op": op,
            "case": case.name,
            "direction": direction,
            "ms": sum(x.us for x in launches) / 1e3,
            "bound": longest.bound,
            "floor_ms": floor,
            "floor_bound": limit,
            "launches": [
                {
                    "kernel": x.name, "us": x.us, "bound": x.bound, "programs": x.programs,
                    "beside": x.beside, "limits_us": x.limits,
                }
                for x in launches
            ],
        }  # fmt: skip


def document(name: str, commit: str, predictor: Predictor) -> dict[str, Any]:
    """What is written of a card, and of a commit's kernels or this tree's, without results yet."""
    import triton

    return {
        "schema": SCHEMA,
        "card": name,
        "kernels": commit,
        "triton": triton.__version__,
        "assumptions": [str(predictor.card), *predictor.model.assumptions()],
        "results": [],
    }


Measured = Mapping[tuple[str, str], float]
"""Milliseconds by case and direction."""


def predict(
    name: str,
    wanted: Iterable[tuple[str, Sequence[Case]]],
    *,
    direction: str = "",
    commit: str = "",
    measured: Measured | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Prints a table of predictions, and writes it where `out` says; returns the document.

    Args:
        name: of the card.
        wanted: cases of a GPU by op.
        direction: of the cases' directions, or all if empty.
        commit: whose kernels; this tree's if empty.
        measured: what to compare with; nothing else is predicted then.
        out: a JSON file.

    Raises:
        ValueError: the card or the commit is unknown, or Triton's interpreter is on.
        FileNotFoundError: there is nothing to disassemble with.
        ModuleNotFoundError: there is no Triton.
    """
    card = cards.card(name)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("TRITON_INTERPRET must not be set, since kernels are compiled")
    import triton  # noqa: F401  said before anything else is

    with older.kernels_of(commit) if commit else nullcontext():
        predictor = Predictor(card)
        written = document(name, commit, predictor)
        print("Predicted, not measured: what compiled kernels and public data of the card say.")
        print("\n".join(f"  {line}" for line in written["assumptions"]))
        for op, chosen in wanted:
            print(f"\n{op}\n{HEADER}")
            try:
                for row in _rows(predictor, op, chosen, direction, measured):
                    written["results"].append(row)
                    print(render(row), flush=True)
                    if out is not None:
                        save(out, written)
            except older.NotThere as error:
                print(f"left out: {error}")
    return written


def _rows(
    predictor: Predictor,
    op: str,
    chosen: Sequence[Case],
    direction: str,
    measured: Measured | None,
) -> Iterator[dict[str, Any]]:
    module = cases.load(op)
    assert module is not None
    for case in chosen:
        for each in case.directions:
            known = measured is None or (case.name, each) in measured
            if direction in ("", each) and known:
                try:
                    row = predictor.row(op, case, each, module)
                except predictor.model.Unpredictable as error:
                    print(f"{case.name:<24} {each.replace('_', ' + '):<17} left out: {error}")
                    continue
                yield row | ({"measured_ms": measured[case.name, each]} if measured else {})


def render(row: dict[str, Any]) -> str:
    """A row in one line, and one for each launch that takes a twentieth or more."""
    lines = [
        f"{row['case']:<24} {row['direction'].replace('_', ' + '):<17} {row['ms']:>9.4f} "
        f"{row['floor_ms']:>9.4f} {row['ms'] / row['floor_ms']:>8.1f}  {row['bound']}"
    ]
    if "measured_ms" in row:
        ratio = row["ms"] / row["measured_ms"]
        lines[0] += f"; measured {row['measured_ms']:.4f}, {ratio:.2f} of that predicted"
    for x in row["launches"]:
        if x["us"] >= 50 * row["ms"]:
            limits = sorted(x["limits_us"].items(), key=lambda pair: -pair[1])[:3]
            said = ", ".join(f"{name} {value:.1f}" for name, value in limits)
            lines.append(
                f"    {x['kernel'].partition('.')[2]:<22} {x['us']:>7.1f} us: {said}; "
                f"{x['programs']} programs, {x['beside']} side by side"
            )
    return "\n".join(lines)


def save(path: Path, document: dict[str, Any]) -> None:
    """Writes a document, a row a line; four digits are more than a prediction holds."""
    fields = []
    for name, value in _rounded(document).items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {json.dumps(x)}" for x in value) + "\n ]"
        elif isinstance(value, dict):
            rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(x)}" for k, x in value.items())
            text = "{\n" + rows + "\n }"
        fields.append(f" {json.dumps(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(fields) + "\n}\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(x) for key, x in value.items()}
    return [_rounded(x) for x in value] if isinstance(value, list) else value

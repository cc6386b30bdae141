"""`python -m bench.predict.rank`: the tuner's candidates, by how long they are predicted to take.

Compiling takes most of a tuner's time on a GPU, and this compiles every candidate: so it runs
beforehand and without a GPU, and `bench.tune.plan` reads the file that it writes. With `--against`
it predicts what a tuner has timed, with the kernels of that commit.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from bench import cases
from bench.measure.harness import Case
from bench.predict import cards, older
from bench.predict.run import Predictor, document, save
from bench.tune import plan

PLANNED = "h100"
"""The card of the plan's predictions."""


@contextmanager
def tiled(which: str, tile: Mapping[str, int]) -> Iterator[None]:
    """Within, launchers get another tile for a pass; of any commit, also before there was a tuner.

    `Override` of the tuner's child stands in for `tiles.tuned`, which is younger.
    """
    kernels = [x for name, x in sys.modules.items() if name.startswith("svitt_ops.kernels.")]
    with ExitStack() as patches:
        for module in kernels:
            for name in ("attention_tile", "cross_tile", "contrast_tile"):
                if choose := getattr(module, name, None):

                    def chosen(asked: str, *args: Any, choose: Any = choose, **kwargs: Any) -> Any:
                        today = choose(asked, *args, **kwargs)
                        return replace(today, **tile) if asked == which else today

                    patches.enter_context(mock.patch.object(module, name, chosen))
        yield


def ranked(
    predictor: Predictor, chosen: Sequence[plan.Candidate]
) -> Iterator[tuple[plan.Candidate, float]]:
    """Candidates with their predicted milliseconds."""
    for candidate in chosen:
        module = cases.load(candidate.op)
        assert module is not None
        case = named(module.cases("cuda"), candidate.case)
        problem = predictor.open(candidate.op, case, module)
        tile = tiled(candidate.which, candidate.tile)
        ms = sum(x.us for x in predictor.launches(problem, candidate.direction, tile)) / 1e3
        print(f"{candidate.group:60} {candidate.label:40} {ms:.4f} ms predicted", flush=True)
        yield candidate, ms


def named(known: Sequence[Case], name: str) -> Case:
    """The case of that name; names once went without bf16."""
    return next(x for x in known if name in (x.name, x.name.replace("-bf16", "")))


def candidate(row: Mapping[str, Any]) -> plan.Candidate:
    """What a row of a tuner's result is of."""
    op, case, direction, which = row["group"].split()
    names = {short: name for name, short in plan.SHORT.items()}
    fields = re.findall(r"([a-z]+)(\d+)", row["label"])
    tile = {names[short]: int(value) for short, value in fields}
    return plan.Candidate(op=op, case=case, direction=direction, which=which, tile=tile)


def main(argv: Sequence[str] | None = None) -> int:
    """Predict the candidates of the plan, or those of a result, and write a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict.rank", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="groups that have this in them")
    parser.add_argument("--against", type=Path, metavar="RESULT.json", help="of a tuner")
    parser.add_argument("--card", default=PLANNED, choices=cards.CARDS, help="of --against")
    parser.add_argument("--out", type=Path, default=plan.PREDICTED)
    arguments = parser.parse_args(argv)
    if arguments.against is None:
        if arguments.card != PLANNED:
            parser.error(f"--card needs --against: the plan's is the {PLANNED}")
        chosen = [x for x in plan.plan() if arguments.only in x.group]
        found = dict(plan.predicted()) if arguments.only else {}
        found |= {x.group: {} for x in chosen}
        for x, ms in ranked(Predictor(cards.card(PLANNED)), chosen):
            found[x.group][x.label] = ms
            save(arguments.out, {"card": PLANNED, "predicted_ms": found})
        return 0
    if arguments.out == plan.PREDICTED:
        parser.error("--against needs --out: it is no plan's")
    timed = json.loads(arguments.against.read_text())
    rows = [x for x in timed["results"] if "ms" in x and arguments.only in x["group"]]
    with older.kernels_of(timed["commit"]) if timed["commit"] else nullcontext():
        predictor = Predictor(cards.card(arguments.card))
        written = document(arguments.card, timed["commit"], predictor) | {"candidates": []}
        of_rows = ranked(predictor, [candidate(x) for x in rows])
        for row, (_, ms) in zip(rows, of_rows, strict=True):
            given = {"group": row["group"], "label": row["label"]}
            written["candidates"].append(given | {"ms": ms, "measured_ms": row["ms"]})
            save(arguments.out, written)
    return 0


if __name__ == "__main__":
    sys.exit(main())

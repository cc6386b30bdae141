"""`python -m bench.predict.rank`: the tuner's candidates, by how long they are predicted to take.

Compiling takes most of a tuner's time on a GPU, and this compiles every candidate: so it runs
beforehand and without a GPU, and `bench.tune.plan` reads the file that it writes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import cases
from bench.predict import cards
from bench.predict.run import Predictor, save
from bench.tune import plan


def ranked(card: cards.Card, chosen: Sequence[plan.Candidate]) -> dict[str, dict[str, float]]:
    """Predicted milliseconds of candidates, by group and label."""
    predictor = Predictor(card)
    from bench.tune.child import Override  # it imports kernels

    found: dict[str, dict[str, float]] = {}
    for candidate in chosen:
        module = cases.load(candidate.op)
        assert module is not None
        case = next(x for x in module.cases("cuda") if x.name == candidate.case)
        problem = predictor.open(candidate.op, case, module)
        launches = predictor.launches(problem, candidate.direction, Override(candidate))
        ms = sum(x.us for x in launches) / 1e3
        found.setdefault(candidate.group, {})[candidate.label] = ms
        print(f"{candidate.group:60} {candidate.label:40} {ms:.4f} ms predicted", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Predict all candidates of the plan and write the file."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict.rank", description=__doc__)
    parser.add_argument("--card", default="h100", choices=cards.CARDS)
    parser.add_argument("--only", default="", metavar="TEXT", help="groups that have this in them")
    parser.add_argument("--out", type=Path, default=plan.PREDICTED)
    arguments = parser.parse_args(argv)
    chosen = [x for x in plan.plan() if arguments.only in x.group]
    document: dict[str, Any] = {"card": arguments.card}
    document["predicted_ms"] = ranked(cards.card(arguments.card), chosen)
    save(arguments.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())

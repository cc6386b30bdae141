"""`python -m bench.ablations simla --seed 0`: demos of a system without some of its parts.

Each is a demo on pictures without reasoning and entailment, which takes minutes; what it measured
is kept beside other demos' results, and `python -m bench.report` writes the table. Those that are
kept are not run again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.report import demo
from bench.report.demo_pictures import VARIANTS
from svitt_ops.training.cli.demo_pictures import run_demo

LEFT_OUT = ("assignment", "reasoning", "entailment")
"""Stages that demos which lack something do not have."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and keep it."""
    parser = argparse.ArgumentParser(prog="python -m bench.ablations", description=__doc__)
    parser.add_argument("system", choices=sorted(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=demo.FOLDER)
    arguments = parser.parse_args(argv)
    for name, overrides in VARIANTS[arguments.system].items():
        stem = f"{arguments.system}-{name}" if name else arguments.system
        if (arguments.out / f"{stem}-seed-{arguments.seed}.json").is_file():
            continue
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "demo"
            run_demo(
                output,
                system=arguments.system,
                seed=arguments.seed,
                overrides=overrides,
                without=LEFT_OUT if name else (),
            )
            demo.main([str(output / "demo.json"), "--out", str(arguments.out)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

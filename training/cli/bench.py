"""`svitt bench` and `svitt tune`: the benchmark of the checkout."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import svitt_ops

NO_BENCH = """\
svitt {command}: runs from a checkout of svitt-ops; bench/ is not part of an installation:

  cd svitt-ops      # a clone, or the unpacked source archive
  {make}

or, there, `svitt {command}` of this environment.
"""
MAKE = {"bench": "make bench BENCH_ARGS=--quick", "tune": "make setup && .venv/bin/svitt tune"}


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the words that follow; the exit status."""
    command = arguments.command
    # An editable install, or a checkout that the command is given in.
    places = (Path(svitt_ops.__file__).parent.parent, Path.cwd())
    checkout = next((x for x in places if (x / "bench" / "__main__.py").is_file()), None)
    if checkout is None:
        print(NO_BENCH.format(command=command, make=MAKE[command]), end="", file=sys.stderr)
        return 2
    sys.path.insert(0, str(checkout))
    module = {"bench": "bench.__main__", "tune": "bench.tune.__main__"}[command]
    program = runpy.run_module(module, run_name=f"svitt_{command}")
    status: int = program["main"](arguments.rest, prog=f"svitt {command}")
    return status

"""`svitt bench`: the benchmark of the checkout."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import svitt_ops

NO_BENCH = """\
svitt bench: runs from a checkout of svitt-ops, whose bench/ folder is not part of an installation:

  cd svitt-ops      # a clone, or the unpacked source archive
  make bench BENCH_ARGS=--quick

or, there, `svitt bench` of this environment.
"""


def run(arguments: argparse.Namespace) -> int:
    """Run it with the words that follow; the exit status."""
    # An editable install, or a checkout that the command is given in.
    places = (Path(svitt_ops.__file__).parent.parent, Path.cwd())
    checkout = next((x for x in places if (x / "bench" / "__main__.py").is_file()), None)
    if checkout is None:
        print(NO_BENCH, end="", file=sys.stderr)
        return 2
    sys.path.insert(0, str(checkout))
    program = runpy.run_module("bench.__main__", run_name="svitt_bench")
    status: int = program["main"](arguments.rest, prog="svitt bench")
    return status

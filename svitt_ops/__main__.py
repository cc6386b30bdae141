"""`python -m svitt_ops info`: needs torch alone. The other commands are those of `svitt --help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import svitt_ops
from svitt_ops.info import collect, render


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m svitt_ops`; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m svitt_ops", description=svitt_ops.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, devices, what was built, what will run")
    info.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())

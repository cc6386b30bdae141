"""`svitt info`: versions, devices, what was built."""

from __future__ import annotations

import argparse
import json

from svitt_ops.info import collect, render


def run(arguments: argparse.Namespace) -> int:
    """Print the facts; the exit status."""
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0

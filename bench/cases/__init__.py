"""What is measured: every module of this folder, under its own name. It has

    cases(device) -> list[Case]         what to measure there, quick ones first
    problem(case) -> Problem            tensors, oracles and providers of one case
    shrunk(case) -> Case                the same at a size that costs nothing, to warm up with
    summary(result) -> str              if wanted, lines below the live table's

The functions' types are those of `bench.measure.harness`.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType

from svitt_ops import OPS


def names() -> list[str]:
    """The ops in their order, then what else is here."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    return [*filter(found.__contains__, OPS), *sorted(found.difference(OPS))]


def load(name: str) -> ModuleType | None:
    """The module of that name; None, said aloud, where a package that it needs is missing."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if name in OPS:
            raise
        print(f"{name} left out: {error}; `make setup` installs what it needs", file=sys.stderr)
        return None

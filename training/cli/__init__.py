"""What each `svitt` command does, a module each, with a function `run`.

Heavy packages are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
from importlib import import_module

from svitt_cli import main

__all__ = ["main", "run"]
MODEL = "model: must be the folder of a model or of a run"


def run(arguments: argparse.Namespace) -> int:
    """Run the command that was parsed; the exit status."""
    status: int = import_module(f"svitt_ops.training.cli.{arguments.command}").run(arguments)
    return status


def at_least(arguments: argparse.Namespace, **least: int) -> None:
    """Refuse options, by name, that are less than these numbers."""
    for name, minimum in least.items():
        value = getattr(arguments, name, None)
        if value is not None and value < minimum:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: must be at least {minimum}, got {value}")


def check_model(path: str, *kinds: str, name: str = "model") -> None:
    """Refuse a path, that of an argument by name, without a whole model of one of these kinds.

    Args:
        path: of the folder.
        kinds: values of `model_type`; none: those of all systems.
        name: of the argument.
    """
    from svitt_ops.models.systems import load_system, system_names
    from svitt_ops.training.engine.checkpoints import model_folder
    from svitt_ops.training.engine.folders import check_folder

    kinds = kinds or tuple(load_system(x).config.model_type for x in system_names())
    check_folder(name, model_folder(path, MODEL.replace("model", name, 1)), kinds)

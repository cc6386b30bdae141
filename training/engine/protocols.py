"""Protocols: what a published number was measured with, a YAML file each, by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One of them."""

    name: str
    task: str
    values: dict[str, Any]
    """By the name of an option of `svitt evaluate`; None is left to the run."""


def shipped_protocols() -> dict[str, Path]:
    """The protocols that come with the package, by name."""
    folder = Path(str(files("svitt_ops.training") / "recipes" / "protocols"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_protocol(name: str) -> Protocol:
    """A protocol by its name; a ValueError if there is none."""
    shipped = shipped_protocols()
    if name not in shipped:
        near = difflib.get_close_matches(name, shipped, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"--protocol: must be one of {', '.join(shipped)}, got {name!r}{hint}")
    values: Any = OmegaConf.to_container(OmegaConf.load(shipped[name]))
    return Protocol(name=name, task=values.pop("task"), values=values)

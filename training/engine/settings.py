"""What a run's recipe says of reading, so that a model is used as it was trained."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from svitt_ops.training.data import RESIZES
from svitt_ops.training.engine.checkpoints import BEST, FINAL, RECIPE

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The keys of a recipe's `data` that evaluation and figures share with training."""

    text_length: int = 32
    """Tokens of the longest text."""
    short_side: int | None = 256
    """Frames are scaled down to this as they are decoded."""
    resize: str = "antialias"
    """How frames become the model's size."""


def run_settings(folder: str | Path) -> RunSettings:
    """The settings that the model in a folder was trained with.

    They stand in `recipe.yaml` beside the weights, or in the run's folder above them. Keys that it
    lacks have their defaults, as have all of a folder without one; a recipe that cannot be used is
    said in a warning.

    Args:
        folder: with the weights, as `checkpoints.model_folder` finds it.
    """
    folder = Path(folder).absolute()
    places = [folder / RECIPE]
    if folder.name in (FINAL, BEST) or re.fullmatch(r"checkpoint-\d+", folder.name):
        places.append(folder.parent / RECIPE)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return RunSettings()
    data, problem = _read_data(path)
    known = {field.name for field in fields(RunSettings)}
    found = {name: value for name, value in data.items() if name in known}
    for name, value in list(found.items()):
        if not _fits(name, value):
            problem = f"data.{name} is {value!r}"
            del found[name]
    if problem:
        log.warning("%s: %s; the default is used instead", path, problem)
    return RunSettings(**found)


def _read_data(path: Path) -> tuple[dict[str, Any], str]:
    """The mapping `data` of a recipe, and why there is none."""
    import yaml

    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        return {}, f"cannot be read as YAML ({str(error).splitlines()[0]})"
    data = content.get("data", {}) if isinstance(content, dict) else None
    return (data, "") if isinstance(data, dict) else ({}, "is no recipe")


def _fits(name: str, value: Any) -> bool:
    """Whether a value is one that `RunSettings` can have."""
    if name == "resize":
        return value in RESIZES
    if name == "short_side" and value is None:
        return True
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

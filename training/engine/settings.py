"""What a run's recipe says of reading, so that a model is used as it was trained."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from svitt_ops.training.data import RESIZES, TEST_SAMPLINGS
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
    test_sampling: str = "middle"
    """Which frames of a video are a clip in evaluation."""


def run_settings(folder: str | Path) -> RunSettings:
    """The settings that the model in a folder was trained with.

    They stand in `recipe.yaml` beside the weights, or in the run's folder above them. Keys that it
    lacks have their defaults, as have all of a folder without one; a recipe that cannot be used is
    said in a warning.

    Args:
        folder: with the weights, as `checkpoints.model_folder` finds it.
    """
    content, path, problem = _read(Path(folder))
    data, problem = _section(content, "data", problem)
    known = {field.name for field in fields(RunSettings)}
    found = {name: value for name, value in data.items() if name in known}
    for name, value in list(found.items()):
        if not _fits(name, value):
            problem = f"data.{name} is {value!r}"
            del found[name]
    if problem:
        log.warning("%s: %s; the default is used instead", path, problem)
    return RunSettings(**found)


def run_values(folder: str | Path, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's `data` and `evaluation` say of some names; a value must be of a default's kind.

    Args:
        folder: as of `run_settings`, which says what it could not read.
        defaults: by name; None stands for a text.
    """
    content, _, problem = _read(Path(folder))
    said: dict[str, Any] = {}
    for section in ("data", "evaluation"):
        said |= _section(content, section, problem)[0]
    kinds = {name: str if value is None else type(value) for name, value in defaults.items()}
    return {name: said[name] for name, kind in kinds.items() if type(said.get(name)) is kind}


def _read(folder: Path) -> tuple[Any, Path | None, str]:
    """The recipe of the model in a folder, its path, and why it cannot be read."""
    import yaml

    folder = folder.absolute()
    places = [folder / RECIPE]
    if folder.name in (FINAL, BEST) or re.fullmatch(r"checkpoint-\d+", folder.name):
        places.append(folder.parent / RECIPE)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return {}, None, ""
    try:
        return yaml.safe_load(path.read_bytes()), path, ""
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        return {}, path, f"cannot be read as YAML ({str(error).splitlines()[0]})"


def _section(content: Any, name: str, problem: str) -> tuple[dict[str, Any], str]:
    """A mapping of a recipe, and why there is none."""
    section = content.get(name, {}) if isinstance(content, dict) else None
    return (section, problem) if isinstance(section, dict) else ({}, "is no recipe")


def _fits(name: str, value: Any) -> bool:
    """Whether a value is one that `RunSettings` can have."""
    if name == "resize":
        return value in RESIZES
    if name == "test_sampling":
        return value in TEST_SAMPLINGS
    if name == "short_side" and value is None:
        return True
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

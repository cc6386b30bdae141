"""How a recipe differs from that which a run was begun with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from svitt_ops.training.engine.recipes import Recipe, load_recipe, recipe_text

log = logging.getLogger(__name__)
ABSENT = "nothing"


def report_changes(stored: Path, recipe: Recipe) -> None:
    """Warn about every key whose value differs from the stored recipe's."""
    if not stored.is_file():
        return
    try:
        before = _flat(_stored(stored))
    except Exception as error:  # of the parser, about a file of which nothing is known
        reason = (str(error).splitlines() or [""])[0]
        log.warning("%s: cannot be read, what changed is not known (%s)", stored, reason)
        return
    after = _flat(OmegaConf.create(recipe_text(recipe)))
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key, ABSENT), after.get(key, ABSENT)
        if old != new and key != "output":  # a folder that was moved, or is named in another way
            log.warning("resuming with a changed recipe: %s: %s -> %s", key, old, new)


def _stored(path: Path) -> Any:
    """With the defaults of keys that are newer than the file, if it has no keys that are gone."""
    try:
        return OmegaConf.create(recipe_text(load_recipe(path)))
    except ValueError:
        return OmegaConf.load(path)


def _flat(content: Any) -> dict[str, Any]:
    """Values by dotted key; an empty list or mapping is a value."""
    if OmegaConf.is_config(content):
        content = OmegaConf.to_container(content)
    found: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            name = f"{prefix}{key}"
            if isinstance(inner, dict | list) and inner:
                walk(inner, f"{name}.")
            else:
                found[name] = inner

    walk(content, "")
    return found

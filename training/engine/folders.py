"""Is there a whole model in a folder, of the right kind? Asked before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svitt_ops.training.data.paths import expand

WHOLE = ("model.safetensors", "pytorch_model.bin")
INDEXES = tuple(f"{name}.index.json" for name in WHOLE)


def check_folder(name: str, source: str | Path, kinds: Sequence[str], advice: str = "") -> None:
    """Refuse, in a line, what holds no whole model of one of these kinds.

    Args:
        name: what the message begins with: the key or the option.
        source: a folder, or the name of a downloaded Hugging Face model.
        kinds: `model_type`s that will do.
        advice: how to get a right one.

    Raises:
        ValueError: says what it must be and what it was.
    """
    wanted = f"{name}: must be a folder with a {' or '.join(kinds)} model, or the name of a"
    wanted += " downloaded one,"
    advice = advice and f"; {advice}"
    folder = _folder(source, name)
    if folder is None:
        reason = "which is not on this machine"
        if expand(source).is_file():
            reason = "which is a file"
        raise ValueError(f"{wanted} got {str(source)!r}, {reason}{advice}")
    got = f"{wanted} got {str(source)!r},"
    kind = _config(folder, got).get("model_type", kinds[0])
    if kind not in kinds:
        raise ValueError(f"{got} which holds a {kind} model{advice}")
    files = _weight_files(folder, got)
    if not files:
        raise ValueError(f"{got} which has a config.json but no weights{advice}")
    for path in files:
        if fault := _fault(path):
            raise ValueError(f"{got} whose {path.name} {fault}{advice}")


def _folder(source: str | Path, name: str) -> Path | None:
    """The folder of a model; that of a downloaded one is in Hugging Face's cache."""
    path = expand(source, name)
    if path.is_dir():
        return path
    if path.exists():
        return None
    from transformers.utils import cached_file

    try:
        found = cached_file(str(source), "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent


def _config(folder: Path, got: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{got} which has no config.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{got} whose config.json cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{got} whose config.json is no configuration")
    return content


def _weight_files(folder: Path, got: str) -> list[Path]:
    for name in WHOLE:
        if (folder / name).is_file():
            return [folder / name]
    for name in INDEXES:
        if (folder / name).is_file():
            try:
                shards = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"]
                return [folder / shard for shard in sorted(set(shards.values()))]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{got} whose {name} cannot be read: {error}") from error
    return []


def _fault(path: Path) -> str | None:
    """Why a file of weights is not whole; of safetensors the header tells."""
    if not path.is_file():
        return "is missing"
    if path.suffix != ".safetensors":
        return None if path.stat().st_size else "is empty"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return f"cannot be read: {error}"

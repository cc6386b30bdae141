"""Checkpoint folders that are whole or not there, whenever the process dies."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svitt_ops.training.paths import expand

PARTIAL = ".partial-"
STATE = "trainer_state.json"
FINAL = "final"


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run, by step."""
    found = []
    for path in output.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / STATE).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def last_checkpoint(output: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint of a run."""
    found = checkpoints(output)
    return found[-1] if found else None


def model_folder(
    path: str | Path, must: str = "checkpoint: must be the folder of a model or of a run"
) -> Path:
    """The folder with the weights: the given one, or in a run's folder the final or last ones."""
    folder = expand(path, must.partition(": must")[0])
    if (folder / "config.json").is_file():
        return folder
    if (folder / FINAL / "config.json").is_file():
        return folder / FINAL
    last = last_checkpoint(folder) if folder.is_dir() else None
    if last is None:
        raise ValueError(f"{must}, got {str(path)!r}")
    return last[1]


def remove_partial(output: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in output.glob(f"{PARTIAL}*"):
        shutil.rmtree(path)


def publish(partial: Path, target: Path) -> None:
    """Give a completely written folder its name, in one step."""
    for path in sorted(partial.rglob("*")):
        _sync(path)
    _sync(partial)
    if target.exists():  # of an earlier run that went further
        old = target.with_name(f"{PARTIAL}old-{target.name}")
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    else:
        partial.rename(target)
    _sync(target.parent)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write to that appears as `target` when the block has ended well."""
    partial = target.with_name(f"{PARTIAL}{target.name}")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    publish(partial, target)


def keep_last(output: Path, count: int) -> None:
    """Delete all checkpoints but the newest ones."""
    for _, path in checkpoints(output)[:-count]:
        doomed = path.with_name(f"{PARTIAL}old-{path.name}")
        path.rename(doomed)  # so that it never looks whole while it is not
        shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

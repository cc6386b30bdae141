"""Checkpoint folders that are whole or not there, whenever the process dies."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from svitt_ops.training.data.paths import expand

PARTIAL = ".partial-"
BROKEN = "broken-"
STATE = "trainer_state.json"
FINAL = "final"
BEST = "best"
"""Folder of the weights with the best score on `data.validation`."""
RECIPE = "recipe.yaml"
NEEDED = (STATE, "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt")
"""Files without which a run does not go on as it would have."""


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run, by step."""
    return [(step, path) for step, path in _numbered(output) if (path / STATE).is_file()]


def newest_whole(output: Path) -> tuple[tuple[int, Path] | None, dict[Path, str]]:
    """The newest checkpoint that a run can go on from, and what is wrong with each newer one.

    Every file of the candidates is read.

    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    broken: dict[Path, str] = {}
    for step, path in reversed(_numbered(output)):
        reason = fault(path)
        if reason is None:
            return (step, path), broken
        broken[path] = reason
    if broken:
        first, reason = next(iter(broken.items()))
        raise ValueError(
            f"{output}: none of its {len(broken)} checkpoints can be resumed ({first.name}:"
            f" {reason}); remove them to train from the start"
        )
    return None, broken


def fault(path: Path) -> str | None:
    """Why a run cannot go on from a checkpoint, in words; None: it can."""
    # Weights beyond the size of one file come with an index.
    names = {f.name.removesuffix(".index.json") for f in path.iterdir()}
    for name in NEEDED:
        if name not in names:
            return f"{name} is missing"
    for file in sorted(path.iterdir()):
        try:
            if file.suffix == ".json":
                content = json.loads(file.read_bytes())
                if file.name == STATE and not isinstance(content.get("global_step"), int):
                    return f"{STATE} names no step"
            elif file.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(file) as archive:
                    if archive.testzip() is not None:
                        return f"{file.name} is damaged"
            elif file.suffix == ".safetensors":
                name_of_bad = _not_finite(file)
                if name_of_bad is not None:
                    return f"{name_of_bad} is not finite"
        except Exception as error:  # of four parsers, about a file of which nothing is known
            return f"{file.name} cannot be read ({_line(error)})"
    return None


def set_aside(paths: Iterable[Path]) -> None:
    """Rename checkpoints that no run goes on from, so that they do not count as newest."""
    for path in paths:
        target = path.with_name(f"{BROKEN}{path.name}")
        if target.exists():
            shutil.rmtree(target)
        path.rename(target)


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
    """Remove what a killed process left half-written; put back what it was about to replace."""
    for name in (FINAL, BEST):
        old = output / f"{PARTIAL}old-{name}"
        if old.exists() and not (output / name).exists():
            old.rename(output / name)
    for path in output.glob(f"{PARTIAL}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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
    with writing(target):
        try:
            partial.mkdir(parents=True)
            yield partial
            publish(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file that holds the old text or the new one, whenever the process dies."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    with writing(path):
        try:
            partial.write_text(text, encoding="utf-8")
            _sync(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what goes wrong while files are written into one line.

    Raises:
        ValueError: names `target` and the reason: no space left, a quota, no permission.
    """
    try:
        yield
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise ValueError(f"{target}: cannot be written: {reason}") from error


def keep_last(output: Path, count: int) -> None:
    """Delete all checkpoints but the newest ones; 0 keeps all."""
    for _, path in checkpoints(output)[:-count]:
        doomed = path.with_name(f"{PARTIAL}old-{path.name}")
        path.rename(doomed)  # so that it never looks whole while it is not
        shutil.rmtree(doomed)


def _numbered(output: Path) -> list[tuple[int, Path]]:
    """Folders that are named as checkpoints, by step, whatever they hold."""
    found = []
    for path in output.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def _not_finite(file: Path) -> str | None:
    """The first tensor of a file that holds NaN or infinity."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
            if not tensors.get_tensor(name).isfinite().all():
                return str(name)
    return None


def _refusal(error: Exception) -> str | None:
    """What the system said to a write that failed; None: the error is of another kind."""
    if isinstance(error, OSError):
        return error.strerror or _line(error)
    if type(error).__name__ == "SafetensorError":
        return _line(error)
    # torch.save writes in C++, whose streams keep no reason.
    if isinstance(error, RuntimeError) and re.search("inline_container|iostream", str(error)):
        return f"the disk is full, or a file too large ({_line(error)})"
    return None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Paths as people write them, checked before any work begins, and files written whole or named.

Wherever a path is taken, `~` and `~user` are home folders, also where no shell has seen them, and
a relative path is relative to the working folder. The environment is asked only where a recipe
says so: `${oc.env:HOME}`.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def expand(path: str | Path, name: str = "path") -> Path:
    """A path with its home folder filled in; a ValueError that names `name` where it cannot be."""
    text = os.fspath(path)
    try:
        if not text or b"\0" in os.fsencode(text):
            raise ValueError
        return Path(text).expanduser()
    except ValueError:  # of a text that no file can be named as, too
        raise ValueError(f"{name}: must be a path, got {text!r}") from None
    except RuntimeError as error:
        raise ValueError(f"{name}: must be a path, got {text!r}: there is no such user") from error


def in_folder(folder: str | Path, suffix: str) -> list[str]:
    """The files of a folder that have a suffix, in order."""
    return [str(path) for path in sorted(Path(folder).iterdir()) if path.suffix.lower() == suffix]


def matching(pattern: str) -> list[str]:
    """What a pattern such as ``{00..99}.tar`` or ``*.tar`` stands for, in order; a file, itself.

    Each once, and all that braces stand for, be it there or not.
    """
    if os.path.exists(pattern):
        return [pattern]
    patterns = [pattern]
    if "{" in pattern:
        from braceexpand import braceexpand  # of webdataset

        patterns = list(braceexpand(pattern))
    found: list[str] = []
    for one in patterns:
        several = sorted(glob.glob(one, recursive=True)) if glob.has_magic(one) else []
        # That which is not there is refused by whoever opens it.
        found += several or ([one] if len(patterns) > 1 or not glob.has_magic(one) else [])
    return list(dict.fromkeys(found))


def input_file(path: str | Path, name: str) -> Path:
    """A file that can be read, or a pipe; refused otherwise."""
    expanded = expand(path, name)
    reason = _reason_against(expanded, os.R_OK)
    if reason:
        raise ValueError(
            f"{name}: must be a file, got {str(path)!r}, which cannot be read: {reason}"
        )
    return expanded


def input_folder(path: str | Path, name: str) -> Path:
    """A folder that can be read; refused otherwise."""
    expanded = expand(path, name)
    reason = _reason_against(expanded, os.R_OK | os.X_OK)
    if reason:
        raise ValueError(f"{name}: must be a folder, got {str(path)!r}: {reason}")
    return expanded


def output_folder(path: str | Path, name: str) -> Path:
    """A folder that can be written to; made where it is missing."""
    expanded = expand(path, name)
    reason = None
    try:
        expanded.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        reason = "there is a file of that name"
    except OSError as error:
        reason = error.strerror
    reason = reason or _reason_against(expanded, os.W_OK | os.X_OK)
    if reason:
        raise ValueError(f"{name}: must be a folder to write to, got {str(path)!r}: {reason}")
    return expanded


def output_file(path: str | Path, name: str) -> Path:
    """A file that can be written; the folder is made where it is missing."""
    expanded = expand(path, name)
    if expanded.is_dir():
        raise ValueError(f"{name}: must be a file to write, got {str(path)!r}: it is a folder")
    if expanded.exists():
        reason = _reason_against(expanded, os.W_OK)
        if reason:
            raise ValueError(f"{name}: must be a file to write, got {str(path)!r}: {reason}")
    else:
        output_folder(expanded.parent, f"{name}: the folder of {str(path)!r}")
    return expanded


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8; an OSError names the file, also that of a full disk."""
    with saving(path):
        # Names of files may hold bytes that are no text.
        Path(path).write_text(text, encoding="utf-8", errors="surrogateescape")


@contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Name the file in an OSError that does not, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _reason_against(path: Path, mode: int) -> str | None:
    """Why a path is not there for this use; that of a folder includes entering it."""
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        return error.strerror or str(error)
    if is_folder != bool(mode & os.X_OK):
        return "it is a folder" if is_folder else "it is no folder"
    return None if os.access(path, mode) else os.strerror(errno.EACCES)

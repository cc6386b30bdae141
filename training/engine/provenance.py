"""What a number was computed from: files by their content, and the code."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

import svitt_ops


def hashes(paths: Iterable[str | Path]) -> dict[str, str]:
    """SHA-256 of files, by path."""
    found = {}
    for path in map(Path, paths):
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        found[str(path)] = digest.hexdigest()
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a model."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def commit() -> str | None:
    """The commit of this code, with `-dirty` if it was changed since; None if it is not known."""
    code = Path(svitt_ops.__file__)
    # A virtual environment may lie in a repository of something else.
    if _git(code, "ls-files", "--error-unmatch", code.name) is None:
        return None
    return _git(code, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(code: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(code.parent), *words], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

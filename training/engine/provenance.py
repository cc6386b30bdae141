"""What a number was computed from: files by their content, and the code."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path

import svitt_ops


def hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of files, by the names they are given."""
    found = {}
    for name, path in files.items():
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        found[name] = digest.hexdigest()
    return found


def weight_files(folder: Path) -> dict[str, Path]:
    """The files with the weights of a model, by their names."""
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    return {path.name: path for path in paths}


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

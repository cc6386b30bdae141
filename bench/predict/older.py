"""The kernels of another commit, under today's model."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest import mock

from bench.measure.environment import REPOSITORY
from svitt_ops import kernels

_OURS = "svitt_ops.kernels."


class NotThere(Exception):
    """A commit has no such kernels."""


@contextmanager
def kernels_of(commit: str) -> Iterator[None]:
    """Within, modules of `svitt_ops.kernels` are imported as they were at a commit.

    Raises:
        ValueError: git does not know it, or it has no kernels.
        RuntimeError: some are imported already.
    """
    from svitt_ops.kernels import machine_code  # noqa: F401  of today, whatever the commit has

    early = [x for x in sys.modules if x.startswith(_OURS) and x != f"{_OURS}machine_code"]
    if early:
        raise RuntimeError(f"{early[0]} is imported already: begin a new process")
    command = ["git", "-C", str(REPOSITORY), "archive", commit, "kernels"]
    packed = subprocess.run(command, capture_output=True)
    if packed.returncode != 0:
        said = packed.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise ValueError(f"--kernels must name a commit with kernels, got {commit!r}: {said}")
    with TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            archive.extractall(folder, filter="data")
        with mock.patch.object(kernels, "__path__", [str(Path(folder) / "kernels")]):
            yield


def module(name: str) -> ModuleType:
    """A module of kernels; `NotThere` where the commit in use has none of that name."""
    # An editable installation would go on to find what `__path__` lacks in this tree.
    if not (Path(kernels.__path__[0]) / f"{name}.py").exists():
        raise NotThere(f"that commit has no kernels/{name}.py")
    return import_module(_OURS + name)

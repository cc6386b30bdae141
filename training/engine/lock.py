"""One process at a time in a run's folder."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from svitt_ops.training.data.paths import output_folder

log = logging.getLogger(__name__)
LOCK = ".lock"
_held: set[int] = set()


@contextmanager
def own_folder(folder: Path, name: str = "recipe: output") -> Iterator[None]:
    """Make a folder, and keep other processes from training, or writing, into it meanwhile.

    The lock is the kernel's (`flock`), so that a process that dies leaves none behind. On NFS
    Linux passes it to the server, unless the folder is mounted with `nolock`; where a file system
    has no locks at all, that is said, and the run goes on without.

    Args:
        folder: of a run.
        name: of the setting that says where it is.

    Raises:
        ValueError: another process has the lock, or the folder cannot be made.
    """
    there = folder.exists()
    handle = -1
    try:
        output_folder(folder, name)
        handle = _locked(folder / LOCK)
    except BlockingIOError as error:
        who = _text(folder / LOCK)
        raise ValueError(
            f"another process{who and f' ({who})'} trains into {folder}; wait for it, or give"
            " another output"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder to write to, got {str(folder)!r} ({error.strerror})"
        ) from error
    try:
        yield
    finally:
        if handle >= 0:
            # While it is held, so that nobody removes the lock of the next.
            with suppress(OSError):
                (folder / LOCK).unlink()
            _held.discard(handle)
            os.close(handle)
        if not there:
            with suppress(OSError):  # a run that never began leaves nothing
                folder.rmdir()


def _locked(path: Path) -> int:
    """An open, locked file of that name; -1 where there are no locks."""
    try:
        import fcntl
    except ModuleNotFoundError:  # not a Unix
        return -1
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed the file between both calls.
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                _held.add(handle)
                return handle
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
            log.warning("%s: the file system has no locks; train into it once at a time", path)
            return -1
        os.close(handle)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:200].strip()
    except OSError:
        return ""


def _close_in_child() -> None:
    """A forked data worker that outlives its parent must not keep the lock."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)

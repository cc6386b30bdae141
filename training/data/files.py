"""Media files as FFmpeg and Pillow get them: regular ones, opened once, read within bounds."""

from __future__ import annotations

import bisect
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from svitt_ops.training.data.places import label, parse

MAX_PIXELS = 2**27
"""Larger pictures are refused: a few bytes of a header may ask for all memory there is."""
MAX_FRAME_PIXELS = 2**26
"""The same for frames of videos, of which a decoder holds many."""
FILMS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".gif")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff")
"""Suffixes by which files are looked for; they are read as what they hold, however called."""
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnusableVideoError(ValueError):
    """A file that no clip can be read from; the message says which and why."""


def printable(text: str) -> str:
    """A file's name or a message as one line that any output can show."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextmanager
def blame(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside becomes an `UnusableVideoError` that begins with the path."""
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        line = printable(f"{label(os.fsdecode(path))}: {reason}")
        raise UnusableVideoError(line) from error


def open_media(name: str | Path) -> MediaFile:
    """The bytes of a file, of a member of an archive, or of a row."""
    path, form, facts = parse(os.fsdecode(name))
    if form == "member":
        return MediaFile(path, span=(facts[1], facts[2]))
    if form == "row":
        from svitt_ops.training.data.rows import read_cell

        return MediaBytes(*read_cell(path, *facts))
    return MediaFile(path if form == "frames" else name)


class MediaFile:
    """An open regular file, or a span of one.

    Names are never taken for addresses, patterns or protocols.
    """

    def __init__(self, path: str | Path, span: tuple[int, int] | None = None) -> None:
        # First: to open a FIFO waits, to open a device may act.
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise UnusableVideoError(f"is {KINDS.get(stat.S_IFMT(mode), 'something')}, not a file")
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        facts = os.fstat(self._descriptor)
        self._start, self.size = span or (0, facts.st_size)
        if not self.size or self._start + self.size > facts.st_size:
            os.close(self._descriptor)
            raise UnusableVideoError("is cut off" if self.size else "is empty")
        self.changed = facts.st_mtime
        # ctime, too: whoever copies times may put another film of the same size in its place.
        changes = facts.st_mtime_ns, facts.st_ctime_ns
        file = (facts.st_dev, facts.st_ino, facts.st_size, *changes)
        self.identity: tuple[int | str, ...] = (*file, self._start, self.size)

    def __enter__(self) -> MediaFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(
            self._descriptor, max(0, min(count, self.size - offset)), self._start + offset
        )


class MediaBytes(MediaFile):
    """The same of bytes in memory, that never change under their identity."""

    def __init__(self, content: bytes, *identity: int | str) -> None:
        if not content:
            raise UnusableVideoError("is empty")
        self._content = content
        self.size = len(content)
        self.changed = 0.0
        self.identity = identity

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, offset: int, count: int) -> bytes:
        return self._content[offset : offset + count]


class Reader:
    """A file object over a `MediaFile`.

    Of holes, spans that hold nothing but payload, it makes zeros without reading them. A reader
    that is asked too often for what the size of the file explains gives up.
    """

    def __init__(self, file: MediaFile, holes: Sequence[tuple[int, int]] = ()) -> None:
        self._file = file
        self._holes = holes
        self._starts = [start for start, _ in holes]
        self._position = 0
        self._calls = 100_000 + file.size // 64

    def read(self, count: int = -1) -> bytes:
        self._calls -= 1
        if self._calls < 0:
            raise UnusableVideoError("is read over and over without an end")
        left = max(0, self._file.size - self._position)
        left = left if count < 0 else min(count, left)
        parts = []
        while left:
            part = self._part(left)
            if not part:
                break
            parts.append(part)
            self._position += len(part)
            left -= len(part)
        return b"".join(parts)

    def _part(self, count: int) -> bytes:
        """Zeros to the end of a hole, or bytes to the begin of the next."""
        position = self._position
        number = bisect.bisect_right(self._starts, position)
        if number and position < self._holes[number - 1][1]:
            return bytes(min(count, self._holes[number - 1][1] - position))
        if number < len(self._starts):
            count = min(count, self._starts[number] - position)
        return self._file.read(position, count)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        self._position = max(0, begin + offset)
        return self._position

    def tell(self) -> int:
        return self._position

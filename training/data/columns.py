"""Corpora of millions of pairs in a few buffers, which forked workers share.

A Python object is written to whenever it is looked at, by its reference count, and what a forked
process writes to becomes its own copy: of a list of pairs, every worker ends up with one. A buffer
is one object, whatever it holds.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from svitt_ops.training.data.annotations import Entry, Kind
from svitt_ops.training.data.places import NUL


class Strings(Sequence[str]):
    """Texts in one buffer of UTF-8, made anew when asked for."""

    def __init__(self, texts: Iterable[str]) -> None:
        data, ends = bytearray(), array("q", [0])
        for text in texts:
            data += text.encode("utf-8", "surrogatepass")  # names of files may hold surrogates
            ends.append(len(data))
        self._data, self._ends = bytes(data), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[str, ...]: ...
    def __getitem__(self, number: int | slice) -> str | tuple[str, ...]:
        if isinstance(number, slice):
            return tuple(self[k] for k in range(*number.indices(len(self))))
        number = range(len(self))[number]
        data = self._data[self._ends[number] : self._ends[number + 1]]
        return data.decode("utf-8", "surrogatepass")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One pair of a training corpus."""

    path: str
    captions: tuple[str, ...]
    kind: Kind
    together: str | None


class Items(Sequence[Item]):
    """The pairs of a corpus: every file of every entry, with the entry's captions."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        files = [len(entry.media) for entry in entries]
        self.entry: NDArray[np.int32] = np.repeat(np.arange(len(files), dtype=np.int32), files)
        self.paths = Strings(path for entry in entries for path in entry.media)
        self.captions = Strings(text for entry in entries for text in entry.captions)
        counts = [len(entry.captions) for entry in entries]
        self.first_caption: NDArray[np.int64] = np.cumsum([0, *counts])
        is_image = np.array([entry.kind == "image" for entry in entries], dtype=bool)
        self.is_image: NDArray[np.bool_] = is_image[self.entry]
        names: dict[str, int] = {}
        bundles = [
            -1 if entry.together is None else names.setdefault(entry.together, len(names))
            for entry in entries
        ]
        self.bundle: NDArray[np.int64] = np.array(bundles, dtype=np.int64)[self.entry]
        """Number of the value that an item is to stay together by; -1: it stands alone."""
        self._names = Strings(names)

    @classmethod
    def of(cls, items: Iterable[Item]) -> Items:
        """The same items, each as an entry of its own."""
        return cls(
            [
                Entry(media=(i.path,), captions=i.captions, kind=i.kind, together=i.together)
                for i in items
            ]
        )

    def __len__(self) -> int:
        return len(self.entry)

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...
    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        if isinstance(number, slice):
            return [self[k] for k in range(*number.indices(len(self)))]
        entry, bundle = self.entry[number], self.bundle[number]
        return Item(
            path=self.paths[number],
            captions=self.captions[self.first_caption[entry] : self.first_caption[entry + 1]],
            kind="image" if self.is_image[number] else "video",
            together=None if bundle < 0 else self._names[bundle],
        )


class FileNames:
    """One name for each file, however its path is spelled.

    Paths are the same file when they lead to the same name in the same folder: `.`, `..`, `//`,
    links to folders, and relative paths make no difference. A file under another name is another
    one, be it a copy or a link: to find out would cost a look at every file of a corpus.
    """

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}

    def __call__(self, path: str) -> str:
        path, nul, inside = path.partition(NUL)
        return f"{self._whole(path)}{nul}{inside}"

    def _whole(self, path: str) -> str:
        folder, name = os.path.split(path)
        if name in ("", ".", ".."):
            return os.path.realpath(path)
        if folder not in self._folders:  # `a/../b` is not `b` where a is a link: ask the system
            self._folders[folder] = os.path.realpath(folder)
        return os.path.join(self._folders[folder], name)

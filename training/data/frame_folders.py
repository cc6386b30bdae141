"""Videos as folders of numbered frames: frame_000001.jpg, frame_000002.jpg, ..."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable

from torch import Tensor

from svitt_ops.training.data.files import PICTURES, MediaFile, UnusableVideoError
from svitt_ops.training.data.pictures import open_pictures


def number_frames(names: Iterable[str]) -> list[str]:
    """Of the names in a folder those of its frames, in the order of their numbers.

    A frame is a picture by its suffix, whose name ends in a number before that. Whatever else lies
    there, and what is hidden, is passed over.

    Raises:
        UnusableVideoError: two frames have one number, or their names begin differently.
    """
    frames: dict[int, str] = {}
    beginnings: dict[str, str] = {}
    for name in sorted(names):
        stem, suffix = os.path.splitext(name)
        numbered = re.fullmatch(r"(.*?)(\d+)", stem, re.DOTALL | re.ASCII)
        if suffix.lower() not in PICTURES or not numbered or name.startswith("."):
            continue
        beginnings.setdefault(numbered[1], name)
        if len(beginnings) > 1:
            first, other = beginnings.values()
            raise UnusableVideoError(f"has frames of several names: {first!r} and {other!r}")
        other = frames.setdefault(int(numbered[2]), name)
        if other != name:
            raise UnusableVideoError(f"has two frames of one number: {other!r} and {name!r}")
    return [frames[number] for number in sorted(frames)]


class FrameFolder:
    """The frames of a folder as those of a film; all must have one size."""

    def __init__(self, folder: str, fps: float | None = None) -> None:
        self._folder = folder
        self._names = number_frames(os.listdir(folder))
        if not self._names:
            raise UnusableVideoError("is a folder, not a file, and has no numbered frames")
        rate = math.nan if fps is None else fps
        self.seconds = [number / rate for number in range(len(self._names))]
        """NaN where the rate is not known."""

    def read(self, positions: set[int], short_side: int | None) -> dict[int, Tensor]:
        """The frames at some positions."""
        found = {position: self._frame(position, short_side) for position in sorted(positions)}
        sizes = {tuple(frame.shape[:0:-1]) for frame in found.values()}
        if len(sizes) > 1:
            shown = " and ".join(f"{width} x {height}" for width, height in sorted(sizes)[:2])
            raise UnusableVideoError(f"has frames of several sizes: {shown}")
        return found

    def _frame(self, position: int, short_side: int | None) -> Tensor:
        name = self._names[position]
        try:
            with MediaFile(os.path.join(self._folder, name)) as file:
                pictures = open_pictures(file)
                if pictures is None:
                    raise UnusableVideoError("is no picture that Pillow reads")
                return pictures.read({0}, short_side)[0]
        except Exception as error:
            raise UnusableVideoError(f"{name}: {error}") from error

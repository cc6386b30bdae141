"""Frames of video and image files: whatever a file is, pictures or an `UnusableVideoError`.

Videos go through PyAV, whose wheel carries FFmpeg; pictures through Pillow, which knows more of
their kinds and reads them to the same values as the rest of this field. The frames of a video are
listed first, where the container allows it without reading its payload, and only the groups of
pictures that hold a wanted frame are decoded. A list, a seek or a time that decoding contradicts
is not believed: what was wanted is then decoded from an earlier key frame, and in the end from the
start of the freshly opened file.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import torch
from av.packet import Packet
from av.video.frame import VideoFrame
from torch import Tensor

from svitt_ops.training.data.decoding import Pass, fit, pixels
from svitt_ops.training.data.files import MediaFile, UnusableVideoError, blame, open_media
from svitt_ops.training.data.frame_folders import FrameFolder
from svitt_ops.training.data.pictures import Pictures, open_pictures
from svitt_ops.training.data.places import parse
from svitt_ops.training.data.timeline import WHOLE, Shown, count_frames, timelines

__all__ = ["Choose", "UnusableVideoError", "read_frames"]

Choose = Callable[[Sequence[float]], Sequence[int]]
INTRA = 1  # FFmpeg's type of a picture that needs no other
FEWEST = 0.5  # of the frames that a container lists: both fields of a frame may be listed
OVERRUN = 256  # packets more than frames, after which a seek has missed


def read_frames(
    path: str | Path, choose: Choose | None = None, *, short_side: int | None = None
) -> Tensor:
    """Decode some frames of a video, or the one frame of an image.

    A frame depends on the file and its position alone, not on which others are read. All have the
    size of the file's first. What stands in for the few frames that are listed but cannot be
    decoded, and which files are refused, is in docs/videos.md.

    Args:
        path: a regular file in any format that FFmpeg or Pillow reads, whatever it is called; a
            folder of numbered frames; or what `places.place` names.
        choose: given the seconds of all frames, the positions wanted, in any order and with
            repetitions; default: all. It is called once. Of a folder, seconds are NaN where
            nothing says how many frames make one.
        short_side: frames whose shorter side is longer than this are scaled down to it.

    Returns:
        uint8 (frames, 3, height, width), RGB; transparency is dropped.

    Raises:
        UnusableVideoError: the file is missing, empty, corrupt or of another kind, has no video,
            holds less than 95% of what it declares, or a frame that was wanted cannot be decoded.
        ValueError: `short_side` is not positive, or `choose` returned no positions or some
            outside of the video.
    """
    if short_side is not None and short_side < 1:
        raise ValueError(f"read_frames: short_side must be at least 1, got {short_side}")
    path = os.fspath(path)
    with _opened(path) as source:
        seconds = source.seconds
        chosen = range(len(seconds)) if choose is None else choose(seconds)
        positions = [_check_position(position, len(seconds)) for position in chosen]
        if not positions:
            raise ValueError("read_frames: choose must return at least one position, got none")
        with blame(path):
            frames = source.read(set(positions), short_side)
            return torch.stack([frames[position] for position in positions])


@contextmanager
def _opened(name: str) -> Iterator[Pictures | Film | FrameFolder]:
    folder, form, facts = parse(os.fsdecode(name))
    if form in ("file", "frames") and os.path.isdir(folder):
        with blame(name):
            frames = FrameFolder(folder, *facts)
        yield frames
        return
    with blame(name):
        file = open_media(name)
    with file:
        with blame(name):
            source = open_pictures(file) or Film(file)
        yield source


def _check_position(position: int, count: int) -> int:
    number = operator.index(position)
    if not -count <= number < count:
        raise ValueError(f"read_frames: choose must return positions below {count}, got {number}")
    return number % count


class Film:
    """The frames of a video file."""

    def __init__(self, file: MediaFile) -> None:
        self._file = file
        self._line = timelines.get(file)
        self.seconds: list[float] = self._line.seconds.tolist()

    def read(self, positions: set[int], short_side: int | None) -> dict[int, Tensor]:
        """The frames at some positions."""
        size = fit(self._line.size, short_side)
        found: dict[int, Tensor] = {}
        left = sorted(positions)
        if self._line.pts is not None:
            left = self._by_time(left, found, size)
        if left:
            self._by_number(left, found, size)
        return found

    def _by_time(
        self, wanted: list[int], found: dict[int, Tensor], size: tuple[int, int]
    ) -> list[int]:
        """Decode the groups of pictures that hold what is wanted; returns what was not found."""
        left: list[int] = []
        with Pass(self._file) as run:
            for key, group in self._groups(wanted):
                if key < 1:  # the first: a fresh file needs no seek
                    done = self._follow(run, group, found, size)
                else:
                    done = any(
                        self._follow(run, group, found, size, key=start)
                        for start in dict.fromkeys((key, key - 1, key // 2))
                        if start
                    )
                if not done:
                    left += group
        if left and self._line.shown is None:
            with Pass(self._file) as run:
                if self._follow(run, left, found, size):
                    return []
        return left

    def _groups(self, wanted: list[int]) -> list[tuple[int, list[int]]]:
        """What is wanted by the number of the key frame to begin from."""
        starts = self._line.keys[:, 0]
        keys = np.searchsorted(starts, self._line.pts[wanted], side="right") - 1
        groups: list[tuple[int, list[int]]] = []
        last = -2
        for position, key in zip(wanted, keys.tolist(), strict=True):
            if groups and key <= last + 1:  # decoding on is cheaper than another seek
                groups[-1][1].append(position)
            else:
                groups.append((key, [position]))
            last = key
        return groups

    def _follow(
        self,
        run: Pass,
        wanted: list[int],
        found: dict[int, Tensor],
        size: tuple[int, int],
        key: int | None = None,
    ) -> bool:
        """Decode on; false as soon as a frame is not the one that the timeline has there."""
        times, packets, position = self._line.pts, None, None
        if key is not None:
            time, target = self._line.keys[key].tolist()
            try:
                run.seek(target)
            except av.FFmpegError:
                return False
            most = wanted[-1] - int(np.searchsorted(times, time)) + OVERRUN
            packets = self._known(run, most)
        taken: dict[int, Tensor] = {}
        among = set(wanted)
        for frame in run.frames(packets):
            if position is None:
                if key is not None and not _begins(frame, run):
                    return False
                position = int(np.searchsorted(times, -(2**63) if frame.pts is None else frame.pts))
            if position >= len(times) or frame.pts != times[position] or frame.is_corrupt:
                return False
            if position in among:
                taken[position] = pixels(frame, size)
            position += 1
            if position > wanted[-1] + self._line.doubt:
                break
        if len(taken) < len(wanted):
            return False
        found.update(taken)
        return True

    def _known(self, run: Pass, most: int) -> Iterator[Packet]:
        """Packets from the first key frame after a seek, as long as they are those listed.

        A seek may land within a packet, as in MPEG program streams: that one is passed over.
        """
        listed, place = self._line.packets, None
        for packet in itertools.islice(run.packets(), most):
            if place is None:
                same = (listed == (packet.pts, packet.size)).all(1)
                if packet.pts not in self._line.keys[:, 0] or not same.any():
                    continue
                place = int(same.argmax())
            if place == len(listed) or (packet.pts, packet.size) != tuple(listed[place]):
                return
            yield packet
            place += 1

    def _by_number(
        self, wanted: list[int], found: dict[int, Tensor], size: tuple[int, int]
    ) -> None:
        """Decode from the start and count: nothing that the container says is believed."""
        shown = self._line.shown = self._line.shown or count_frames(self._file)
        places: dict[int, list[int]] = {}
        for position in wanted:
            places.setdefault(self._stand_in(position, shown), []).append(position)
        with Pass(self._file) as run:
            for number, frame in enumerate(run.frames()):
                if number in places:
                    picture = pixels(frame, size)
                    found.update((position, picture) for position in places.pop(number))
                if not places:
                    return
        raise UnusableVideoError("cannot be decoded the same way twice")

    def _stand_in(self, position: int, shown: Shown) -> int:
        """The number of the frame that decoding shows for a position."""
        count, listed = len(shown.numbers), len(self.seconds)
        if self._line.pts is not None and shown.pts is not None:
            gaps = np.abs(shown.pts - self._line.pts[position])
            nearest = int(gaps.argmin())
            exact = not gaps[nearest]
        else:
            exact = count == listed
            nearest = position if exact else position * (count - 1) // max(1, listed - 1)
        if not exact and count < listed * (WHOLE if shown.damaged else FEWEST):
            raise UnusableVideoError(f"frame {position} of {listed} cannot be decoded")
        return int(shown.numbers[nearest])


def _begins(frame: VideoFrame, run: Pass) -> bool:
    """Whether a frame after a seek needs nothing before it, whatever the container's flag says."""
    return frame.pict_type == INTRA or run.stream.codec_context.codec.intra_only

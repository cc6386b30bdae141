"""Which frames a file shows, and when: listed from its packets, or counted by decoding."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from av.packet import Packet, PktSideDataT
from av.video.stream import VideoStream

from svitt_ops.training.data.decoding import LISTING, Pass
from svitt_ops.training.data.files import MediaFile, UnusableVideoError
from svitt_ops.training.data.payload import UNKNOWN, Spans, declared_size, payload

WHOLE = 0.95  # a file with less of what it declares is cut off
REORDERED = 32  # places that a picture may be decoded before or behind its turn
NO_TIMES = "avi"  # its chunks have numbers: FFmpeg guesses times, and wrongly under B-frames
DECLARES = ("matroska", "flv", "ivf", "mxf")  # their headers say how long they last
PALETTE = "pal8"  # a palette comes once, with the first frame: a seek loses it
NEVER = -(2**63)
# Side data that later packets need.
STATEFUL: tuple[PktSideDataT, ...] = ("palette", "new_extradata", "param_change")


@dataclass(frozen=True)
class Shown:
    """What decoding the whole file shows."""

    numbers: np.ndarray
    """Of the frames without errors among all."""
    pts: np.ndarray | None
    """Their times, ascending; None where some are missing or contradict the order."""
    damaged: bool


@dataclass
class Timeline:
    """The frames of a file in the order in which they are shown."""

    seconds: np.ndarray
    size: tuple[int, int]
    """Width and height of the first frame."""
    pts: np.ndarray | None
    """How the decoder is to name them; None: their numbers alone tell."""
    packets: np.ndarray
    """int64 (packets, 2): their times and sizes in the order of the file."""
    keys: np.ndarray
    """int64 (key frames, 2): their times, ascending, and the times to seek for them."""
    doubt: int
    """Frames to decode past a wanted one before its time is believed."""
    shown: Shown | None
    """Known once the file had to be decoded."""


@dataclass
class _Listing:
    """What the packets say."""

    packets: list[tuple[int, int]] = field(default_factory=list)
    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    keys: list[bool] = field(default_factory=list)
    end: int = 0
    stateful: bool = False

    def add(self, packet: Packet, hidden: bool) -> None:
        self.packets.append((NEVER if packet.pts is None else packet.pts, packet.size))
        self.stateful |= any(packet.has_sidedata(kind) for kind in STATEFUL)
        if hidden or packet.is_discard:  # an edit list hides some
            return
        self.pts.append(packet.pts)
        self.dts.append(packet.dts)
        self.keys.append(packet.is_keyframe)
        if packet.pts is not None:
            self.end = max(self.end, packet.pts + (packet.duration or 0))

    @property
    def reordered(self) -> bool:
        """Whether frames are shown in another order than they are decoded."""
        known = [pts for pts in self.pts if pts is not None]
        return any(a > b for a, b in itertools.pairwise(known))

    def first_key(self) -> float:
        known = (p for p, key in zip(self.pts, self.keys, strict=True) if key and p is not None)
        return min(known, default=math.inf)

    def times(self) -> np.ndarray | None:
        """In order, unless some are missing, double or far from the order of the packets."""
        if not self.pts or None in self.pts:
            return None
        pts = np.array(self.pts, dtype=np.int64)
        order = np.argsort(pts, kind="stable")
        moved = np.abs(order - np.arange(len(order))).max()
        ascending = pts[order]
        return None if moved > REORDERED or (np.diff(ascending) == 0).any() else ascending


def find_timeline(file: MediaFile) -> Timeline:
    """The frames of a video, as its container lists them or else as decoding shows them."""
    with Pass(file) as run:
        first = next(run.frames(), None)
        if first is None:
            raise UnusableVideoError("no frame can be decoded")
        name, context = run.container.format.name, run.stream.codec_context
        reorders = bool(context.has_b_frames)
        rate = _rate(run.stream)
        scale = float(run.stream.time_base or 0)
        listing = _list_packets(file, name)
        _check_whole(file, run, listing)
    times = listing.times()
    pts, doubt, shown = times, 0, None
    if times is not None:
        if reorders != listing.reordered:
            doubt = REORDERED  # where the decoder waits in vain or not at all, these are no times
        elif first.pts is not None and first.pts <= listing.first_key():
            pts = times[times >= first.pts]  # pictures before the first key frame lack references
    if pts is None or not len(pts) or (reorders and name == NO_TIMES):
        shown = count_frames(file)
        if shown.damaged and len(shown.numbers) < WHOLE * len(listing.packets):
            raise UnusableVideoError(
                f"only {len(shown.numbers)} of {len(listing.packets)} frames can be decoded"
            )
        pts = shown.pts
        seconds = np.arange(len(shown.numbers)) / rate if pts is None else pts * scale
    else:
        seconds = pts * scale
    keys: list[tuple[int, int]] = []
    if pts is not None and not listing.stateful and context.pix_fmt != PALETTE:
        both = zip(listing.pts, listing.dts, listing.keys, strict=True)
        by_dts = not name.startswith("mov")  # which seeks to the key frame before that of a dts
        keys = sorted(
            (p, d if by_dts and d is not None else p) for p, d, key in both if key and p is not None
        )
    return Timeline(
        seconds=seconds,
        size=(first.width, first.height),
        pts=pts,
        packets=np.array(listing.packets, dtype=np.int64),
        keys=np.array(keys, dtype=np.int64).reshape(-1, 2),
        doubt=doubt,
        shown=shown,
    )


def count_frames(file: MediaFile) -> Shown:
    """Decode everything, keep nothing but the times."""
    numbers, times = [], []
    with Pass(file) as run:
        for number, frame in enumerate(run.frames()):
            if not frame.is_corrupt:
                numbers.append(number)
                times.append(frame.pts)
        damaged = run.damaged
    if not numbers:
        raise UnusableVideoError("no frame can be decoded")
    known = None not in times and all(a < b for a, b in itertools.pairwise(times))
    pts = np.array(times, dtype=np.int64) if known else None
    return Shown(np.array(numbers, dtype=np.int64), pts, damaged)


def _list_packets(file: MediaFile, container: str) -> _Listing:
    holes = payload(file, container)
    listing = _list(file, holes)
    if holes and None in listing.pts:  # FFmpeg may find out from the payload
        listing = _list(file, [])
    if not listing.packets:
        raise UnusableVideoError("has no frames")
    return listing


def _list(file: MediaFile, holes: Spans) -> _Listing:
    listing = _Listing()
    with Pass(file, holes, **(LISTING if holes else {})) as run:
        vp8 = run.stream.codec_context.name == "vp8"
        for packet in run.packets():
            # VP8 keeps reference pictures in packets of their own.
            listing.add(packet, hidden=vp8 and not memoryview(packet)[0] & 0x10)
    return listing


def _check_whole(file: MediaFile, run: Pass, listing: _Listing) -> None:
    """Refuse a file that holds less than it declares, where its format declares anything."""
    name, stream = run.container.format.name, run.stream
    if name.startswith("mov") and stream.frames:  # an AVI counts empty chunks, others guess
        count, listed = len(listing.packets), min(stream.frames, len(stream.index_entries))
        if count < WHOLE * listed:
            raise UnusableVideoError(f"is cut off, has {count} of {listed} frames")
    elif file.size < WHOLE * (declared := declared_size(file, name)):
        raise UnusableVideoError(f"is cut off, has {file.size} of {declared} bytes")
    elif name.startswith(DECLARES) and (pts := listing.times()) is not None:
        scale = float(stream.time_base or 0)
        # The last frame may last as long as any other, and not say so.
        pause = max(scale * int(np.diff(pts).max(initial=0)), 1 / _rate(stream))
        seconds = scale * listing.end + pause
        known = (stream.duration or 0) < UNKNOWN
        whole = (run.container.duration or 0) / 1e6 * known
        tagged = _tagged(stream.metadata.get("DURATION", ""))
        if seconds < WHOLE * (tagged or whole):
            seconds = max(seconds, _end(file, name))  # where the sound goes on, nothing is missing
            if seconds < WHOLE * whole:
                raise UnusableVideoError(f"is cut off, has {seconds:.1f} of {whole:.1f} seconds")


def _rate(stream: VideoStream) -> float:
    return float(stream.average_rate or stream.guessed_rate or 25)


def _tagged(duration: str) -> float:
    """Seconds of a Matroska tag such as 00:01:02.5."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d*)?)", duration)
    if not match:
        return 0.0
    hours, minutes, seconds = match.groups()
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _end(file: MediaFile, container: str) -> float:
    """When the last packet of any stream ends, in seconds."""
    holes = payload(file, container)
    end = 0.0
    with Pass(file, holes, alone=False, **(LISTING if holes else {})) as run:
        for packet in run.packets():
            if packet.pts is not None:
                last = packet.pts + (packet.duration or 0)
                end = max(end, float(last * (packet.time_base or 0)))
    return end


class Cache:
    """The timelines of the files read last, so that later epochs don't list them again."""

    def __init__(self, frames: int) -> None:
        self._room = frames
        self._known: OrderedDict[tuple[int, ...], Timeline] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, file: MediaFile) -> Timeline:
        timeline = self._known.pop(file.identity, None)
        if timeline is None:
            timeline = find_timeline(file)
            if time.time() - file.changed < 0.1:  # it may change again without looking changed
                return timeline
            self._room -= len(timeline.seconds)
        self._known[file.identity] = timeline
        while self._room < 0 and len(self._known) > 1:
            _, oldest = self._known.popitem(last=False)
            self._room += len(oldest.seconds)
        return timeline


timelines = Cache(frames=1_000_000)

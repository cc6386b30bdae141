"""Frames of video and image files through PyAV, whose wheel carries FFmpeg."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from torch import Tensor

Choose = Callable[[Sequence[float]], Sequence[int]]
WHOLE = 0.95  # a file with fewer of the frames that it declares is cut off


class UnusableVideoError(ValueError):
    """A file that no clip can be read from; the message says which and why."""


@dataclass(frozen=True)
class _Packet:
    pts: int
    dts: int
    keyframe: bool


def read_frames(
    path: str | Path, choose: Choose | None = None, *, short_side: int | None = None
) -> Tensor:
    """Decode some frames of a video, or the one frame of an image.

    The packets are listed first, without decoding. So the number of frames and their times are
    exact, also under a variable frame rate, and only the groups of pictures that hold a wanted
    frame are decoded.

    Args:
        path: a file in any format that FFmpeg reads.
        choose: given the seconds of all frames, the positions wanted, in any order and with
            repetitions; default: all.
        short_side: frames whose shorter side is longer than this are scaled down to it.

    Returns:
        uint8 (frames, 3, height, width), RGB.

    Raises:
        UnusableVideoError: the file is missing, empty or corrupt, has no video, or a frame that
            was wanted cannot be decoded, as in a truncated file.
    """
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            return _read(container, path, choose, short_side)
    except UnusableVideoError:
        raise
    except (av.FFmpegError, OSError, EOFError, MemoryError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnusableVideoError(f"{path}: {reason}") from error


def _read(
    container: av.container.InputContainer,
    path: str | Path,
    choose: Choose | None,
    short_side: int | None,
) -> Tensor:
    stream = next((s for s in container.streams.video if not _is_cover(s)), None)
    if stream is None:
        raise UnusableVideoError(f"{path}: has no video stream")
    stream.codec_context.thread_count = 1  # the loader's workers are the parallelism
    packets, count = _list_packets(container, stream)
    if count < WHOLE * stream.frames:
        raise UnusableVideoError(f"{path}: is cut off, has {count} of {stream.frames} frames")
    if packets is None:
        return _read_through(container, path, stream, choose, short_side)
    if not packets:
        raise UnusableVideoError(f"{path}: has no frames")
    scale = float(stream.time_base or 0)
    order = sorted(p.pts for p in packets)
    positions = list(range(len(order)))
    if choose is not None:
        positions = list(choose([pts * scale for pts in order]))
    wanted = sorted({order[position] for position in positions})
    frames: dict[int, Tensor] = {}
    for seek, group in _groups(packets, wanted):
        container.seek(seek, stream=stream, backward=True)
        missing = set(group)
        for frame in container.decode(stream):
            if frame.pts in missing and not frame.is_corrupt:
                missing.discard(frame.pts)
                frames[frame.pts] = _pixels(frame, short_side)
            if not missing:
                break
        if missing:
            number = order.index(min(missing))
            raise UnusableVideoError(f"{path}: frame {number} of {len(order)} cannot be decoded")
    return torch.stack([frames[order[position]] for position in positions])


def _list_packets(
    container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[list[_Packet] | None, int]:
    """The packets of shown frames, None where the format gives no times; and how many in all."""
    packets: list[_Packet] = []
    count, timed = 0, True
    for packet in container.demux(stream):
        if packet.size == 0:
            continue  # it ends the stream
        count += 1
        if packet.pts is None:
            timed = False
        elif not packet.is_discard:  # an edit list hides some
            dts = packet.pts if packet.dts is None else packet.dts
            packets.append(_Packet(packet.pts, dts, packet.is_keyframe))
    timed = timed and len({packet.pts for packet in packets}) == len(packets)
    return packets if timed else None, count


def _groups(packets: list[_Packet], wanted: list[int]) -> list[tuple[int, list[int]]]:
    """Wanted times by the run of pictures to decode for them, and where to seek for each run."""
    keys = sorted((p for p in packets if p.keyframe), key=lambda p: p.pts)
    starts = np.array([key.pts for key in keys], dtype=np.int64)
    groups: list[tuple[int, list[int]]] = []
    last = -2
    for pts in wanted:
        run = int(np.searchsorted(starts, pts, side="right")) - 1
        if groups and run <= last + 1:  # decoding on is cheaper than another seek
            groups[-1][1].append(pts)
        else:
            # A seek by the key frame's decoding time never lands behind it.
            seek = keys[run].dts if run >= 0 else min(p.dts for p in packets)
            groups.append((seek, [pts]))
        last = run
    return groups


def _read_through(
    container: av.container.InputContainer,
    path: str | Path,
    stream: av.VideoStream,
    choose: Choose | None,
    short_side: int | None,
) -> Tensor:
    """Decode every frame: for formats whose packets carry no times."""
    container.seek(0)
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    pictures = [_pixels(f, short_side) for f in container.decode(stream) if not f.is_corrupt]
    if not pictures:
        raise UnusableVideoError(f"{path}: has no frames")
    positions: Sequence[int] = range(len(pictures))
    if choose is not None:
        positions = choose([number / rate for number in range(len(pictures))])
    return torch.stack([pictures[position] for position in positions])


def _is_cover(stream: av.VideoStream) -> bool:
    """Whether a stream is the cover picture of an audio file."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _pixels(frame: VideoFrame, short_side: int | None) -> Tensor:
    width, height = frame.width, frame.height
    if short_side is not None and min(width, height) > short_side:
        shrink = short_side / min(width, height)
        width, height = round(width * shrink), round(height * shrink)
    picture = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
    turns = round(frame.rotation / 90) % 4  # counter-clockwise, as phones store it
    return torch.from_numpy(np.ascontiguousarray(np.rot90(picture, turns).transpose(2, 0, 1)))

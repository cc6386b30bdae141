"""One pass over the video stream of a file through FFmpeg, by way of PyAV."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import av
import numpy as np
import torch
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from svitt_ops.training.data.files import MAX_FRAME_PIXELS, MediaFile, Reader, UnusableVideoError

SURPLUS = 16  # packets may hold this many times what the file does, as compressed headers do
PATIENCE = 2**31  # pixels of damaged frames
LIMITS = {"max_pixels": str(MAX_FRAME_PIXELS)}
LISTING = {"fflags": "+noparse+nofillin-genpts", "probesize": "32"}  # what the container says alone


class _Source(Reader):
    """Keeps what FFmpeg takes for the end of the file, or a callback from C loses, as Ctrl-C."""

    error: BaseException | None = None

    def read(self, count: int = -1) -> bytes:
        try:
            return super().read(count)
        except BaseException as error:
            self.error = error
            raise OSError from error


class Pass:
    """Packets or frames of a freshly opened file, in the order in which they come.

    What the decoder refuses is noted in `damaged` and passed over.
    """

    def __init__(
        self,
        file: MediaFile,
        holes: Sequence[tuple[int, int]] = (),
        *,
        alone: bool = True,
        **options: str,
    ) -> None:
        """Args:
        file: what is read.
        holes: spans that need not be read, for packets whose content does not matter.
        alone: pass over the packets of other streams.
        options: of FFmpeg's demuxers.
        """
        self.damaged = False
        self._left = SURPLUS * file.size + 2**26
        self._patience = PATIENCE
        self._source = _Source(file, holes)
        with self._reading():
            self.container: InputContainer = av.open(
                self._source,
                metadata_errors="ignore",
                buffer_size=4096,  # what is read in vain behind each header
                # No file that this one names is opened, were it a playlist.
                options={"protocol_whitelist": "none", **LIMITS, **options},
            )
        self.stream = _choose_stream(self.container)
        context = self.stream.codec_context
        context.thread_count = 1  # the loader's workers are the parallelism
        context.options = LIMITS
        if context.width * context.height > MAX_FRAME_PIXELS:
            raise UnusableVideoError(f"has frames of {context.width} x {context.height} pixels")
        self._wanted = [self.stream] if alone else list(self.container.streams)
        for other in self.container.streams:
            if other not in self._wanted:
                other.discard = Discard.all

    def __enter__(self) -> Pass:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def seek(self, time: int) -> None:
        """To a key frame at or before a time in the stream's time base."""
        with self._reading():
            self.container.seek(time, stream=self.stream)

    def packets(self) -> Iterator[Packet]:
        """The packets that hold anything."""
        try:
            with self._reading():
                for packet in self.container.demux(self._wanted):
                    self._left -= packet.size
                    if self._left < 0:
                        raise UnusableVideoError("has packets of more bytes than the file")
                    if packet.size:
                        yield packet
        except av.FFmpegError:
            self.damaged = True

    def frames(self, packets: Iterable[Packet] | None = None) -> Iterator[VideoFrame]:
        """The frames that decoding shows, of all packets or of some."""
        for packet in itertools.chain(self.packets() if packets is None else packets, (None,)):
            try:
                frames = self.stream.decode(packet)
            except av.FFmpegError:
                self._harm()
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self._harm()
                yield frame

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._source.error is not None:
                raise self._source.error

    def _harm(self) -> None:
        """Note a damaged frame; to conceal many large ones would take hours."""
        self.damaged = True
        self._patience -= max(1, self.stream.codec_context.width * self.stream.codec_context.height)
        if self._patience < 0:
            raise UnusableVideoError("is damaged all over")


def _choose_stream(container: InputContainer) -> VideoStream:
    """The first stream of video that is no cover picture of an audio file."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise UnusableVideoError("has no video stream")
    for stream in streams:
        if stream.codec_context is not None:
            return stream
    raise UnusableVideoError("has video in a format that FFmpeg cannot decode here")


def fit(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """Width and height scaled down to a shorter side."""
    width, height = size
    if short_side is None or min(size) <= short_side:
        return size
    shrink = short_side / min(size)
    return round(width * shrink), round(height * shrink)


def pixels(frame: VideoFrame, size: tuple[int, int]) -> Tensor:
    """uint8 (3, height, width) of a frame, scaled to a width and a height, then turned upright."""
    picture = frame.to_ndarray(
        format="rgb24", width=size[0], height=size[1], interpolation="AREA", threads=1
    )
    turns = round(frame.rotation / 90) % 4  # counter-clockwise, as phones store it
    return torch.from_numpy(np.ascontiguousarray(np.rot90(picture, turns).transpose(2, 0, 1)))

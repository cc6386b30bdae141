"""Films whose frames say their number, and how to bend them: for the tests of the reader."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

BITS = 6
RATE = 25
X264 = {"crf": "18", "preset": "veryfast"}
GROUPS = {**X264, "g": "6", "bf": "2"}
QUALITY = {"q": "4", "g": "6"}


def paint(number: int, size: tuple[int, int]) -> np.ndarray:
    """Moving texture and noise under a strip of blocks that spell the number."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = np.sin((x + 5 * number) / 9) + np.cos((y - 3 * number) / 7)
    noise = np.random.default_rng(number).normal(0, 8, (height, width, 3))
    picture = 128 + 50 * waves[..., None] + noise
    for bit in range(BITS):
        block = slice(width * bit // BITS, width * (bit + 1) // BITS)
        picture[: height // 4, block] = 220 if number >> bit & 1 else 30
    return picture.clip(0, 255).astype(np.uint8)


def numbers(frames: Tensor) -> list[int]:
    """Which number each picture spells."""
    strip = frames[:, :, : frames.shape[2] // 5].float().mean((1, 2))
    found = []
    for row in strip:
        blocks = torch.tensor_split(row, [len(row) * k // BITS for k in range(1, BITS)])
        bits = [block[len(block) // 4 : -len(block) // 4].mean().item() > 125 for block in blocks]
        found.append(sum(bit << k for k, bit in enumerate(bits)))
    return found


def film(
    path: Path,
    count: int = 20,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    *,
    size: tuple[int, int] = (320, 240),
    times: Sequence[int] | None = None,
    sound: float = 0,
) -> Path:
    """A video of `paint`; `times` in milliseconds, `sound` in seconds."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=RATE, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        voice: Any = None
        if sound:
            voice = out.add_stream(
                "libopus" if path.suffix == ".webm" else "aac", rate=48000, layout="mono"
            )
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(paint(number, size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if sound:
            silence = np.zeros((1, int(48000 * sound)), dtype=np.float32)
            heard = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            heard.sample_rate = 48000
            out.mux(voice.encode(heard))
            out.mux(voice.encode())
    return path


def remux(source: Path, path: Path, change: Callable[[int, Any], None]) -> Path:
    """The same packets, each after a change."""
    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(p for p in given.demux(video=0) if p.size):
            change(number, packet)
            packet.stream = stream
            out.mux(packet)
    return path

"""`python -m bench.decoding`: 8 frames of 10 seconds of video, as training reads and by torchcodec.

Generated H.264 of 1280 x 720 pixels, 25 frames a second, with a key frame every 250 (x264's
default) or every 12 frames. Of each of 8 equal parts the middle frame is wanted, whole or with a
shorter side of 256 pixels, by one thread, as a worker of the loader has. `first` is the read of a
file that is new to the process, `again` that of one whose list of frames is kept, as in later
epochs; torchcodec keeps none. The readers take turns, and the median counts: of the processor's
seconds, which a busy machine hardly changes.

python -m bench.decoding --out bench/results/decoding/NAME.json
python -m bench.decoding --small                                   seconds: does it work?

torchcodec is no extra of `make setup`: it wants FFmpeg's shared libraries, and its wheel a torch of
the same kind. Where it cannot be loaded, that is said and PyAV is timed alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from bench.measure import environment
from svitt_ops.training.data import timeline
from svitt_ops.training.data.sampling import sample_positions
from svitt_ops.training.data.video import read_frames

Read = Callable[[Path], Tensor]
FRAMES, RATE, WANTED = 250, 25, 8
SIZE, SMALL = (1280, 720), (160, 96)
KEYS = (250, 12)
CODING = {"crf": "23", "preset": "veryfast", "bf": "2", "b_strategy": "0"}  # B-frames everywhere
SHORT_SIDE = 256
TOLERANCE = 6.0
"""Mean difference of frames, of 255, beyond which they are others: scaling is not the same."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status: 1 where the readers find other frames."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.decoding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="tiny pictures, to see that it works")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    size, small = (SMALL, " --small") if arguments.small else (SIZE, "")
    version, problem = torchcodec_version()
    if problem:
        print(f"torchcodec cannot be loaded here: {problem}")
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for keys in KEYS:
            path = write_film(Path(folder) / f"{keys}.mp4", size, keys)
            for short_side in (None, min(size) * SHORT_SIDE // SIZE[1]):
                reads = readers(short_side, size, torchcodec=not problem)
                wrong = gate(reads, path)
                if wrong:
                    print(f"not timed: {wrong}")
                    return 1
                seconds = measure(reads, path, arguments.rounds)
                results.append({"keys": keys, "short_side": short_side, "seconds": seconds})
                times = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in seconds.items())
                print(f"key frame every {keys}, shorter side {short_side or min(size)}: {times}")
    if arguments.out is not None:
        document = {
            "command": f"python -m bench.decoding --rounds {arguments.rounds}{small}",
            "environment": environment.describe(torch.device("cpu")),
            "av": av.__version__,
            "torchcodec": version,
            "size": size,
            "results": results,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def torchcodec_version() -> tuple[str | None, str]:
    """Its version, or why there is none."""
    try:
        import torchcodec

        return torchcodec.__version__, ""
    except Exception as error:  # it explains itself over many lines
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return None, lines[0] if lines else type(error).__name__


def write_film(path: Path, size: tuple[int, int], keys: int) -> Path:
    """Waves that move, under noise."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    grain = np.random.default_rng(0).normal(0, 2, (height, width, 3))
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"g": str(keys), **CODING})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(FRAMES):
            waves = 50 * (np.sin((x + 4 * number) / 40) + np.cos((y - 3 * number) / 25))
            picture = 128 + waves[..., None] + np.roll(grain, 7 * number, 1)
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), "rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def readers(short_side: int | None, size: tuple[int, int], *, torchcodec: bool) -> dict[str, Read]:
    """Ways to read a clip, uint8 ``(8, 3, height, width)``."""

    def choose(times: Sequence[float]) -> list[int]:
        return sample_positions(times, WANTED, "middle")

    def again(path: Path) -> Tensor:
        return read_frames(path, choose, short_side=short_side)

    def first(path: Path) -> Tensor:
        timeline.timelines._known.clear()
        return again(path)

    found: dict[str, Read] = {"pyav, first": first, "pyav, again": again}
    if torchcodec:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import Resize

        scaled: dict[str, Any] = {}
        if short_side is not None:
            width, height = size
            scaled["transforms"] = [Resize((short_side, round(width * short_side / height)))]

        def decode(seek_mode: str, path: Path) -> Tensor:
            decoder = VideoDecoder(path, seek_mode=seek_mode, num_ffmpeg_threads=1, **scaled)
            frames: Tensor = decoder.get_frames_at(choose(range(len(decoder)))).data
            return frames

        found |= {f"torchcodec, {mode}": partial(decode, mode) for mode in ("exact", "approximate")}
    return found


def gate(reads: dict[str, Read], path: Path) -> str:
    """What is wrong with what the readers find."""
    wanted, *others = ((name, read(path).float()) for name, read in reads.items())
    for name, found in others:
        if found.shape != wanted[1].shape:
            return f"{name}: frames {tuple(found.shape)}, of {wanted[0]} {tuple(wanted[1].shape)}"
        apart = float((found - wanted[1]).abs().mean())
        if not apart <= TOLERANCE:
            return f"{name}: frames are {apart:.1f} of 255 from those of {wanted[0]}"
    return ""


def measure(reads: dict[str, Read], path: Path, rounds: int) -> dict[str, float]:
    """Median seconds of the processor, of each."""
    taken: dict[str, list[float]] = {name: [] for name in reads}
    for _ in range(rounds):
        for name, read in reads.items():
            start = time.process_time()
            read(path)
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    raise SystemExit(main())

"""Read mutated files: none may end the process, take over 10 seconds or raise anything odd.

    python tests/training/data/fuzz.py --count 2000

The files are small ones of many formats, flipped, cut and spliced by a seed, so that number k is
the same file everywhere. They are read in a process of their own, whose time is that of the
processor: how busy the machine is does not matter.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

SECONDS = 10  # of the processor, for one file
SILENCE = 300  # seconds of the clock, after which a process that uses no processor hangs
MEMORY = 2**30  # bytes that reading may take more than at the start
DATA = Path(__file__).resolve().parents[2] / "data"
# Name, encoder, its pixel format, options of the encoder, of the container.
FILMS: list[tuple[str, str, str, dict[str, str], dict[str, str]]] = [
    ("h264.mp4", "libx264", "yuv420p", {"g": "5", "bf": "2"}, {}),
    ("faststart.mov", "libx264", "yuv420p", {}, {"movflags": "faststart"}),
    ("fragments.mp4", "libx264", "yuv420p", {"g": "4"}, {"movflags": "frag_keyframe+empty_moov"}),
    ("h264.mkv", "libx264", "yuv420p", {"g": "5"}, {}),
    ("h264.ts", "libx264", "yuv420p", {"g": "5"}, {}),
    ("h264.flv", "libx264", "yuv420p", {"g": "5"}, {}),
    ("h264.avi", "libx264", "yuv420p", {"g": "5"}, {}),
    ("raw.h264", "libx264", "yuv420p", {"g": "5"}, {}),
    ("hevc.mp4", "libx265", "yuv420p", {"x265-params": "log-level=none:keyint=5"}, {}),
    ("vp8.webm", "libvpx", "yuv420p", {"g": "5"}, {}),
    ("vp9.webm", "libvpx-vp9", "yuv420p", {"g": "5", "cpu-used": "8"}, {}),
    ("mpeg4.avi", "mpeg4", "yuv420p", {"g": "5", "bf": "2"}, {}),
    ("mpeg4.mp4", "mpeg4", "yuv420p", {"g": "5"}, {}),
    ("mpeg2.mpg", "mpeg2video", "yuv420p", {"g": "5", "bf": "2"}, {}),
    ("mpeg2.ts", "mpeg2video", "yuv420p", {"g": "5"}, {}),
    ("mpeg1.m1v", "mpeg1video", "yuv420p", {"g": "5"}, {}),
    ("wmv2.wmv", "wmv2", "yuv420p", {"g": "5"}, {}),
    ("motion.avi", "mjpeg", "yuvj420p", {}, {}),
    ("motion.mjpeg", "mjpeg", "yuvj420p", {}, {}),
    ("raw.avi", "rawvideo", "bgr24", {}, {}),
    ("rle.mov", "qtrle", "rgb24", {}, {}),
    ("moving.gif", "gif", "rgb8", {}, {}),
    ("moving.apng", "apng", "rgb24", {}, {}),
    ("ffv1.mkv", "ffv1", "yuv420p", {}, {}),
]
PICTURES = ("jpg", "png", "webp", "bmp", "tiff", "ppm", "jp2", "avif", "tga")


def paint(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A picture of texture and noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.sin((x + 3 * number) / 5) + np.cos((y - 2 * number) / 4)
    noise = np.random.default_rng(number).normal(0, 12, (height, width, 3))
    return (128 + 50 * waves[..., None] + noise).clip(0, 255).astype(np.uint8)


def make_seeds(folder: Path) -> list[bytes]:
    """The contents of the files before they are mutated."""
    for name, codec, pixels, options, container in FILMS:
        with av.open(str(folder / name), "w", options=container) as out:
            stream = out.add_stream(codec, rate=25, options=options)
            stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
            for number in range(12):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(paint(number), format="rgb24")))
            out.mux(stream.encode())
    for kind in PICTURES:
        Image.fromarray(paint(0)).save(folder / f"picture.{kind}")
    made = [folder / name for name, *_ in FILMS] + [folder / f"picture.{k}" for k in PICTURES]
    kept = sorted(path for path in DATA.iterdir() if path.suffix not in (".md", ".sh", ".py"))
    return [path.read_bytes() for path in (*made, *kept)]


def mutate(seeds: list[bytes], number: int) -> bytes:
    """File number so and so."""
    rng = random.Random(number)
    content = bytearray(seeds[number % len(seeds)])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Half of all changes go into the head, where sizes and counts stand.
        place = rng.randrange(max(1, min(len(content), rng.choice((600, len(content))))))
        change = rng.randrange(7)
        if change == 0:
            for _ in range(rng.choice((1, 8, 64))):
                content[rng.randrange(len(content) or 1) if place else 0] ^= 1 << rng.randrange(8)
        elif change == 1:
            content[place : place + 1] = rng.randbytes(1)
        elif change == 2:
            value = rng.choice((0, 1, 2**7, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1))
            content[place : place + 4] = value.to_bytes(4, rng.choice(("big", "little")))
        elif change == 3:
            del content[place:]
        elif change == 4:
            del content[place : place + rng.choice((1, 16, 1000))]
        elif change == 5:
            other = rng.choice(seeds)
            start = rng.randrange(len(other))
            content[place : place + rng.choice((0, 64, len(content)))] = other[start:]
        else:
            end = place + rng.choice((4, 100, 4000))
            content[place:place] = content[place:end] * rng.choice((1, 3, 50))
        content = content or bytearray(b"\0")
    return bytes(content)


def work(folder: Path) -> None:
    """Read the files whose numbers come in; say what happened to each."""
    from svitt_ops.training.data.video import UnusableVideoError, read_frames

    seeds = [path.read_bytes() for path in sorted(folder.glob("seed-*"))]
    path = folder / "mutated"
    for line in sys.stdin:
        number = int(line)
        path.write_bytes(mutate(seeds, number))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = int(usage.ru_utime + usage.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS + 1, resource.RLIM_INFINITY))
        before = usage.ru_maxrss
        position = number // len(seeds)
        choose = None if number % 3 == 0 else (lambda times: [position % len(times)])  # noqa: B023
        try:
            frames = read_frames(path, choose, short_side=32)
            fine = frames.ndim == 4 and frames.shape[1] == 3 and len(frames) > 0
            outcome = "read" if fine else f"raised a tensor of {tuple(frames.shape)}"
        except UnusableVideoError as error:
            outcome = f"refused: {str(error).removeprefix(f'{path}: ')}"
            if not str(error).startswith(f"{path}: ") or "\n" in str(error):
                outcome = f"raised an error that is no line: {error}"
        except BaseException as error:
            outcome = f"raised {type(error).__name__}: {error}".replace("\n", " ")
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if taken * 1024 > MEMORY:
            outcome = f"raised memory by {taken // 1024} MB"
        print(outcome, flush=True)


def outcomes(count: int, first: int, folder: Path) -> Iterator[tuple[int, str]]:
    """What happened to each file."""
    command = [sys.executable, __file__, "--worker", str(folder)]
    worker: subprocess.Popen[str] | None = None
    for number in range(first, first + count):
        if worker is None:
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(f"{number}\n")
        worker.stdin.flush()
        ready, _, _ = select.select([worker.stdout], [], [], SILENCE)
        outcome = worker.stdout.readline().strip() if ready else ""
        if not outcome:
            worker.kill()
            code = worker.wait()
            slow = not ready or code == -signal.SIGXCPU
            outcome = "slow" if slow else f"crashed with {code}"
            worker = None
        yield number, outcome
    if worker is not None and worker.stdin is not None:
        worker.stdin.close()
        worker.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--keep", type=Path, help="write file --first here, read nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = make_seeds(folder)
        if arguments.keep:
            arguments.keep.write_bytes(mutate(seeds, arguments.first))
            return 0
        for number, content in enumerate(seeds):
            (folder / f"seed-{number:03}").write_bytes(content)
        tally: Counter[str] = Counter()
        bad = 0
        for number, outcome in outcomes(arguments.count, arguments.first, folder):
            tally[re.sub(r"\d+(\.\d+)?", "N", outcome)] += 1
            if not outcome.startswith(("read", "refused")):
                bad += 1
                print(f"file {number}: {outcome}")
    for outcome, count in tally.most_common():
        print(f"{count:6}  {outcome}")
    print(f"{arguments.count} files of {len(seeds)} kinds, {bad} that must not be")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""What reading costs: bytes, frames decoded and memory by what was asked for, not by the file."""

import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from films import GROUPS, QUALITY, RATE, X264, film, numbers

from svitt_ops.training.data import timeline
from svitt_ops.training.data.decoding import Pass
from svitt_ops.training.data.files import MediaFile
from svitt_ops.training.data.video import read_frames


def bytes_read(monkeypatch: pytest.MonkeyPatch, path: Path, positions: list[int]) -> int:
    total = 0
    plain = MediaFile.read

    def read(self: MediaFile, offset: int, count: int) -> bytes:
        nonlocal total
        content = plain(self, offset, count)
        total += len(content)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(MediaFile, "read", read)
        assert numbers(read_frames(path, lambda times: positions)) == [p % 64 for p in positions]
    return total


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm", "fragments.mp4"])
def test_reads_about_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    codec = "libvpx" if name == "a.webm" else "libx264"
    flags = {"movflags": "frag_keyframe+empty_moov"} if name == "fragments.mp4" else {}
    options = {**X264, "g": "10", "b": "4M"}
    path = film(tmp_path / name, 200, codec, options=options, container=flags)
    old = path.stat().st_mtime - 60
    os.utime(path, (old, old))  # one that still changes is not remembered
    size = path.stat().st_size
    first, later = (bytes_read(monkeypatch, path, [55, 142]) for _ in range(2))
    assert first < size * (0.6 if name == "fragments.mp4" else 0.3)  # each has a head of its own
    assert later < size / 3


SEEKS = {
    "a.mp4": ("libx264", {**X264, "g": "10", "bf": "2"}, 12),  # from the key frame itself
    "a.ts": ("libx264", {**X264, "g": "10", "bf": "2"}, 60),
    "a.vob": ("mpeg2video", {"q": "4", "g": "10", "bf": "2"}, 60),  # a seek lands within a picture
}


@pytest.mark.parametrize("name", SEEKS)
def test_decodes_about_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    codec, options, most = SEEKS[name]
    path = film(tmp_path / name, 120, codec, options=options)
    os.utime(path, (0, 0))  # one that still changes is not remembered
    read_frames(path, lambda times: [0])
    decoded = 0
    plain = Pass.frames

    def frames(self: Pass, *packets: Any) -> Iterator[av.VideoFrame]:
        nonlocal decoded
        for frame in plain(self, *packets):
            decoded += 1
            yield frame

    monkeypatch.setattr(Pass, "frames", frames)
    found = read_frames(path, lambda times: [62, 105])
    assert numbers(found) == [62, 105 % 64]
    assert decoded < most


def test_a_file_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "a.ts", 20, options=GROUPS, size=(96, 72))
    os.utime(path, (0, 0))
    everything = read_frames(path)
    monkeypatch.setattr(timeline, "find_timeline", None)
    for position in (3, 19):
        assert torch.equal(
            read_frames(path, lambda times, p=position: [p])[0], everything[position]
        )


def test_the_cache_of_lists_is_bounded(tmp_path: Path) -> None:
    cache = timeline.Cache(frames=50)
    for number in range(5):
        path = film(tmp_path / f"{number}.mp4", 20, options=X264, size=(96, 72))
        os.utime(path, (0, 0))
        with MediaFile(path) as file:
            assert cache.get(file) is cache.get(file)
    assert len(cache) == 2


def test_a_file_that_changes_is_listed_again(tmp_path: Path) -> None:
    path = film(tmp_path / "a.avi", 20, "mpeg4", options=QUALITY, size=(96, 72))
    assert len(read_frames(path, lambda times: range(len(times)))) == 20
    film(path, 12, "mpeg4", options=QUALITY, size=(96, 72))
    assert len(read_frames(path, lambda times: range(len(times)))) == 12


def test_another_film_of_the_same_size_and_time(tmp_path: Path) -> None:
    path = film(tmp_path / "a.avi", 20, "rawvideo", "bgr24", size=(96, 72))
    other = film(tmp_path / "b.avi", 20, "rawvideo", "bgr24", size=(72, 96)).read_bytes()
    assert len(other) == path.stat().st_size
    os.utime(path, (0, 0))
    assert read_frames(path).shape == (20, 3, 72, 96)
    path.write_bytes(other)  # as those do that synchronise in place
    os.utime(path, (0, 0))
    assert read_frames(path).shape == (20, 3, 96, 72)


MEMORY = """
import resource, sys
from svitt_ops.training.data.video import read_frames
read_frames(sys.argv[1], lambda times: [0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    frames = read_frames(path, lambda times: [len(times) // 3, len(times) // 2])
    assert frames.shape == (2, 3, 72, 96)
    print(path, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.timeout(900)  # the machine may be busy
def test_memory_of_two_frames_of_a_long_film(tmp_path: Path) -> None:
    """20 minutes at 25 a second would be 620 MB of pictures."""
    short = film(tmp_path / "short.avi", 250, "mpeg4", options={"g": "50"}, size=(96, 72))
    paths = [tmp_path / f"long.{suffix}" for suffix in ("mp4", "mkv", "avi", "ts", "mpg", "m2v")]
    other = film(tmp_path / "other.ts", 250, "mpeg2video", options={"g": "50"}, size=(96, 72))
    for path in paths:
        source = other if path.suffix in (".ts", ".mpg", ".m2v") else short
        with av.open(str(path), "w") as out:
            with av.open(str(source)) as given:
                stream = out.add_stream_from_template(given.streams.video[0])
                packets = [(bytes(p), p.is_keyframe) for p in given.demux(video=0) if p.size]
            for number in range(120 * len(packets)):
                content, key = packets[number % len(packets)]
                packet = av.Packet(content)
                packet.pts = packet.dts = number
                packet.time_base, packet.is_keyframe = Fraction(1, RATE), key
                packet.stream = stream
                out.mux(packet)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(short), *map(str, paths)],
        check=True,
        capture_output=True,
        text=True,
    )
    taken = {Path(name).suffix: int(mb) for name, mb in map(str.split, done.stdout.splitlines())}
    assert len(taken) == len(paths)
    assert max(taken.values()) < 150, taken

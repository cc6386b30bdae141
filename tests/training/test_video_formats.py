"""Every kind of video file: each frame read alone is that of reading all, whatever lies."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from svitt_ops.training import timeline
from svitt_ops.training.decoding import Pass
from svitt_ops.training.files import MediaFile
from svitt_ops.training.video import UnusableVideoError, read_frames

DATA = Path(__file__).parents[1] / "data"
BITS = 6
RATE = 25


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


def check(path: Path, expected: Sequence[int] | None = None) -> Tensor:
    """All frames, each of which was read alone, too."""
    everything = read_frames(path)
    if expected is not None:
        assert numbers(everything) == list(expected)
    for position in range(len(everything)):
        alone = read_frames(path, lambda times, p=position: [p])
        assert torch.equal(alone[0], everything[position]), position
    return everything


X264 = {"crf": "18", "preset": "veryfast"}
GROUPS = {**X264, "g": "6", "bf": "2"}
REFRESH = {**X264, "x264-params": "intra-refresh=1:keyint=6:bframes=0"}
OPEN = {**X264, "x264-params": "open-gop=1:keyint=6:bframes=2"}
HEVC = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=6:bframes=2"}
VP8 = {"deadline": "realtime", "cpu-used": "8", "b": "2M", "g": "8"}
VP9 = {"cpu-used": "8", "deadline": "realtime", "b": "2M", "g": "8"}
QUALITY = {"q": "4", "g": "6"}
REORDERED = {**QUALITY, "bf": "2"}
FORMATS: dict[str, tuple[str, str, dict[str, str]]] = {
    **{f"h264.{x}": ("libx264", "yuv420p", GROUPS) for x in ("mp4", "mkv", "ts", "flv", "avi")},
    **{f"refresh.{x}": ("libx264", "yuv420p", REFRESH) for x in ("mp4", "mkv", "ts")},
    **{f"open.{x}": ("libx264", "yuv420p", OPEN) for x in ("mov", "ts")},
    "one_group.mp4": ("libx264", "yuv420p", X264),
    "lossless.mp4": ("libx264rgb", "rgb24", {"qp": "0", "preset": "ultrafast", "g": "6"}),
    "raw.h264": ("libx264", "yuv420p", GROUPS),
    **{f"hevc.{x}": ("libx265", "yuv420p", HEVC) for x in ("mp4", "mkv", "ts", "hevc")},
    **{f"vp8.{x}": ("libvpx", "yuv420p", VP8) for x in ("webm", "ivf")},
    **{f"vp9.{x}": ("libvpx-vp9", "yuv420p", VP9) for x in ("webm", "mp4")},
    "av1.mp4": ("libsvtav1", "yuv420p", {"preset": "12", "crf": "30", "g": "8"}),
    "av1.webm": ("libsvtav1", "yuv420p", {"preset": "12", "crf": "30", "g": "8"}),
    **{f"mpeg4.{x}": ("mpeg4", "yuv420p", REORDERED) for x in ("avi", "mp4", "mkv", "mov")},
    "mpeg4.m4v": ("mpeg4", "yuv420p", QUALITY),
    **{f"mpeg2.{x}": ("mpeg2video", "yuv420p", REORDERED) for x in ("mpg", "vob", "ts", "m2v")},
    "mpeg1.mpg": ("mpeg1video", "yuv420p", REORDERED),
    "msmpeg4.avi": ("msmpeg4v2", "yuv420p", QUALITY),
    "wmv2.wmv": ("wmv2", "yuv420p", QUALITY),
    "sorenson.flv": ("flv", "yuv420p", QUALITY),
    "h263.3gp": ("h263", "yuv420p", QUALITY),
    **{f"mjpeg.{x}": ("mjpeg", "yuvj420p", {"q": "4"}) for x in ("avi", "mov", "mjpeg", "mkv")},
    "screen.flv": ("flashsv", "bgr24", {"g": "6"}),
    "raw.avi": ("rawvideo", "bgr24", {}),
    "palette.avi": ("rawvideo", "pal8", {}),
    "raw.nut": ("rawvideo", "yuv420p", {}),
    "rle.avi": ("msrle", "pal8", {"g": "6"}),
    "rle.mov": ("qtrle", "rgb24", {"g": "6"}),
    "video1.avi": ("msvideo1", "rgb555le", {"g": "6"}),
    "zmbv.avi": ("zmbv", "bgr0", {"g": "6"}),
    "svq1.mov": ("svq1", "yuv410p", {"g": "6"}),
    "huffyuv.avi": ("huffyuv", "yuv422p", {}),
    "ffv1.mkv": ("ffv1", "yuv420p", {"g": "6"}),
    "prores.mov": ("prores", "yuv422p10le", {}),
    "png.mov": ("png", "rgb24", {}),
    "moving.gif": ("gif", "rgb8", {}),
    "moving.apng": ("apng", "rgb24", {}),
    "moving.webp": ("libwebp_anim", "bgra", {"quality": "80"}),
    "yuv.y4m": ("wrapped_avframe", "yuv420p", {}),
}


def palette_frames(count: int, size: tuple[int, int]) -> Iterator[av.VideoFrame]:
    for number in range(count):
        grey = paint(number, size).mean(-1).astype(np.uint8)
        levels = np.arange(256, dtype=np.uint8)
        table = np.stack([np.full_like(levels, 255), levels, levels, levels], axis=1)
        yield av.VideoFrame.from_ndarray((grey, table), format="pal8")


@pytest.mark.parametrize("name", FORMATS)
def test_each_frame_alone_is_that_of_reading_all(tmp_path: Path, name: str) -> None:
    codec, pixels, options = FORMATS[name]
    path = tmp_path / name
    if pixels == "pal8":
        with av.open(str(path), "w") as out:
            stream = out.add_stream(codec, rate=RATE, options=options)
            stream.width, stream.height, stream.pix_fmt = 320, 240, pixels
            for frame in palette_frames(20, (320, 240)):
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
    else:
        size = (352, 288) if codec == "h263" else (320, 240)
        film(path, 20, codec, pixels, options, size=size)
    check(path, range(20))


@pytest.mark.parametrize(
    "flags", ["frag_keyframe+empty_moov", "faststart", "dash", "frag_keyframe+default_base_moof"]
)
def test_shapes_of_mp4(tmp_path: Path, flags: str) -> None:
    path = film(tmp_path / "a.mp4", 20, options=GROUPS, container={"movflags": flags}, sound=0.8)
    check(path, range(20))


@pytest.mark.parametrize("flags", ["frag_keyframe+empty_moov", "faststart"])
@pytest.mark.parametrize("more", [bytes(5000), b"\r\n--boundary of an upload--\r\n" * 9])
def test_what_trails_an_mp4_is_not_missing(tmp_path: Path, flags: str, more: bytes) -> None:
    path = film(tmp_path / "a.mp4", options=X264, container={"movflags": flags}, size=(96, 72))
    path.write_bytes(path.read_bytes() + more)
    assert numbers(read_frames(path)) == list(range(20))


@pytest.mark.parametrize("path", sorted(DATA.glob("*.[aow]*")), ids=lambda path: path.name)
def test_kept_files(path: Path) -> None:
    """Made by encoders that PyAV's wheel lacks: `tests/data/make.sh`."""
    frames = check(path)
    assert len(frames) > 40
    with av.open(str(path)) as container:
        plain = [f.to_ndarray(format="rgb24").transpose(2, 0, 1) for f in container.decode(video=0)]
    # Each picture once and in the order of the decoder, whose times may contradict it.
    gaps = [np.abs(f.numpy().astype(int) - p).mean() for f, p in zip(frames, plain, strict=True)]
    assert max(gaps) < 1


def test_gaps_in_an_avi_are_no_missing_frames(tmp_path: Path) -> None:
    times = [0, 40, 80, 120, 160, 1160, 2160, 3160, 3200, 3240]
    for codec, options in (("libx264", X264), ("mpeg4", QUALITY)):
        path = film(tmp_path / f"{codec}.avi", 10, codec, options=options, times=times)
        check(path, range(10))
    late = [40 * k + 120 * (k > 9) for k in range(20)]
    check(film(tmp_path / "late.avi", 20, "mpeg4", options=QUALITY, times=late), range(20))


def sizes_change(folder: Path, kind: str) -> Path:
    codec = {"webm8": "libvpx", "webm9": "libvpx-vp9"}.get(kind, "libx264")
    suffix = kind[:4] if kind.startswith("webm") else kind
    parts = [
        film(folder / f"{k}.{suffix}", 10, codec, size=size, options={"b": "2M"})
        for k, size in enumerate([(192, 144), (288, 144)])
    ]
    path = folder / f"both.{suffix}"
    if suffix != "webm":
        path.write_bytes(parts[0].read_bytes() + parts[1].read_bytes())
        return path
    with av.open(str(path), "w") as out:
        stream = None
        for number, part in enumerate(parts):
            with av.open(str(part)) as given:
                stream = stream or out.add_stream_from_template(given.streams.video[0])
                for packet in given.demux(video=0):
                    if packet.size:
                        packet.pts += 400 * number
                        packet.dts = packet.pts
                        packet.stream = stream
                        out.mux(packet)
    return path


@pytest.mark.parametrize("kind", ["webm8", "webm9", "ts", "h264"])
def test_frames_take_the_size_of_the_first(tmp_path: Path, kind: str) -> None:
    path = sizes_change(tmp_path, kind)
    frames = check(path, [*range(10), *range(10)])
    assert frames.shape == (20, 3, 144, 192)
    assert read_frames(path, lambda times: [15, 2], short_side=72).shape == (2, 3, 72, 96)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("flagged", ["all", "none", "thirds"])
def test_flags_of_key_frames_are_not_believed(
    tmp_path: Path, codec: str, suffix: str, flagged: str
) -> None:
    options = GROUPS if codec == "libx264" else QUALITY
    source = film(tmp_path / "source.mp4", 20, codec, options=options, size=(160, 120))

    def change(number: int, packet: Any) -> None:
        packet.is_keyframe = {"all": True, "none": False, "thirds": number % 3 == 0}[flagged]

    check(remux(source, tmp_path / f"a.{suffix}", change), range(20))


TICK = 12800 // RATE
TIMES: dict[str, Callable[[int, int], int]] = {
    "double.mkv": lambda k, pts: pts // (2 * TICK) * 2 * TICK,
    "swapped.mkv": lambda k, pts: pts + TICK * (2 if k % 2 == 0 else 0),
    "negative.mkv": lambda k, pts: pts - 5 * TICK,
    "far.mp4": lambda k, pts: pts + 2**40,
    "wraps.ts": lambda k, pts: pts + int((2**33 / 90000 - 0.4) * 12800),
    "jumps.ts": lambda k, pts: pts + 12800 * 3600 * (k > 9),
}


@pytest.mark.parametrize("name", TIMES)
def test_times_are_not_believed(tmp_path: Path, name: str) -> None:
    shift = TIMES[name]
    options = {**X264, "g": "6", "bf": "0"}
    source = film(tmp_path / "source.mp4", 20, options=options, size=(160, 120))

    def change(number: int, packet: Any) -> None:
        packet.pts = shift(number, packet.pts)
        packet.dts = packet.dts if name == "swapped.mkv" else packet.pts

    check(remux(source, tmp_path / name, change), range(20))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_decoding_times_in_place_of_times(tmp_path: Path, suffix: str) -> None:
    source = film(tmp_path / "source.mp4", 20, options=GROUPS, size=(160, 120))

    def change(number: int, packet: Any) -> None:
        packet.pts = packet.dts = packet.dts + 2 * TICK

    check(remux(source, tmp_path / f"a.{suffix}", change), range(20))


def test_a_wrong_table_of_key_frames(tmp_path: Path) -> None:
    content = bytearray(film(tmp_path / "a.mp4", 20, options=GROUPS).read_bytes())
    table = content.index(b"stss")
    for entry in range(1, int.from_bytes(content[table + 8 : table + 12], "big")):
        place = slice(table + 12 + 4 * entry, table + 16 + 4 * entry)
        content[place] = (int.from_bytes(content[place], "big") + 2).to_bytes(4, "big")
    path = tmp_path / "wrong.mp4"
    path.write_bytes(content)
    check(path, range(20))


def test_what_precedes_the_first_key_frame_is_left_out(tmp_path: Path) -> None:
    whole = film(tmp_path / "a.ts", 30, "mpeg2video", options={**REORDERED, "g": "10"})
    path = tmp_path / "tail.ts"
    path.write_bytes(whole.read_bytes()[188 * 200 :])
    found = numbers(check(path))
    assert found == list(range(found[0], 30))
    assert found[0] > 0


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.flv", "a.mkv", "a.ts"])
def test_sound_may_be_longer(tmp_path: Path, name: str) -> None:
    codec = "libvpx" if name == "a.webm" else "libx264"
    path = film(tmp_path / name, 20, codec, options={"b": "2M"}, size=(160, 120), sound=8)
    assert numbers(read_frames(path)) == list(range(20))


CUT = {
    "a.mp4": ("libx264", "faststart"),
    "a.mov": ("mjpeg", "faststart"),
    "fragments.mp4": ("libx264", "frag_keyframe+empty_moov"),
    "a.webm": ("libvpx", ""),
    "a.mkv": ("libx264", ""),
    "a.flv": ("libx264", ""),
    "a.avi": ("mpeg4", ""),
    "a.wmv": ("wmv2", ""),
    "a.ivf": ("libvpx", ""),
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_off_says_so(tmp_path: Path, name: str) -> None:
    codec, flags = CUT[name]
    path = film(
        tmp_path / name,
        20,
        codec,
        "yuvj420p" if codec == "mjpeg" else "yuv420p",
        {"g": "4", "b": "2M"},
        {"movflags": flags} if flags else {},
    )
    assert numbers(read_frames(path)) == list(range(20))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    with pytest.raises(UnusableVideoError, match=r"is cut off, has [\d.]+ of [\d.]+ \w+$"):
        read_frames(path, lambda times: [0])


def test_a_count_too_large_is_not_believed(tmp_path: Path) -> None:
    content = bytearray(film(tmp_path / "a.mp4", 20).read_bytes())
    table = content.index(b"stts")
    content[table + 12 : table + 16] = (2**31 - 1).to_bytes(4, "big")
    path = tmp_path / "many.mp4"
    path.write_bytes(content)
    assert numbers(read_frames(path)) == list(range(20))


def blot(source: Path, path: Path, which: Sequence[int]) -> Path:
    """Zeros instead of some packets."""
    content = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for number in which:
        place, size = packets[number]
        content[place : place + size] = bytes(size)
    path.write_bytes(content)
    return path


def test_the_nearest_stands_in_for_few_that_cannot_be_decoded(tmp_path: Path) -> None:
    source = film(tmp_path / "a.mov", 40, "png", "rgb24", size=(96, 72))
    few = blot(source, tmp_path / "few.mov", [0, 20])
    assert numbers(check(few)) == [1, *range(1, 20), 19, *range(21, 40)]
    many = blot(source, tmp_path / "many.mov", range(10, 16))
    with pytest.raises(UnusableVideoError, match="frame 10 of 40 cannot be decoded"):
        read_frames(many)
    assert numbers(read_frames(many, lambda times: [9, 20])) == [9, 20]


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
    "a.ts": ("libx264", {**X264, "g": "10", "bf": "2"}),
    "a.vob": ("mpeg2video", {"q": "4", "g": "10", "bf": "2"}),  # a seek lands within a picture
}


@pytest.mark.parametrize("name", SEEKS)
def test_decodes_about_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    codec, options = SEEKS[name]
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
    assert decoded < 60


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
from svitt_ops.training.video import read_frames
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

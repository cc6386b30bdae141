"""Every kind of video file: each frame read alone is that of reading all, whatever lies."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from films import GROUPS, QUALITY, RATE, X264, film, numbers, paint, remux
from torch import Tensor

from svitt_ops.training.data.video import UnusableVideoError, read_frames

DATA = Path(__file__).parents[2] / "data"


def check(path: Path, expected: Sequence[int] | None = None) -> Tensor:
    """All frames, each of which was read alone, too."""
    everything = read_frames(path)
    if expected is not None:
        assert numbers(everything) == list(expected)
    for position in range(len(everything)):
        alone = read_frames(path, lambda times, p=position: [p])
        assert torch.equal(alone[0], everything[position]), position
    return everything


REFRESH = {**X264, "x264-params": "intra-refresh=1:keyint=6:bframes=0"}
OPEN = {**X264, "x264-params": "open-gop=1:keyint=6:bframes=2"}
HEVC = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=6:bframes=2"}
VP8 = {"deadline": "realtime", "cpu-used": "8", "b": "2M", "g": "8"}
VP9 = {"cpu-used": "8", "deadline": "realtime", "b": "2M", "g": "8"}
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

"""What a user's folder may hold: no name, kind or content of a file does more than be refused."""

import errno
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from svitt_ops.training.data.annotations import Entry
from svitt_ops.training.data.datasets import ClipSpec, FrameReader, PairDataset, SkipLog
from svitt_ops.training.data.files import MediaFile
from svitt_ops.training.data.timeline import timelines
from svitt_ops.training.data.video import UnusableVideoError, read_frames
from svitt_ops.training.tasks.parts.gallery import GalleryClips, build_gallery

GOOD = Path(__file__).parents[2] / "data" / "theora.ogv"
FUZZ = Path(__file__).with_name("fuzz.py")
NAMES = [
    "12:30.mp4",
    "-",
    "concat:a.mp4|b.mp4",
    "pipe:0",
    "http:",
    "data:video.mp4",
    "subfile,,start,0,end,0,,:a.mp4",
    "%03d.jpg",
    "a?b#c.mp4",
    "[*].mp4",
    "two\nlines\t.mp4",
    "~.mp4",
    " .mp4",
    "größe 漢字.mp4",
    os.fsdecode(b"\xff\xfe.mp4"),
    "x" * 251 + ".mp4",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_that_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = read_frames(GOOD, lambda times: [7])
    Path(name).write_bytes(GOOD.read_bytes())
    for path in (name, Path(name), os.path.join(tmp_path, name)):
        assert torch.equal(read_frames(path, lambda times: [7]), expected)
    Path(name).write_bytes(b"no video")
    log = SkipLog()
    with pytest.raises(UnusableVideoError) as error:
        read_frames(name)
    assert str(error.value).isprintable()
    log.add([(name, str(error.value))])
    log.write(tmp_path / "skipped.tsv")  # whatever bytes the name has
    assert len((tmp_path / "skipped.tsv").read_text(encoding="utf-8").splitlines()) == 1


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "link.mp4").symlink_to("fifo.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "nowhere.mp4").symlink_to("gone.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "empty.mp4").touch()
    reasons = {
        "fifo.mp4": "is a FIFO, not a file",
        "link.mp4": "is a FIFO, not a file",
        "loop.mp4": "symbolic links",
        "nowhere.mp4": "No such file",
        "folder.mp4": "is a folder, not a file",
        "empty.mp4": "is empty",
        "a\0b.mp4": "null",
    }
    for name, reason in reasons.items():
        with pytest.raises(UnusableVideoError, match=reason):
            read_frames(f"{tmp_path}/{name}")
    for device in ("/dev/null", "/dev/zero"):
        with pytest.raises(UnusableVideoError, match="is a device, not a file"):
            read_frames(device)


def test_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # their names must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("a.mp4")
        with pytest.raises(UnusableVideoError, match="is a socket, not a file"):
            read_frames("a.mp4")


def test_nothing_else_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No address and no list of files: they would reach the network, or wait for a FIFO."""
    (tmp_path / "good.ogv").write_bytes(GOOD.read_bytes())
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/good.ogv"
        lists = {
            "a.ffconcat": "ffconcat version 1.0\nfile 'good.ogv'\n",
            "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.ogv\n#EXT-X-ENDLIST\n",
            "b.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{address}\n#EXT-X-ENDLIST\n",
            "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
            "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
            "a.txt": address,
        }
        monkeypatch.chdir(tmp_path)
        for name, content in lists.items():
            Path(name).write_text(content)
        for name in (*lists, address, f"file:{tmp_path}/good.ogv", "concat:good.ogv"):
            with pytest.raises(UnusableVideoError):
                read_frames(name)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda times: [], "choose must return at least one position"),
        (lambda times: [0, 48], "choose must return positions below 48, got 48"),
        (lambda times: [-49], "choose must return positions below 48, got -49"),
    ],
)
def test_a_wrong_choice_is_no_fault_of_the_file(
    choose: Callable[[Sequence[float]], list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_frames(GOOD, choose)
    assert not isinstance(error.value, UnusableVideoError)


def test_errors_of_choose_pass_through() -> None:
    with pytest.raises(ZeroDivisionError):
        read_frames(GOOD, lambda times: [1 // 0])
    with pytest.raises(TypeError, match="integer"):
        read_frames(GOOD, lambda times: [0.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="short_side must be at least 1, got 0"):
        read_frames(GOOD, short_side=0)
    calls = []
    frames = read_frames(GOOD, lambda times: calls.append(len(times)) or [-1, 47])
    assert calls == [48]
    assert torch.equal(frames[0], frames[1])


def huge_frames(path: Path, width: int, height: int) -> Path:
    """VP8 whose key frame says it is large."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libvpx", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), dtype=np.uint8), format="rgb24")
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    content = bytearray(path.read_bytes())
    place = content.index(b"\x9d\x01\x2a") + 3
    content[place : place + 4] = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    path.write_bytes(content)
    return path


def test_huge_frames(tmp_path: Path) -> None:
    with pytest.raises(UnusableVideoError):
        read_frames(huge_frames(tmp_path / "a.webm", 16383, 16383))
    path = tmp_path / "a.y4m"
    path.write_bytes(b"YUV4MPEG2 W16000 H8000 F25:1 C420\nFRAME\n" + bytes(1000))
    with pytest.raises(UnusableVideoError, match="has frames of 16000 x 8000 pixels"):
        read_frames(path)


def odd_files(folder: Path) -> list[Path]:
    """Files whose reading fails in as many places as there are."""
    rng = random.Random(0)
    content = GOOD.read_bytes()
    fifo = folder / "fifo.mp4"
    os.mkfifo(fifo)
    paths = [fifo, folder, folder / "gone.mp4", huge_frames(folder / "h.webm", 16383, 16383)]
    for number, odd in enumerate(
        [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0AVI ", content[:3000]]
    ):
        paths.append(folder / f"{number}.mp4")
        paths[-1].write_bytes(odd + rng.randbytes(number * 50))
    return paths


def test_whoever_reads_meets_one_error_alone(tmp_path: Path) -> None:
    odd = odd_files(tmp_path)
    entries = [Entry(media=(str(p),), captions=("a",), kind=k) for p in odd for k in ("video",)]
    good = Entry(media=(str(GOOD),), captions=("b",), kind="video")
    dataset = PairDataset([*entries, good], ClipSpec(num_frames=2), seed=3)
    for number in range(len(dataset)):
        clip = dataset[number, 0]
        assert clip.frames.shape == (2, 3, 120, 160)
    clips = GalleryClips(build_gallery([*entries, good]), 2)
    reasons = [clips[number].reason for number in range(len(clips))]
    assert all(reasons[:-1])
    assert reasons[-1] == ""
    reader = FrameReader(ClipSpec(num_frames=2, cache=True))
    for path in odd:
        for _ in range(2):
            with pytest.raises(UnusableVideoError):
                reader.read(str(path), "video", lambda times: [0])


def test_an_error_of_any_type_is_that_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("odd"), MemoryError(), IndexError(), AssertionError("what\nelse")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("svitt_ops.training.data.video.pixels", fail)
        with pytest.raises(UnusableVideoError, match=r"theora\.ogv: \S") as caught:
            read_frames(GOOD)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["theora.ogv", "packed_xvid.avi", "a.mkv", "a.mp4", "a.png"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_disk_that_fails_and_a_stop_are_no_end_of_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException
) -> None:
    path = GOOD.with_name(name)
    if name == "a.png":
        path = tmp_path / name
        Image.fromarray(np.random.default_rng(0).integers(0, 99, (99, 99, 3), np.uint8)).save(path)
    elif name.startswith("a."):
        path = tmp_path / name
        with (
            av.open(str(path), "w") as out,
            av.open(str(GOOD.with_name("packed_xvid.avi"))) as given,
        ):
            stream = out.add_stream_from_template(given.streams.video[0])
            for packet in given.demux(video=0):
                if packet.size and packet.dts is not None:
                    packet.pts = packet.dts
                    packet.stream = stream
                    out.mux(packet)
    plain = MediaFile.read
    calls = 0
    last = 0

    def read(self: MediaFile, offset: int, count: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls == last:
            raise error
        return plain(self, offset, count)

    monkeypatch.setattr(MediaFile, "read", read)
    read_frames(path, lambda times: [len(times) // 2])
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UnusableVideoError
    for last in range(1, calls, max(1, calls // 20)):  # noqa: B007
        calls = 0
        timelines._known.clear()
        with pytest.raises(expected):
            read_frames(path, lambda times: [len(times) // 2])


@pytest.mark.timeout(900)  # the machine may be busy
def test_a_hundred_mutated_files() -> None:
    done = subprocess.run(
        [sys.executable, str(FUZZ), "--count", "100"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 that must not be" in done.stdout


@pytest.mark.timeout(900)
def test_fuzzing_notices(tmp_path: Path) -> None:
    """A crash, a loop, an error of another type: each would be counted."""
    program = tmp_path / "fuzz.py"
    (tmp_path / "data").mkdir()
    source = FUZZ.read_text().replace("SECONDS = 10", "SECONDS = 2")
    fault = "{1: lambda: os.abort(), 2: lambda: [0 for _ in iter(int, 1)], 3: lambda: 1 / 0}"
    program.write_text(
        source.replace("import re\n", "import os\nimport re\n")
        .replace("parents[2]", "parents[0]")
        .replace(
            "            frames = read_frames(",
            f"            {fault}.get(number, int)()\n            frames = read_frames(",
        )
    )
    done = subprocess.run(
        [sys.executable, str(program), "--count", "5"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "file 1: crashed with -6" in done.stdout
    assert "file 2: slow" in done.stdout
    assert "file 3: raised ZeroDivisionError" in done.stdout
    assert "5 files of" in done.stdout
    assert ", 3 that must not be" in done.stdout

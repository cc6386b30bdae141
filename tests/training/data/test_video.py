"""Real files, good and broken."""

import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from svitt_ops.training.data.annotations import Entry
from svitt_ops.training.data.datasets import ClipSpec, PairDataset, SkipLog
from svitt_ops.training.data.sampling import sample_positions
from svitt_ops.training.data.video import UnusableVideoError, read_frames

SIZE = 32


def film(
    path: Path,
    count: int,
    *,
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    codec: str = "libx264",
    container: dict[str, str] | None = None,
) -> Path:
    """A video whose frame k is grey of 10 + 4 k; `times` in milliseconds."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=25, options=options or {})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(count):
            picture = np.full((SIZE, SIZE, 3), 10 + 4 * k, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[k], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def numbers(frames: Tensor) -> list[int]:
    """Which frame each picture is."""
    return [round((f.float().mean().item() - 10) / 4) for f in frames]


def broken_files(folder: Path) -> dict[str, Path]:
    """One file for each way a file can be unusable."""
    good = film(folder / "good.mp4", 40)
    streamable = film(
        folder / "streamable.mp4", 40, options={"g": "5"}, container={"movflags": "faststart"}
    ).read_bytes()
    files = {
        "corrupt": random.Random(0).randbytes(5000),
        "truncated": good.read_bytes()[: good.stat().st_size // 2],
        "truncated tail": streamable[: int(len(streamable) * 0.8)],
        "empty": b"",
        "text": b"this is no video\n" * 50,
    }
    paths = {}
    for name, content in files.items():
        paths[name] = folder / f"{name}.mp4"
        paths[name].write_bytes(content)
    paths["missing"] = folder / "missing.mp4"
    paths["a folder"] = folder
    paths["audio only"] = sound(folder / "audio.mp4")
    return paths


def test_broken_files_say_what_is_wrong(tmp_path: Path) -> None:
    for name, path in broken_files(tmp_path).items():
        with pytest.raises(UnusableVideoError) as error:
            read_frames(path)
        assert str(path) in str(error.value), name
        assert len(str(error.value)) > len(str(path)) + 2, name


@pytest.mark.parametrize(
    "options",
    [
        {"g": "6"},
        {"g": "6", "bf": "3"},
        {"g": "250"},
        {"g": "1"},
        {"x264-params": "open-gop=1:g=5"},
    ],
)
def test_seeking_finds_the_same_frames_as_decoding_all(
    tmp_path: Path, options: dict[str, str]
) -> None:
    path = film(tmp_path / "film.mp4", 50, options=options)
    everything = read_frames(path)
    assert numbers(everything) == list(range(50))
    rng = random.Random(0)
    for count in (1, 3, 8):
        chosen = [rng.randrange(50) for _ in range(count)]
        assert torch.equal(read_frames(path, lambda times, c=chosen: c), everything[chosen])


@pytest.mark.parametrize("name", ["a.mkv", "a.mov", "a.avi", "a.webm", "a.mp4", "a.ts"])
def test_containers(tmp_path: Path, name: str) -> None:
    codec = "libvpx" if name == "a.webm" else "libx264"
    path = film(tmp_path / name, 20, codec=codec, options={"crf": "4", "b": "2000000"})
    assert numbers(read_frames(path, lambda times: [2, 10, 17])) == [2, 10, 17]


def test_one_frame_and_fewer_than_wanted(tmp_path: Path) -> None:
    one = film(tmp_path / "one.mp4", 1)
    three = film(tmp_path / "three.mp4", 3)

    def choose(times: Sequence[float]) -> list[int]:
        return sample_positions(times, 4, "middle")

    assert numbers(read_frames(one, choose)) == [0, 0, 0, 0]
    assert numbers(read_frames(three, choose)) == [0, 1, 2, 2]


def test_variable_frame_rate(tmp_path: Path) -> None:
    times = [0, 40, 80, 120, 160, 1160, 2160, 3160, 3200, 3240]
    path = film(tmp_path / "vfr.mp4", 10, times=times)
    seen: list[float] = []

    def choose(found: Sequence[float]) -> list[int]:
        seen.extend(found)
        return sample_positions(found, 3, "fps1")

    frames = read_frames(path, choose)
    assert [round(1000 * (t - seen[0])) for t in seen] == times
    assert numbers(frames) == [4, 5, 6]


def test_short_side_scales_down_only(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 2)
    assert read_frames(path, short_side=16).shape == (2, 3, 16, 16)
    assert read_frames(path, short_side=64).shape == (2, 3, SIZE, SIZE)


@pytest.mark.parametrize("extension", ["png", "jpg", "bmp"])
def test_images(tmp_path: Path, extension: str) -> None:
    picture = np.full((24, 40, 3), 90, dtype=np.uint8)
    path = tmp_path / f"image.{extension}"
    av.VideoFrame.from_ndarray(picture, format="rgb24").to_image().save(path)
    frames = read_frames(path)
    assert frames.shape == (1, 3, 24, 40)
    assert abs(frames.float().mean().item() - 90) < 3


def entry(path: Path, caption: str = "a film") -> Entry:
    return Entry(media=(str(path),), captions=(caption,), kind="video")


def test_training_replaces_broken_files_and_counts_them(tmp_path: Path) -> None:
    broken = broken_files(tmp_path)
    good = [film(tmp_path / f"good{k}.mp4", 12) for k in range(4)]
    entries = [entry(path) for path in (*broken.values(), *good)]
    dataset = PairDataset(entries, ClipSpec(num_frames=4))
    log = SkipLog()
    for epoch in range(2):
        for number in range(len(dataset)):
            clip = dataset[number, epoch]
            assert clip.frames.shape == (4, 3, SIZE, SIZE)
            again = dataset[number, epoch]
            assert torch.equal(clip.frames, again.frames)
            assert (clip.seed, clip.pair_id) == (again.seed, again.pair_id)
            log.add(clip.skipped)
    assert set(log.reasons) == {str(path) for path in broken.values()}
    assert "is cut off" in log.reasons[str(broken["truncated tail"])]
    assert sum(log.counts.values()) >= 2 * len(broken)
    log.write(tmp_path / "skipped.tsv")
    assert len((tmp_path / "skipped.tsv").read_text().splitlines()) == len(log.reasons)


def test_a_corpus_without_a_usable_file_is_an_error(tmp_path: Path) -> None:
    dataset = PairDataset([entry(tmp_path / "no.mp4")], ClipSpec(num_frames=4))
    with pytest.raises(ValueError, match=r"could not be read.*no\.mp4"):
        dataset[0, 0]


def test_cached_frames_are_the_same(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 12)
    plain, cached = (
        PairDataset([entry(path)], ClipSpec(num_frames=4, cache=cache)) for cache in (False, True)
    )
    for epoch in range(3):
        assert torch.equal(plain[0, epoch].frames, cached[0, epoch].frames)

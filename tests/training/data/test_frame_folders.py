"""Folders of numbered frames are videos, wherever a video is named."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from films import numbers, paint
from PIL import Image

from svitt_ops.training.data.annotations import read_annotations
from svitt_ops.training.data.datasets import ClipSpec, PairDataset
from svitt_ops.training.data.sampling import sample_positions
from svitt_ops.training.data.video import UnusableVideoError, read_frames
from svitt_ops.training.embeddings.embedding import _stamp
from svitt_ops.training.embeddings.listing import list_media

SIZE = (96, 64)


def frames(folder: Path, count: int = 12, name: str = "frame_{}.png") -> Path:
    """The pictures of `films.paint`, numbered from 1 without zeros, and what else may lie there."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(paint(number, SIZE)).save(folder / name.format(number + 1))
    for other in (".hidden_1.png", "Thumbs.db", "cover.jpg", "info.json"):
        (folder / other).write_text("no picture")
    return folder


def test_frames_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = frames(tmp_path / "clip")
    assert numbers(read_frames(folder)) == list(range(12))
    found = read_frames(folder, lambda times: [11, 0, -1], short_side=32)
    assert numbers(found) == [11, 0, 11]
    assert found.shape == (3, 3, 32, 48)
    assert numbers(read_frames(f"{frames(tmp_path / 'b', name='{}.bmp')}")) == list(range(12))


def test_a_folder_gives_what_its_film_does(tmp_path: Path) -> None:
    """Sampled by a rate, as a film of that many frames a second."""
    frames(tmp_path / "clip")
    asked: list[Sequence[float]] = []
    for given, fps in (({"fps": 4}, None), ({}, 4.0), ({"fps": "4"}, 2.0)):
        entry = {"video": "clip", "caption": "A dog.", **given}
        (tmp_path / "a.json").write_text(json.dumps([entry]))
        read = read_annotations(tmp_path / "a.json", fps=fps)
        dataset = PairDataset(read.entries, ClipSpec(num_frames=4, mode="fps2"))
        times = [number / 4 for number in range(12)]
        assert numbers(dataset[0, 0].frames) == sample_positions(times, 4, "fps2")
        read_frames(read.entries[0].media[0], lambda times: asked.append(times) or [0])
        assert asked[-1] == times
        assert dataset.items[0].path.startswith(str(tmp_path / "clip"))
    (tmp_path / "a.json").write_text('[{"video": "clip", "caption": "A dog."}]')
    entries = read_annotations(tmp_path / "a.json").entries
    dataset = PairDataset(entries, ClipSpec(num_frames=4, mode="middle"))
    assert numbers(dataset[0, 0].frames) == [1, 4, 7, 10]
    with pytest.raises(ValueError, match=r"^sampling: 'fps2' needs the fps of a folder of frames"):
        PairDataset(entries, ClipSpec(num_frames=4, mode="fps2"))[0, 0]


def test_a_folder_that_is_called_like_a_film_has_its_rate(tmp_path: Path) -> None:
    frames(tmp_path / "clip.mp4")
    (tmp_path / "a.json").write_text('[{"video": "clip.mp4", "caption": "A dog.", "fps": 4}]')
    dataset = PairDataset(
        read_annotations(tmp_path / "a.json").entries, ClipSpec(num_frames=4, mode="fps2")
    )
    times = [number / 4 for number in range(12)]
    assert numbers(dataset[0, 0].frames) == sample_positions(times, 4, "fps2")


@pytest.mark.parametrize("fps", [0, -1, "fast", None, float("inf")])
def test_rates_that_cannot_be(fps: Any, tmp_path: Path) -> None:
    frames(tmp_path / "clip", 1)
    entries = [{"video": "clip", "caption": "A dog.", "fps": fps}, {"video": "a", "caption": "A."}]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    problems = read_annotations(tmp_path / "a.json").problems
    wanted = [] if fps is None else [f"field 'fps' must be a positive number, got {fps!r}"]
    assert [problem.rpartition(": ")[2] for problem in problems] == wanted


def test_folders_that_are_no_video_are_named(tmp_path: Path) -> None:
    folder = frames(tmp_path / "clip")
    Image.fromarray(paint(0, SIZE)).save(folder / "frame_03.jpg")
    (tmp_path / "empty").mkdir()
    flow = frames(tmp_path / "flow", 2)
    Image.fromarray(paint(0, SIZE)).save(flow / "flow_1.jpg")
    sizes = frames(tmp_path / "sizes", 2)
    Image.fromarray(paint(0, (64, 64))).save(sizes / "frame_3.png")
    broken = frames(tmp_path / "broken", 2)
    (broken / "frame_2.png").write_bytes(b"no picture")
    reasons = {
        "clip": "has two frames of one number: 'frame_03.jpg' and 'frame_3.png'",
        "empty": "is a folder, not a file, and has no numbered frames",
        "flow": "has frames of several names: 'flow_1.jpg' and 'frame_1.png'",
        "sizes": "has frames of several sizes: 64 x 64 and 96 x 64",
        "broken": "frame_2.png: is no picture that Pillow reads",
    }
    for name, reason in reasons.items():
        with pytest.raises(UnusableVideoError) as error:
            read_frames(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}: {reason}"
    assert numbers(read_frames(broken, lambda times: [0])) == [0]


def test_which_folders_are_videos_to_embed(tmp_path: Path) -> None:
    """One of numbered frames is a video; a folder of films, or of other pictures, is not."""
    root = tmp_path / "videos"
    one, other = frames(root / "frames" / "a"), frames(root / "frames" / "b", 2)
    for name in ("1.mp4", "2.mp4", "1.jpg", "2.jpg"):  # films with their covers
        (root / "films").mkdir(exist_ok=True)
        (root / "films" / name).touch()
    for name in ("x_1.jpg", "y_1.jpg"):
        (root / "photos").mkdir(exist_ok=True)
        (root / "photos" / name).touch()
    files = [root / "films" / name for name in ("1.jpg", "1.mp4", "2.jpg", "2.mp4")]
    photos = [root / "photos" / name for name in ("x_1.jpg", "y_1.jpg")]
    assert list_media([root], "video") == [str(x) for x in (*files, one, other, *photos)]
    assert list_media([one], "video") == [str(one)]
    assert list_media([f"{root}/frames/*"], "video") == [str(one), str(other)]
    assert len(list_media([root], "image")) == len([*files, *photos]) + 12 + 2 + 2 * 2
    (tmp_path / "a.json").write_text('[{"video": "videos/frames/a", "caption": "A.", "fps": 2}]')
    assert list_media([tmp_path / "a.json"], "video") == [str(one)]
    before = _stamp(str(one))
    Image.fromarray(paint(5, (8, 8))).save(one / "frame_2.png")
    assert _stamp(str(one)) != before


def test_an_id_is_its_folder_before_its_file(tmp_path: Path) -> None:
    folder = frames(tmp_path / "video7", 1)
    (tmp_path / "video7.mp4").touch()
    (tmp_path / "a.csv").write_text("video_id,sentence\nvideo7,A dog.\n")
    (entry,) = read_annotations(tmp_path / "a.csv").entries
    assert entry.media == (str(folder),)
    assert torch.equal(read_frames(entry.media[0])[0], read_frames(folder / "frame_1.png")[0])

"""A corpus in buffers: the same pairs, ids and batches as lists of them, and one name per file."""

import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svitt_ops.training.data.annotations import Entry, read_annotations
from svitt_ops.training.data.columns import FileNames, Items, Strings
from svitt_ops.training.data.datasets import ClipSpec, GlobalBatches, Item, PairDataset
from svitt_ops.training.tasks.parts.gallery import build_gallery

# Any text that Python can hold: names of files in other encodings come as lone surrogates.
texts = st.text(st.characters(exclude_categories=()), max_size=6)
entries = st.builds(
    Entry,
    media=st.lists(texts, min_size=1, max_size=3).map(tuple),
    captions=st.lists(texts, min_size=1, max_size=3).map(tuple),
    kind=st.sampled_from(["video", "image"]),
    together=st.none() | texts,
)


@given(st.lists(texts))
def test_strings(values: list[str]) -> None:
    strings = pickle.loads(pickle.dumps(Strings(values)))
    assert list(strings) == values
    assert strings[1:4] == tuple(values[1:4])
    if values:
        assert strings[-1] == values[-1]
    with pytest.raises(IndexError):
        strings[len(values)]


@given(st.lists(entries, max_size=8))
def test_items_are_those_of_the_entries(corpus: list[Entry]) -> None:
    wanted = [
        Item(path=path, captions=e.captions, kind=e.kind, together=e.together)
        for e in corpus
        for path in e.media
    ]
    items = Items(corpus)
    assert list(items) == wanted
    assert items[:2] == wanted[:2]
    assert len(items) == len(wanted)
    if wanted:
        assert items[-1] == wanted[-1]
        assert GlobalBatches(items, 1).epoch(3) == GlobalBatches(wanted, 1).epoch(3)


def test_batches_are_those_of_earlier_versions() -> None:
    """So that a run of an earlier version goes on with the batches that it would have had."""
    items = [
        Item(
            path=str(k),
            captions=("x",),
            kind="video" if k < 9 else "image",
            together=None if k % 3 else str(k // 4),
        )
        for k in range(14)
    ]
    batches = GlobalBatches(items, 2, seed=7)
    assert batches.epoch(0) == [[7, 8], [3, 2], [10, 9], [11, 12], [5, 0], [1, 6]]
    assert batches.epoch(1) == [[5, 7], [2, 8], [10, 12], [4, 6], [13, 11], [0, 3]]


def test_a_dataset_has_few_objects_however_many_pairs() -> None:
    """What a forked worker's reference counts, and its garbage collector, can write to."""

    def reachable(thing: Any) -> Iterator[Any]:
        seen, left = set(), [thing]
        while left:
            one = left.pop()
            if id(one) in seen or isinstance(one, (type, ModuleType, FunctionType)):
                continue
            seen.add(id(one))
            yield one
            left += gc.get_referents(one)

    counts = []
    for pairs in (10, 1000):
        corpus = [
            Entry(media=(f"{k}.mp4",), captions=(f"text {k}",), kind="video", together=str(k // 2))
            for k in range(pairs)
        ]
        dataset = PairDataset(corpus, ClipSpec(num_frames=2))
        counts.append(sum(1 for _ in reachable(vars(dataset))))
    assert counts[0] == counts[1] < 200


@pytest.mark.parametrize("positives", ["video", "caption"])
def test_replacements_and_ids(positives: str, monkeypatch: Any) -> None:
    corpus = [
        Entry(media=("a", "b"), captions=("one", "two"), kind="video"),
        Entry(media=("c",), captions=("two",), kind="video"),
        Entry(media=("./a",), captions=("three",), kind="video"),
        Entry(media=("d",), captions=("one",), kind="image"),
    ]
    dataset = PairDataset(corpus, ClipSpec(num_frames=2), positives=positives)
    monkeypatch.setattr(dataset.reader, "read", lambda *_: torch.zeros(2, 3, 4, 4))
    ids: dict[str, set[int]] = {}
    for number in range(len(dataset)):
        for epoch in range(12):
            clip = dataset[number, epoch]
            assert type(clip.pair_id) is int
            path = dataset.items[number].path
            ids.setdefault(path if positives == "video" else clip.caption, set()).add(clip.pair_id)
    if positives == "video":
        assert ids == {"a": {0}, "b": {1}, "c": {2}, "./a": {0}, "d": {3}}
    else:
        assert ids == {"one": {0}, "two": {1}, "three": {2}}


def test_one_file_has_one_name(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "deep").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "v")
    (tmp_path / "away").symlink_to(tmp_path / "other" / "deep")
    monkeypatch.chdir(tmp_path)
    spellings = ["v/a.mp4", "v/../v/a.mp4", "./v/a.mp4", "v//a.mp4", "v/./a.mp4", "linked/a.mp4"]
    spellings += ["none/../v/a.mp4", f"{tmp_path}/v/a.mp4", f"{tmp_path}/linked/../v/a.mp4"]
    names = FileNames()
    assert {names(path) for path in spellings} == {str(tmp_path / "v" / "a.mp4")}
    # Not what leaving out "away/.." would make of it.
    assert names("away/../a.mp4") == str(tmp_path / "other" / "a.mp4")
    others = ["v/A.mp4", "v/b.mp4", "a.mp4", "other/v/a.mp4"]
    assert len({names(path) for path in [spellings[0], *others]}) == 5

    corpus = [
        Entry(media=(path,), captions=(str(k),), kind="video")
        for k, path in enumerate([*spellings, "v/b.mp4"])
    ]
    gallery = build_gallery(corpus)
    assert gallery.videos == ["v/a.mp4", "v/b.mp4"]  # as first spelled
    assert gallery.video_groups == [0, 1]
    assert gallery.text_groups == [0] * len(spellings) + [1]
    twice = build_gallery([Entry(media=tuple(spellings), captions=("x",), kind="video")])
    assert twice.videos == ["v/a.mp4"]
    dataset = PairDataset(corpus, ClipSpec(num_frames=2))
    monkeypatch.setattr(dataset.reader, "read", lambda *_: torch.zeros(2, 3, 4, 4))
    ids = [dataset[number, 0].pair_id for number in range(len(dataset))]
    assert ids == [0] * len(spellings) + [1]
    assert [item.path for item in dataset.items] == [*spellings, "v/b.mp4"]  # is what is opened


def test_spellings_of_an_annotation_file(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(
        '[{"video": "v/a.mp4", "caption": "x"}, {"video": "v/../v/a.mp4", "caption": "y"}]'
    )
    gallery = build_gallery(read_annotations(tmp_path / "test.json").entries)
    assert len(gallery.videos) == 1
    assert gallery.text_groups == gallery.video_groups * 2

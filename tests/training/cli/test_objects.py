"""The corpus knows where its objects are and asks about them; survivors are counted on them."""

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from svitt_ops.training.cli import objects
from svitt_ops.training.cli.figures import Survivors
from svitt_ops.training.cli.objects import patches_on_objects, survivor_shares
from svitt_ops.training.corpora.shapes import (
    COLORS,
    COUNTS,
    CorpusSpec,
    Film,
    build_corpus,
    plan,
)
from svitt_ops.training.data.annotations import read_annotations
from svitt_ops.training.data.video import read_frames
from svitt_ops.training.tasks.parts.gallery import build_gallery
from svitt_ops.training.tasks.parts.questions import QUESTIONS, read_answers

FEW = {"validation_scenes": 3, "test_scenes": 20, "train_films": 1}
SPECS = [CorpusSpec(size=48, motion=motion, **FEW) for motion in (False, True)]
IDS = ["events", "motion"]


def held_out(spec: CorpusSpec) -> list[Film]:
    return [film for film in plan(spec) if film.split == "test"]


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_every_frame_holds_one_thing_that_is_not_named(spec: CorpusSpec) -> None:
    for film in held_out(spec):
        named = {event[:2] for event in film.events}
        color, shape = film.distractor
        assert color not in {name for name, _ in named}
        assert shape not in {name for _, name in named}
        shot, masks = film.shoot(spec), film.masks(spec)
        assert list(shot) == list(masks) == [(0, 1), (1, 0)]
        for order, mask in masks.items():
            assert mask.shape == (spec.frames, 2, spec.size, spec.size)
            assert not mask.all(1).any()  # no pixel is of both
            assert mask.any((2, 3)).all()  # both are in every frame
            for number, (picture, (seen, other)) in enumerate(zip(shot[order], mask, strict=True)):
                event = film.events[order[number // (spec.frames // 2)]]
                assert {*map(tuple, picture[seen])} == {COLORS[event[0]]}
                assert {*map(tuple, picture[other])} == {COLORS[color]}
                neither = picture[~(seen | other)].astype(int)
                assert (neither.max(-1) == neither.min(-1)).all()  # gray


def test_orders_of_a_scene_have_the_same_frames_and_masks() -> None:
    spec = SPECS[0]
    for film in held_out(spec)[:5]:
        (first, second), (one, other) = film.shoot(spec).values(), film.masks(spec).values()
        half = spec.frames // 2
        assert np.array_equal(np.stack(first), np.roll(np.stack(second), half, axis=0))
        assert np.array_equal(one, np.roll(other, half, axis=0))


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_questions_are_about_what_is_seen(spec: CorpusSpec) -> None:
    for film in held_out(spec):
        asked = {order: film.questions(order) for order in ((0, 1), (1, 0))}
        orders = [questions[0]["question"] for questions in asked.values()]
        assert orders[0] == orders[1]  # the question does not tell the order
        captions = {film.caption(order) for order in asked}
        named = {event[:2] for event in film.events}
        counts = Counter(shape for _, shape in named)
        for shown, questions in asked.items():
            by_type: dict[str, list[dict[str, str]]] = {}
            for one in questions:
                by_type.setdefault(one["question_type"], []).append(one)
            (order,) = by_type["order"]
            said = order["question"].replace("?", ".")
            assert said in captions
            assert order["answer"] == ("yes" if said == film.caption(shown) else "no")
            for one in by_type["colour"]:
                filled = one["question"].lower().replace("what colour", f"a {one['answer']}")
                assert filled.replace("?", ".") == film.caption(shown).lower()
            for one in by_type["count"]:
                plural = one["question"].split()[2]
                shape = plural.removesuffix("es" if plural.startswith("cross") else "s")
                assert one["answer"] == COUNTS[counts[shape]]
                assert shape != film.distractor[1]  # which is not counted


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_annotations_of_questions(
    spec: CorpusSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films = plan(spec)
    few = [
        film
        for split in ("train", "validation", "test")
        for film in [film for film in films if film.split == split][:2]
    ]
    monkeypatch.setattr("svitt_ops.training.corpora.shapes.plan", lambda _: few)
    build_corpus(tmp_path, spec)
    answers = read_answers(tmp_path / "answers.json")
    scenes = []
    for split in ("train", "validation", "test"):
        read = read_annotations(
            tmp_path / f"{split}-questions.json", form=QUESTIONS, keep_together="scene"
        )
        assert not read.problems and len({q.media for q in read.entries}) == 4
        assert {q.type for q in read.entries} == {"order", "colour", "count"}
        assert all(set(q.answers) <= set(answers) for q in read.entries)
        scenes.append({q.together for q in read.entries})
        for q in read.entries:
            if q.type == "order":
                assert q.answers[0] in ("yes", "no")
    assert not any(a & b for a, b in itertools.combinations(scenes, 2))
    video = read_frames(tmp_path / few[-1].video((1, 0)))
    for frame, masks in zip(video, few[-1].masks(spec)[1, 0], strict=True):
        saturation = (frame.amax(0) - frame.amin(0)).float()  # what is gray has none
        on, off = saturation[torch.from_numpy(masks.any(0))], saturation[~masks.any(0)]
        assert on.mean() > 90 and off.mean() < 30


class Filmed:
    """A film of which the masks are told."""

    def __init__(self, *masks: torch.Tensor) -> None:
        self.told = dict(zip(((0, 1), (1, 0)), (mask.numpy() for mask in masks), strict=True))

    def masks(self, spec: CorpusSpec) -> dict[tuple[int, ...], Any]:
        return self.told


def test_a_patch_lies_on_an_object_if_half_of_it_does() -> None:
    spec = CorpusSpec(size=8, frames=4)
    masks = torch.zeros(4, 2, 8, 8, dtype=torch.bool)
    masks[:, 0, :4, :2] = True  # half of the first patch
    masks[:, 0, :4, 4:5] = True  # a quarter of the second, of which half is on either
    masks[:, 1, :4, 5:6] = True
    masks[:, 1, 4:, :4] = True  # all of the third
    later = masks.clone()
    later[2:] = False
    config: Any = SimpleNamespace(num_frames=2, grid_size=2)
    found = patches_on_objects([Filmed(masks, later)], spec, config)  # type: ignore[list-item]
    frame = [[True, False, False, False], [True, True, True, False]]
    assert found[0].tolist() == [frame[0] * 2, frame[1] * 2]
    nothing = [False] * 4
    assert found[1].tolist() == [frame[0] + nothing, frame[1] + nothing]


@pytest.mark.parametrize("prunes", [True, False])
def test_shares_of_survivors(monkeypatch: pytest.MonkeyPatch, prunes: bool) -> None:
    named = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
    seen = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0, 0, 0]])
    left = [[0, 1, 2, 3], [3, 4, 6, 7]], [[0, 1], [3, 4]]

    def survivors(model: Any, tokenizer: Any, frames: Any, caption: str, **_: Any) -> Survivors:
        number = int(caption)
        return Survivors(
            frames=frames,
            caption=caption,
            grid=2,
            visual=(torch.arange(8), torch.tensor(left[0][number])),
            multimodal=torch.tensor(left[1][number]) if prunes else None,
            fusion_trained=True,
        )

    monkeypatch.setattr(objects, "find_survivors", survivors)
    clip = SimpleNamespace(frames=torch.zeros(1, 2, 3, 4, 4))
    monkeypatch.setattr(objects, "GalleryClips", lambda *_: [clip, clip])
    gallery = build_gallery([])
    gallery.texts = ["0", "1"]
    model: Any = SimpleNamespace(config=SimpleNamespace(num_frames=2))
    tokenizer: Any = None
    on_objects = torch.stack([named, seen], 1).bool()
    found = survivor_shares(model, tokenizer, gallery, on_objects, text_length=4)
    assert found["visual"] == {"share": 5 / 8, "random": 6 / 16}
    multimodal = 2 / 4 if prunes else 2 / 8
    assert found["multimodal"] == {"share": multimodal, "random": 3 / 16, "visual_share": 2 / 8}

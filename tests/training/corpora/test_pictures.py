"""The corpus of pictures: files, splits, what is said is true, and nothing can be guessed."""

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from svitt_ops.training.corpora.pictures import build_pictures
from svitt_ops.training.corpora.scene_texts import TYPES, captions, expressions
from svitt_ops.training.corpora.scenes import COLORS, OPPOSITE, SHAPES, PictureSpec, Scene, plan
from svitt_ops.training.data.annotations import read_annotations
from svitt_ops.training.data.video import read_frames
from svitt_ops.training.tasks.parts.gallery import build_gallery
from svitt_ops.training.tasks.parts.questions import QUESTIONS, read_answers

SPEC = PictureSpec(train_pictures=150, validation_pictures=20)
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    build_pictures(folder, SPEC)
    return folder


@pytest.fixture(scope="module")
def scenes() -> dict[str, Scene]:
    return {scene.file: scene for scene in plan(SPEC)}


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def test_splits_share_no_scene(scenes: dict[str, Scene]) -> None:
    sets = defaultdict(list)
    for scene in scenes.values():
        sets[scene.split].append(frozenset(thing.look for thing in scene.things))
    assert {split: len(found) for split, found in sets.items()} == {
        "train": 150,
        "validation": 20,
        "test": 100,
    }
    assert len(set(sets["test"])) == 100
    train, validation, test = (set(sets[split]) for split in SPLITS)
    assert not (train & validation or train & test or validation & test)
    assert {len(things) for things in test} == {len(things) for things in train} == {2, 3}


def test_train_scenes_are_drawn_again_when_there_are_no_others() -> None:
    pictures = [s for s in plan(PictureSpec(train_pictures=900)) if s.split == "train"]
    sets = Counter(frozenset(thing.look for thing in scene.things) for scene in pictures)
    assert max(sets.values()) == 3
    held_out = [s for s in plan(PictureSpec(train_pictures=900)) if s.split != "train"]
    assert not {frozenset(t.look for t in s.things) for s in held_out} & sets.keys()


def test_things_are_where_their_boxes_say(folder: Path, scenes: dict[str, Scene]) -> None:
    for scene in list(scenes.values())[:60]:
        pixels = np.asarray(Image.open(folder / scene.file).convert("RGB")).astype(int)
        assert pixels.shape == (64, 64, 3)
        for thing in scene.things:
            x, y, width, height = thing.box
            near = pixels[y - 1 : y + height + 1, x - 1 : x + width + 1]
            painted = abs(near - COLORS[thing.color]).max(-1) < 60  # JPEG blurs a little
            rows, columns = painted.any(1), painted.any(0)
            assert rows[1:-1].all()
            assert columns[1:-1].all()
            if scene.file.endswith(".png"):
                assert not (rows[0] or rows[-1] or columns[0] or columns[-1])


def test_a_crate_hides_one_thing(folder: Path, scenes: dict[str, Scene]) -> None:
    for scene in list(scenes.values())[:20:2]:
        (hidden,) = set(scene.things) - set(scene.in_sight)
        whole, crated = (
            np.asarray(Image.open(folder / name)).astype(int)
            for name in (scene.file, scene.crated_file)
        )
        x, y, width, height = hidden.box
        inside = crated[y : y + height, x : x + width]
        assert not (inside == COLORS[hidden.color]).all(-1).any()
        rest = np.ones((64, 64), bool)
        rest[y - 2 : y + height + 2, x - 2 : x + width + 2] = False
        assert (whole == crated)[rest].all()


def test_files_are_read_as_any_others(folder: Path) -> None:
    entries = read_annotations(folder / "test.json", kind="image").entries
    gallery = build_gallery(entries)
    assert (len(gallery.videos), len(gallery.texts)) == (100, 200)
    assert {Path(file).suffix for file in gallery.videos} == {".png", ".jpg"}
    kinds = Counter(Image.open(file).format for file in gallery.videos)
    assert kinds == {"PNG": 50, "JPEG": 50}
    assert read_frames(gallery.videos[1]).shape == (1, 3, 64, 64)
    assert len(set(gallery.texts)) == 200
    train = read_annotations(folder / "train.json", kind="image").entries
    assert len(train) == 300
    assert all(len(entry.captions) == 1 for entry in train)


def test_captions_are_true(scenes: dict[str, Scene]) -> None:
    for scene in scenes.values():
        looks = {" ".join(thing.look): thing for thing in scene.things}
        where, sizes = captions(scene, 2)
        words = where.rstrip(".").split()
        first, second = looks[" ".join(words[1:3])], looks[" ".join(words[-2:])]
        if len(scene.things) == 2:
            assert f"{first.side_of(second)} " in where
            assert first.side_of(second) == OPPOSITE[second.side_of(first)]
        for name, thing in looks.items():
            assert name in where
            assert f"{thing.size} {name}" in sizes


def test_questions(folder: Path, scenes: dict[str, Scene]) -> None:
    known = set(read_answers(folder / "answers.json"))
    for split in SPLITS:
        asked = load(folder, f"{split}-questions")
        assert Counter(q["question_type"] for q in asked) == dict.fromkeys(TYPES, len(asked) // 5)
        assert all(len(q["answer"]) == 10 for q in asked)
        some = Counter(answer for q in asked for answer in set(q["answer"]))
        assert max(some.values()) <= 0.3 * len(asked)  # be it the answer of one of ten
        assert known >= some.keys()
        binary = Counter(most(q) for q in asked if q["question_type"] == "yes/no")
        assert abs(binary["yes"] - binary["no"]) <= 2
        for question in asked:
            check_answer(question, scenes[question["image"]])
    found = read_annotations(folder / "test-questions.json", kind="image", form=QUESTIONS)
    assert (len(found.entries), found.problems) == (500, ())
    assert any(len(question.answers) > 1 for question in found.entries)


def most(question: Any) -> str:
    names = {"none": "0", "one": "1", "two": "2", "three": "3"}
    return Counter(names.get(a, a) for a in question["answer"]).most_common(1)[0][0]


def check_answer(question: Any, scene: Scene) -> None:
    """Work out the answer from the words of the question."""
    words, answer = question["question"].rstrip("?").split(), most(question)
    look = {" ".join(thing.look): thing for thing in scene.things}
    if question["question_type"] in ("color", "shape"):
        (thing,) = [thing for thing in scene.things if thing.is_a(words[4])]
        assert answer in thing.look
    elif question["question_type"] == "count":
        word = words[2] if words[2] in COLORS else words[2].removesuffix("s").removesuffix("e")
        word = {"squar": "square", "circl": "circle", "triangl": "triangle"}.get(word, word)
        assert int(answer) == scene.count(word)
    elif question["question_type"] == "relation":
        second, first = look[" ".join(words[5:7])], look[" ".join(words[9:11])]
        assert answer == first.side_of(second)
    elif words[1] == "there":
        assert (answer == "yes") == (" ".join(words[3:5]) in look)
    else:
        first, second = look[" ".join(words[2:4])], look[" ".join(words[-2:])]
        assert (answer == "yes") == (words[4] == first.side_of(second))


def test_statements_cannot_be_guessed(folder: Path) -> None:
    for split, count in (("train", 4 * 6 * 128), ("test", 100 * 10)):
        rows = load(folder, f"{split}-reasoning")
        assert len(rows) == count
        labels = defaultdict(Counter)
        for row in rows:
            labels[row["sentence"]][row["label"]] += 1
            assert len(set(row["images"])) == 2
            assert all((folder / image).is_file() for image in row["images"])
        assert all(found["True"] == found["False"] for found in labels.values())
        for one, other in zip(rows[::2], rows[1::2], strict=True):
            assert len(set(one["images"]) & set(other["images"])) >= 1
    assert len(labels) > 40


def test_statements_to_train_on_share_their_pictures(folder: Path) -> None:
    pools, rounds = defaultdict(set), Counter()
    for row in load(folder, "train-reasoning"):
        pools[row["pool"]].update(row["images"])
    for pool in pools.values():
        assert len(pool) <= 25
        rounds.update(pool)
    assert len(rounds) == 150 and max(rounds.values()) == 4
    assert not any("pool" in row for row in load(folder, "test-reasoning"))


def test_statements_are_true_as_labelled(folder: Path, scenes: dict[str, Scene]) -> None:
    checked = 0
    for row in load(folder, "train-reasoning"):
        left, right = (scenes[image] for image in row["images"])
        words = row["sentence"].rstrip(".").split()
        word = next((w for w in words if w in COLORS), None) or next(
            (w.removesuffix("s") for w in words if w.startswith(("squ", "cir", "tri"))), None
        )
        if word is None or words[0] == "In":
            continue
        counts = left.count(word), right.count(word)
        if words[0] == "At" or words[3:5] == ["shows", "a"]:
            pair = (left, right)
            seen = [any(t.look == tuple(words[-2:]) for t in scene.things) for scene in pair]
            truth = any(seen) if words[0] == "At" else seen[words[1] == "right"]
            assert row["label"] == str(truth), row
            checked += 1
            continue
        truth = {
            "Both": min(counts) > 0,
            "Exactly": (counts[0] > 0) != (counts[1] > 0),
            "There": str(sum(counts)).replace("1", "one") == words[2],
            "The": counts[0] > counts[1],
        }[words[0]]
        assert row["label"] == str(truth), row
        checked += 1
    assert checked > 100


def test_hypotheses_cannot_be_guessed(folder: Path, scenes: dict[str, Scene]) -> None:
    by_name = {scene.file.rpartition(".")[0]: scene for scene in scenes.values()}
    rows = load(folder, "test-entailment")
    labels = defaultdict(Counter)
    for row in rows:
        labels[row["sentence"]][row["label"]] += 1
        name = row["image"].removesuffix("-crate")
        scene = by_name[name]
        look = tuple(row["sentence"].rstrip(".").split()[-2:])
        crated = row["image"] != name
        seen = any(t.look == look for t in (scene.in_sight if crated else scene.things))
        wanted = "entailment" if seen else "neutral" if crated else "contradiction"
        if " no " in row["sentence"] and wanted != "neutral":
            wanted = "contradiction" if seen else "entailment"
        assert row["label"] == wanted
    assert len(rows) == 300
    assert all(len(found) == 3 and len(set(found.values())) == 1 for found in labels.values())
    assert {" no " in text for text in labels} == {True, False}


def test_expressions_fit_one_thing(folder: Path, scenes: dict[str, Scene]) -> None:
    for scene in scenes.values():
        for text, thing in expressions(scene):
            words = set(text.removeprefix("the ").split()) - {"object"}
            like = [t for t in scene.things if words <= {t.size, t.color, t.shape}]
            assert like == [thing]
            assert not words & {"left", "right", "above", "below"}
    boxes = load(folder, "detections")
    for row in load(folder, "test-grounding"):
        assert row["box"] in boxes[str(row["image_id"])]


def test_classes_and_similar_texts(folder: Path, scenes: dict[str, Scene]) -> None:
    for split in ("train", "test"):
        mine = [scene for scene in scenes.values() if scene.split == split]
        rows = load(folder, f"{split}-classes")
        assert [row["image"] for row in rows] == [scene.file for scene in mine]
        for scene, row in zip(mine, rows, strict=True):
            assert row["labels"] == sorted(f"{t.color} {t.shape}" for t in scene.things)
        pairs = load(folder, f"{split}-similarity")
        assert len(pairs) == 3 * len(mine)
        for number, scene in enumerate(mine):
            same, alike, other = pairs[3 * number : 3 * number + 3]
            assert same["score"] == 5 > alike["score"] >= other["score"] >= 0
            for pair in (same, alike, other):
                sides = [
                    {f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" in pair[key].lower()}
                    for key in ("sentence1", "sentence2")
                ]
                assert sides[0] == {f"{t.color} {t.shape}" for t in scene.things}
                wanted = 5 * len(sides[0] & sides[1]) / len(sides[0] | sides[1])
                assert pair["score"] == pytest.approx(wanted, abs=0.01)
        scores = {pair["score"] for pair in pairs}
        assert {0, 5} < scores and len(scores) >= 4


def test_the_same_seed_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    build_pictures(tmp_path, SPEC)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) == 2 * 270 + 3 * 7 + 2
    for path in files:
        again = (tmp_path / path.relative_to(folder)).read_bytes()
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(again).digest(), path
    other = plan(PictureSpec(train_pictures=150, validation_pictures=20, seed=1))
    assert [scene.things for scene in other] != [scene.things for scene in plan(SPEC)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 8}, "size must be at least 32, got 8"),
        ({"test_pictures": 1}, "test_pictures must be at least 10, got 1"),
        ({"captions": 0}, "captions must be at least 1, got 0"),
        ({"test_pictures": 600}, "of 534 pictures at most, got 660"),
    ],
)
def test_what_cannot_be_drawn(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"pictures: .*{message}"):
        plan(PictureSpec(**change))
    if change == {"test_pictures": 600}:
        assert len(plan(PictureSpec(test_pictures=534 - 60, train_pictures=10))) == 544

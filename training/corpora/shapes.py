"""The demo's corpus: little videos of two events whose captions differ by the order alone.

Every scene is filmed twice. In the events corpus ("a red square, then a blue circle") both films
of a scene have the same frames in another order, so nothing but temporal order tells them apart.
In the motion corpus ("a red square moves left, then up") order is told by positions alone, which
is harder to learn.

Every frame also holds a thing that the caption does not name, of another color and shape than what
it does; it stays from the first frame to the last, and so tells nothing of the order. Of every film
it is known where the things are (`Film.masks`), and there are questions about it.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Order = tuple[int, ...]
Spot = NDArray[np.float64]
Shots = tuple[Picture, Mask]  # (frames, size, size, 3), (frames, 2, size, size)

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 220, 50),
    "purple": (170, 50, 200),
    "cyan": (50, 210, 220),
    "brown": (150, 90, 40),
    "pink": (240, 120, 180),
}
SHAPES = ("square", "circle", "cross")  # which a single patch of 8 pixels tells apart
COUNTS = ("none", "one", "two")
ORDERS: tuple[Order, ...] = ((0, 1), (1, 0))
TRIES = 50  # places that are drawn at once
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Opposite directions would bring the shape back, and both orders to the same place.
TURNS = tuple(
    (first, second)
    for first, second in itertools.combinations(DIRECTIONS, 2)
    if {first, second} not in ({"left", "right"}, {"up", "down"})
)


@dataclass(frozen=True, kw_only=True)
class CorpusSpec:
    """What to film."""

    motion: bool = False
    """Film moving shapes instead of one shape after another."""
    size: int = 32
    """Height and width of the frames."""
    frames: int = 16
    """Frames of a film; each event takes half of them."""
    train_films: int = 4
    """Films of every training scene, with other places, sizes and backgrounds; each in both
    orders. Validation and test films are made once."""
    validation_scenes: int = 25
    test_scenes: int = 50
    seed: int = 0


def build_corpus(
    folder: str | Path,
    spec: CorpusSpec,
    progress: Callable[[Iterable[Film]], Iterable[Film]] = iter,
) -> dict[str, Path]:
    """Film a corpus: `videos/*.mp4` (H.264) and `train.json`, `validation.json`, `test.json`.

    `train-questions.json` and so on ask about the same films, `answers.json` has every answer. The
    splits share no scene: what is tested was never seen in training, in either order.

    Args:
        folder: where to; made if missing.
        spec: what to film.
        progress: wraps the list of films, such as tqdm.

    Returns:
        The annotation file of each split.
    """
    folder = Path(folder)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    captions: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    questions: dict[str, list[dict[str, str]]] = {split: [] for split in captions}
    for film in progress(plan(spec)):
        for order, pictures in film.shoot(spec).items():
            about = {"video": film.video(order), "scene": film.name}
            write_video(folder / about["video"], pictures)
            captions[film.split].append({**about, "caption": film.caption(order)})
            questions[film.split] += [{**about, **asked} for asked in film.questions(order)]
    answers = {asked["answer"] for asked in itertools.chain(*questions.values())}
    contents: dict[str, Sequence[Any]] = {"answers": sorted(answers)}
    contents |= {f"{split}-questions": asked for split, asked in questions.items()}
    for name, content in (contents | captions).items():
        text = json.dumps(content, indent=1) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return {split: folder / f"{split}.json" for split in captions}


@dataclass(frozen=True, kw_only=True)
class Film:
    """A scene filmed once: two events, to be shown in either order."""

    name: str
    split: str
    events: tuple[tuple[str, ...], tuple[str, ...]]
    seed: tuple[int, ...]

    @property
    def distractor(self) -> tuple[str, str]:
        """Color and shape of the thing that the caption does not name."""
        named = {word for event in self.events for word in event}
        rng = np.random.default_rng((*self.seed, 1))
        color, shape = (rng.choice([x for x in all if x not in named]) for all in (COLORS, SHAPES))
        return str(color), str(shape)

    @property
    def things(self) -> list[tuple[str, ...]]:
        """Color and shape of all that is seen."""
        return [*dict.fromkeys(event[:2] for event in self.events), self.distractor]

    def video(self, order: Order) -> str:
        """The file of an order, in the folder of the corpus."""
        return f"videos/{self.name}-{'ab' if order == (0, 1) else 'ba'}.mp4"

    def caption(self, order: Sequence[int]) -> str:
        first, second = (self.events[k] for k in order)
        if len(first) == 2:
            return f"A {first[0]} {first[1]}, then a {second[0]} {second[1]}."
        return f"A {first[0]} {first[1]} moves {first[2]}, then {second[2]}."

    def questions(self, order: Order) -> list[dict[str, str]]:
        """Questions about what the caption of an order names, with their types and answers.

        The first of them has two answers, between which the order decides. The next ask for the
        color of each thing, and the last how many things have a shape: for every number that some
        shape has, one of these.
        """
        rng = np.random.default_rng((*self.seed, 2))
        guess = ORDERS[rng.integers(2)]
        right = "yes" if guess == order else "no"
        asked = [("order", self.caption(guess).replace(".", "?"), right)]
        named = self.things[:-1]
        numbers = Counter(shape for _, shape in named)
        said = self.caption(order).replace(".", "?")
        for color, shape in named:
            blank = said.replace(f"A {color} {shape}", f"What colour {shape}")
            blank = blank.replace(f"a {color} {shape}", f"what colour {shape}")
            asked.append(("colour", blank, color))
        others = [shape for shape in SHAPES if shape != self.distractor[1]]
        for number, word in enumerate(COUNTS):
            if shapes := [shape for shape in others if numbers[shape] == number]:
                shape = str(rng.choice(shapes))
                plural = f"{shape}es" if shape.endswith("s") else f"{shape}s"
                asked.append(("count", f"How many {plural} are there?", word))
        keys = ("question_type", "question", "answer")
        return [dict(zip(keys, one, strict=True)) for one in asked]

    def shoot(self, spec: CorpusSpec) -> dict[Order, Picture]:
        """The pictures of each order, uint8 ``(frames, size, size, 3)``."""
        return {order: pictures for order, (pictures, _) in self._shoot(spec).items()}

    def masks(self, spec: CorpusSpec) -> dict[Order, Mask]:
        """Of each order, the pixels of what the caption names, and those of the distractor.

        Returns:
            bool ``(frames, 2, size, size)`` each.
        """
        return {order: masks for order, (_, masks) in self._shoot(spec).items()}

    def _shoot(self, spec: CorpusSpec) -> dict[Order, Shots]:
        half, size = spec.frames // 2, spec.size
        moves = len(self.events[0]) > 2
        rng = np.random.default_rng(self.seed)
        shade = rng.integers(10, 50)  # darker than any color, so that shapes look alike in each
        noise = rng.normal(shade, 6, (size, size, 1))
        radius = size * rng.uniform(0.22, 0.25) * (0.8 if moves else 1)
        clear = np.zeros(TRIES, dtype=bool)
        while not clear.any():  # a place for the distractor, away from all that is named
            spots = self._paths(rng, spec, radius) if moves else self._places(rng, spec, radius)
            places = rng.uniform(radius, size - radius, (TRIES, 1, 2))
            taken = np.concatenate([path.reshape(-1, 2) for path in spots.values()])
            clear = abs(places - taken).max(-1).min(1) > 1.7 * radius
        others = places[clear.argmax()] + rng.normal(0, size / 96, (2, half, 2))
        shots = {}
        for order in ORDERS:
            events = [
                _draw(noise, (self.events[k][:2], path), (self.distractor, others[k]), radius)
                for k, path in zip(order, spots[order], strict=True)
            ]
            pictures, masks = (np.concatenate(part) for part in zip(*events, strict=True))
            shots[order] = pictures, masks
        return shots

    def _places(self, rng: Generator, spec: CorpusSpec, radius: float) -> dict[Order, Spot]:
        """Spots ``(2, frames / 2, 2)`` of each order: every event stays about its place."""
        half, size = spec.frames // 2, spec.size
        places = rng.uniform(radius, size - radius, (2, 1, 2))
        steps = places + rng.normal(0, size / 96, (2, half, 2))
        return {order: steps[list(order)] for order in ORDERS}

    def _paths(self, rng: Generator, spec: CorpusSpec, radius: float) -> dict[Order, Spot]:
        """Spots ``(2, frames / 2, 2)`` of each order: two straight lines, from the same start."""
        half, size = spec.frames // 2, spec.size
        stride = size * rng.uniform(0.25, 0.35)
        moves = [np.array(DIRECTIONS[event[2]]) * stride for event in self.events]
        total = moves[0] + moves[1]
        low = radius + np.maximum(0, -total)
        start = rng.uniform(low, size - radius - np.maximum(0, total))
        paths = {}
        for order in ORDERS:
            corner = start + moves[order[0]]
            ends = ((start, corner), (corner, start + total))
            paths[order] = np.stack([np.linspace(*pair, half) for pair in ends])
        return paths


def plan(spec: CorpusSpec) -> list[Film]:
    """Every film of a corpus, split by scene."""
    things = list(itertools.product(COLORS, SHAPES))
    scenes: list[tuple[tuple[str, ...], tuple[str, ...]]]
    if spec.motion:
        scenes = [((*t, a), (*t, b)) for t in things for a, b in TURNS]
    else:
        scenes = list(itertools.combinations(things, 2))
    held_out = spec.validation_scenes + spec.test_scenes
    if not 0 < held_out < len(scenes):
        raise ValueError(
            f"corpus: validation and test scenes must leave some of {len(scenes)} to train on,"
            f" got {held_out}"
        )
    if spec.frames < 2 or spec.train_films < 1:
        raise ValueError("corpus: a film needs two frames, and a training scene one film")
    order = np.random.default_rng(spec.seed).permutation(len(scenes))
    films = []
    for rank, number in enumerate(order.tolist()):
        split, takes = "train", spec.train_films
        if rank < held_out:
            split, takes = ("test" if rank < spec.test_scenes else "validation"), 1
        for take in range(takes):
            films.append(
                Film(
                    name=f"{split}-{number:03d}-{take}",
                    split=split,
                    events=scenes[number],
                    seed=(spec.seed, number, take),
                )
            )
    return films


def write_video(path: Path, pictures: Picture | Sequence[Picture], *, rate: int = 8) -> None:
    """Encode pictures (height, width, 3) as H.264 in an mp4 file."""
    height, width = pictures[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _draw(
    background: NDArray[np.float64],
    named: tuple[tuple[str, ...], Spot],
    other: tuple[tuple[str, ...], Spot],
    radius: float,
) -> Shots:
    """Frames, and the pixels of what is named and of the other thing, over which that lies."""
    masks: list[Mask] = []
    pictures = background
    for (color, shape), places in (other, named):
        masks.append(_inside(shape, places, radius, len(background)))
        pictures = np.where(masks[-1][..., None], np.array(COLORS[color]), pictures)
    hidden, seen = masks
    return pictures.clip(0, 255).astype(np.uint8), np.stack([seen, hidden & ~seen], 1)


def _inside(shape: str, places: Spot, radius: float, size: int) -> Mask:
    """``(frames, size, size)``: the pixels of a shape at places ``(frames, 2)``."""
    y, x = np.ogrid[:size, :size]
    x, y = ((axis + 0.5 - places[:, k, None, None]) / radius for k, axis in enumerate((x, y)))
    inside: Mask
    if shape == "square":
        inside = np.maximum(abs(x), abs(y)) < 0.85
    elif shape == "circle":
        inside = abs(np.hypot(x, y) - 0.8) < 0.2
    else:
        inside = (np.minimum(abs(x), abs(y)) < 0.26) & (np.maximum(abs(x), abs(y)) < 1)
    return inside

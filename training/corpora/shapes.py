"""The demo's corpus: little videos of two events whose captions differ by the order alone.

Every scene is filmed twice. In the events corpus ("a red square, then a blue circle") both films
of a scene have the same frames in another order, so nothing but temporal order tells them apart.
In the motion corpus ("a red square moves left, then up") order is told by positions alone, which
is harder to learn.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 220, 50),
    "purple": (170, 50, 200),
    "cyan": (50, 210, 220),
}
SHAPES = ("square", "circle", "triangle", "cross")
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

    The splits share no scene: what is tested was never seen in training, in either order.

    Args:
        folder: where to; made if missing.
        spec: what to film.
        progress: wraps the list of films, such as tqdm.

    Returns:
        The annotation file of each split.
    """
    folder = Path(folder)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    films = plan(spec)
    annotations: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for film in progress(films):
        scene = film.shoot(spec)
        for suffix, half in (("ab", (0, 1)), ("ba", (1, 0))):
            name = f"videos/{film.name}-{suffix}.mp4"
            write_video(folder / name, scene[half])
            entry = {"video": name, "caption": film.caption(half), "scene": film.name}
            annotations[film.split].append(entry)
    paths = {}
    for split, entries in annotations.items():
        paths[split] = folder / f"{split}.json"
        paths[split].write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return paths


@dataclass(frozen=True, kw_only=True)
class Film:
    """A scene filmed once: two events, to be shown in either order."""

    name: str
    split: str
    events: tuple[tuple[str, ...], tuple[str, ...]]
    seed: tuple[int, ...]

    def caption(self, order: Sequence[int]) -> str:
        first, second = (self.events[k] for k in order)
        if len(first) == 2:
            return f"A {first[0]} {first[1]}, then a {second[0]} {second[1]}."
        return f"A {first[0]} {first[1]} moves {first[2]}, then {second[2]}."

    def shoot(self, spec: CorpusSpec) -> dict[tuple[int, ...], list[Picture]]:
        """The pictures of each order."""
        half = spec.frames // 2
        size = spec.size
        orders = ((0, 1), (1, 0))
        rng = np.random.default_rng(self.seed)
        shade = rng.integers(70, 150)
        noise = rng.normal(shade, 6, (size, size, 1))
        radius = size * rng.uniform(0.2, 0.3)
        if not self.events[0][2:]:
            halves = []
            for color, shape in self.events:
                place = rng.uniform(radius, size - radius, 2)
                steps = place + rng.normal(0, size / 64, (half, 2))
                halves.append([_draw(noise, color, shape, spot, radius) for spot in steps])
            return {order: halves[order[0]] + halves[order[1]] for order in orders}
        color, shape = self.events[0][:2]
        radius *= 0.7
        stride = size * rng.uniform(0.25, 0.35)
        moves = [np.array(DIRECTIONS[event[2]]) * stride for event in self.events]
        total = moves[0] + moves[1]
        low = radius + np.maximum(0, -total)
        start = rng.uniform(low, size - radius - np.maximum(0, total))
        pictures: dict[tuple[int, ...], list[Picture]] = {}
        for order in orders:
            corner = start + moves[order[0]]
            path = np.concatenate(
                [np.linspace(start, corner, half), np.linspace(corner, start + total, half)]
            )
            pictures[order] = [_draw(noise, color, shape, spot, radius) for spot in path]
        return pictures


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


def write_video(path: Path, pictures: Sequence[Picture], *, rate: int = 8) -> None:
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
    background: NDArray[np.float64], color: str, shape: str, place: Picture, radius: float
) -> Picture:
    size = background.shape[0]
    y, x = np.mgrid[:size, :size] + 0.5
    x, y = (x - place[0]) / radius, (y - place[1]) / radius
    if shape == "square":
        inside = np.maximum(abs(x), abs(y)) < 0.85
    elif shape == "circle":
        inside = np.hypot(x, y) < 1
    elif shape == "triangle":
        inside = (y < 0.8) & (y > 2 * abs(x) - 1)
    else:
        inside = (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1)
    picture = np.where(inside[..., None], np.array(COLORS[color]), background)
    return picture.clip(0, 255).astype(np.uint8)

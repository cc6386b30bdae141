"""Scenes of two or three things of which no two look alike: which there are, and their pictures.

Of any two things of a scene one is clearly left of the other, or clearly above it, and some colour
and some shape belong to one thing alone, so that it can be asked about. What a scene is, is its set
of things: the splits share none.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from svitt_ops.training.corpora import shapes

Split = Literal["test", "validation", "train"]
Box = tuple[int, int, int, int]
Look = tuple[str, str]
"""Colour and shape."""
COLORS = {
    name: shapes.COLORS[name] for name in ("red", "green", "blue", "yellow", "purple", "cyan")
}
SHAPES = ("square", "circle", "triangle", "cross")
SIDES = {"small": 0.16, "large": 0.3}
"""Of the box of a thing, as a share of the picture's."""
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
CRATE = ((110, 85, 60), (70, 50, 35))
"""Colours of a crate, and of its edges."""
SLANT = 1.5
"""How much farther apart things are along one axis than along the other."""
TRIES = 64
EDGE = 2  # of a crate beyond the thing that it hides, in pixels


@dataclass(frozen=True, kw_only=True)
class PictureSpec:
    """What to draw."""

    size: int = 64
    """Height and width of the pictures."""
    train_pictures: int = 1600
    validation_pictures: int = 60
    test_pictures: int = 100
    """Of as many scenes; those of training may be drawn several times."""
    captions: int = 2
    """Of a picture."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Thing:
    """What is seen of a scene."""

    color: str
    shape: str
    size: str
    box: Box
    """Left, top, width and height in pixels; nothing of it is outside, and it touches each side."""

    @property
    def look(self) -> Look:
        return self.color, self.shape

    def is_a(self, word: str) -> bool:
        """Whether a colour, a shape, or "object" is that of this thing."""
        return word in (self.color, self.shape, "object")

    def side_of(self, other: Thing) -> str:
        """On which side of another thing it is: "left", "right", "above" or "below"."""
        (x, y), (other_x, other_y) = _center(self.box), _center(other.box)
        if abs(x - other_x) > abs(y - other_y):
            return "left" if x < other_x else "right"
        return "above" if y < other_y else "below"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Things at their places."""

    number: int
    """Among all pictures of the corpus."""
    split: Split
    things: tuple[Thing, ...]
    extent: int
    """Height and width of its picture."""
    seed: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"

    @property
    def file(self) -> str:
        """Its picture, in the folder of the corpus: of every two, one is a PNG and one a JPEG."""
        return f"pictures/{self.name}.{('png', 'jpg')[self.number % 2]}"

    @property
    def crated_file(self) -> str:
        """The picture of the same scene with a crate over one thing."""
        return self.file.replace(self.name, f"{self.name}-crate")

    @property
    def in_sight(self) -> tuple[Thing, ...]:
        """The things that are not under the crate."""
        hidden = self._hidden
        return tuple(thing for k, thing in enumerate(self.things) if k != hidden)

    @property
    def _hidden(self) -> int:
        return self.number // 2 % len(self.things)

    def count(self, word: str) -> int:
        """How many things are of a colour or of a shape; or how many there are, of "object"."""
        return sum(thing.is_a(word) for thing in self.things)

    def random(self, purpose: int) -> Generator:
        """Random numbers of this scene for some purpose."""
        return np.random.default_rng((*self.seed, purpose))

    def draw(self, *, crated: bool = False) -> Image.Image:
        """Its picture, in RGB."""
        rng = self.random(0)
        shade = rng.integers(10, 50)  # darker than any colour
        noise = rng.normal(shade, 6, (self.extent, self.extent, 1)).clip(0, 255)
        picture = Image.fromarray(np.broadcast_to(noise, (*noise.shape[:2], 3)).astype(np.uint8))
        pen = ImageDraw.Draw(picture)
        for thing in self.things:
            _draw_shape(pen, thing.shape, thing.box, COLORS[thing.color])
        if crated:
            x, y, width, height = self.things[self._hidden].box
            fill, edge = CRATE
            corners = (x - EDGE, y - EDGE, x + width + EDGE - 1, y + height + EDGE - 1)
            pen.rectangle(corners, fill, edge, width=EDGE)
            pen.line((x, y, x + width - 1, y + height - 1), edge, width=EDGE)
        return picture


def plan(spec: PictureSpec) -> list[Scene]:
    """Every scene of a corpus, split by its set of things; a third of each split has two things.

    Raises:
        ValueError: the specification cannot be met; says what it must be, and what it was.
    """
    _check(spec)
    rng = np.random.default_rng(spec.seed)
    sets = {count: _sets(rng, count) for count in (2, 3)}
    held_out = (spec.validation_pictures + spec.test_pictures + 2) // 3 + 1
    if held_out >= len(sets[2]):
        raise ValueError(
            f"pictures: validation and test must leave sets of things to train on, of"
            f" {3 * len(sets[2]) - 6} pictures at most, got"
            f" {spec.validation_pictures + spec.test_pictures}"
        )
    scenes: list[Scene] = []
    pictures = {"test": spec.test_pictures, "validation": spec.validation_pictures}
    for split in get_args(Split):
        for number in range(pictures.get(split, spec.train_pictures)):
            looks = sets[2 + (number % 3 < 2)].popleft()
            if split == "train":  # may be drawn again, at other places
                sets[len(looks)].append(looks)
            scenes.append(_compose(spec, split, len(scenes), looks))
    return scenes


def _check(spec: PictureSpec) -> None:
    pictures = dict.fromkeys(("train_pictures", "validation_pictures", "test_pictures"), 10)
    for name, minimum in ({"size": 32, "captions": 1, "seed": 0} | pictures).items():
        value = getattr(spec, name)
        if value < minimum:
            raise ValueError(f"pictures: {name} must be at least {minimum}, got {value}")


def _sets(rng: Generator, count: int) -> deque[tuple[Look, ...]]:
    """All sets of things in which some colour and some shape is that of one thing alone."""
    looks = itertools.combinations(itertools.product(COLORS, SHAPES), count)
    usable = [
        some
        for some in looks
        if all(1 in Counter(words).values() for words in zip(*some, strict=True))
    ]
    return deque(usable[k] for k in rng.permutation(len(usable)))


def _compose(spec: PictureSpec, split: Split, number: int, looks: Sequence[Look]) -> Scene:
    """Things of random sizes at random places, in random order."""
    seed = (spec.seed, number)
    rng = np.random.default_rng(seed)
    sizes = [str(size) for size in rng.choice([*SIDES], len(looks))]
    sides = np.array([round(SIDES[size] * spec.size) for size in sizes])
    corners = _place(rng, sides, spec.size)
    things = [
        Thing(color=color, shape=shape, size=size, box=(x, y, side, side))
        for (color, shape), size, side, (x, y) in zip(
            looks, sizes, sides.tolist(), corners.tolist(), strict=True
        )
    ]
    order = rng.permutation(len(things))
    return Scene(
        number=number,
        split=split,
        things=tuple(things[k] for k in order),
        extent=spec.size,
        seed=seed,
    )


def _place(rng: Generator, sides: NDArray[np.int64], extent: int) -> NDArray[np.int64]:
    """Left upper corners ``(things, 2)`` of boxes that stand clear of each other, and of edges."""
    sides = sides[:, None]
    apart = (sides + sides.T) / 2 + 2 * EDGE
    same = np.eye(len(sides), dtype=bool)
    while True:
        corners = rng.integers(EDGE, extent - EDGE - sides + 1, (TRIES, len(sides), 2))
        centers = corners + sides / 2
        gaps = abs(centers[:, :, None] - centers[:, None])
        near, far = gaps.min(-1), gaps.max(-1)
        clear = ((far >= apart) & (far >= SLANT * near)) | same
        fits = clear.all((1, 2))
        if fits.any():
            found: NDArray[np.int64] = corners[fits.argmax()]
            return found


def _center(box: Box) -> tuple[float, float]:
    x, y, width, height = box
    return x + width / 2, y + height / 2


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, box: Box, color: tuple[int, int, int]
) -> None:
    x, y, width, height = box
    right, bottom = x + width - 1, y + height - 1  # Pillow draws the last row and column too
    if shape == "square":
        pen.rectangle((x, y, right, bottom), color)
    elif shape == "circle":
        pen.ellipse((x, y, right, bottom), color)
    elif shape == "triangle":
        pen.polygon([(x, bottom), (right, bottom), (x + (width - 1) / 2, y)], color)
    else:
        arm = width // 3
        pen.rectangle((x + arm, y, right - arm, bottom), color)
        pen.rectangle((x, y + arm, right, bottom - arm), color)

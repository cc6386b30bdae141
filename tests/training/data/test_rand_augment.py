"""RandAugment: what is drawn, and each change beside Pillow's."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from svitt_ops.training.data.augment import Augmentation, to_pixel_values
from svitt_ops.training.data.rand_augment import KINDS, MOST, change, draw_changes
from svitt_ops.training.engine.recipes import load_recipe

SIDE = 64


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth, with noise, of a narrow range."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    waves = np.stack([np.sin(5 * rows + k) * np.cos(4 * columns) for k in range(3)], -1)
    pixels = 110 + 60 * waves + rng.normal(0, 20, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.clip(20, 220).astype(np.uint8))


def tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def moved(matrix: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    """By where a pixel of the result comes from."""
    near, grey = Image.Resampling.BILINEAR, (128, 128, 128)
    return lambda x: x.transform(
        (SIDE, SIDE), Image.Transform.AFFINE, matrix, resample=near, fillcolor=grey
    )


MIDDLE = (SIDE - 1) / 2
PILLOW: dict[tuple[str, float], Callable[[Image.Image], Any]] = {
    ("autocontrast", 1.36): ImageOps.autocontrast,
    ("equalize", 1.36): ImageOps.equalize,
    ("brightness", 1.36): lambda x: ImageEnhance.Brightness(x).enhance(1.36),
    ("brightness", 0.1): lambda x: ImageEnhance.Brightness(x).enhance(0.1),
    ("sharpness", 1.36): lambda x: ImageEnhance.Sharpness(x).enhance(1.36),
    ("sharpness", 0.1): lambda x: ImageEnhance.Sharpness(x).enhance(0.1),
    ("shear_x", 0.2): moved((1, -0.2, 0.2 * (MIDDLE + 0.5), 0, 1, 0)),
    ("shear_y", -0.2): moved((1, 0, 0, 0.2, 1, -0.2 * (MIDDLE + 0.5))),
    ("move_x", 7): moved((1, 0, -7, 0, 1, 0)),
    ("move_y", -7): moved((1, 0, 0, 0, 1, 7)),
    ("rotate", 21): lambda x: x.rotate(21, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)),
}


@pytest.mark.parametrize("kind", PILLOW, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def test_a_change_is_pillows(photo: Image.Image, kind: tuple[str, float]) -> None:
    found, wanted = change(tensor(photo), [kind]), tensor(PILLOW[kind](photo))
    before = (tensor(photo) - wanted).abs().mean()
    assert found.shape == wanted.shape and found.min() >= 0 and found.max() <= 1
    assert (found - wanted).abs().mean() < min(0.012, before / 4)  # Pillow rounds; edges differ


def test_each_kind_is_there() -> None:
    assert {kind for kind, _ in PILLOW} | {"identity"} == set(KINDS)


@pytest.mark.parametrize("kind", ["autocontrast", "equalize", "sharpness"])
def test_a_channel_of_one_value_stays(kind: str) -> None:
    flat = torch.tensor([0.0, 0.4, 1.0]).view(1, 3, 1, 1).expand(2, 3, 16, 16)
    torch.testing.assert_close(change(flat, [(kind, 1.5)]), flat, rtol=0, atol=1 / 255)


def test_what_is_drawn() -> None:
    drawn = [draw_changes(random.Random(k), 2, 7) for k in range(4000)]
    assert drawn[:9] == [draw_changes(random.Random(k), 2, 7) for k in range(9)]
    counts = np.bincount([len(changes) for changes in drawn], minlength=3) / 4000
    assert counts == pytest.approx([0.55**2, 2 * 0.45 * 0.55, 0.45**2], abs=0.03)
    amounts: dict[str, set[float]] = {}
    for kind, amount in (pair for changes in drawn for pair in changes):
        amounts.setdefault(kind, set()).add(round(amount, 6))
    wanted = {kind: {0.7 * most, -0.7 * most} for kind, most in MOST.items()}
    assert amounts.keys() == set(KINDS) - {"identity"}
    assert all(amounts[kind] == {round(x, 6) for x in both} for kind, both in wanted.items())
    assert amounts["brightness"] == amounts["sharpness"] == {1.36}
    assert all(len(draw_changes(random.Random(k), 2, 7)) <= 2 for k in range(99))


def test_frames_change_alike_and_other_clips_do_not(photo: Image.Image) -> None:
    frames = (tensor(photo) * 255).byte().expand(3, -1, -1, -1)
    changes = [(("rotate", 20.0), ("brightness", 0.5)), ()]
    plain = to_pixel_values(torch.stack([frames, frames]), 32)
    found = to_pixel_values(torch.stack([frames, frames]), 32, changes=changes)
    assert torch.equal(found[1], plain[1]) and not torch.equal(found[0], plain[0])
    assert torch.equal(found[0], found[0][:1].expand_as(found[0]))
    assert found.abs().max() <= 1
    assert Augmentation().changes(random.Random(0)) == ()


@pytest.mark.parametrize("wrong", ["[0, 7]", "[2, 11]", "[2, -1]", "[2]", "2", "[2, x]"])
def test_recipes(wrong: str, tmp_path: Path) -> None:
    given = [f"output={tmp_path}", "data.train=[{annotations: a.json}]"]
    assert load_recipe(None, [*given, "data.rand_augment=[2, 7]"]).data.rand_augment == (2, 7)
    with pytest.raises(ValueError, match=r"data.rand_augment.* must be .*, got"):
        load_recipe(None, [*given, f"data.rand_augment={wrong}"])

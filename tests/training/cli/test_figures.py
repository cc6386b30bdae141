"""Figures of survivors: nothing of them is cut off."""

from pathlib import Path
from typing import Any

import pytest
import torch

from svitt_ops.training.cli.figures import Survivors, draw_survivors

LONG = " ".join(["a man in a red jacket walks two small dogs along the frozen river"] * 6)


def sample(frames: int, caption: str, *, stages: int = 3, trained: bool = False) -> Survivors:
    count = frames * 16
    return Survivors(
        frames=torch.zeros(frames, 3, 32, 32, dtype=torch.uint8),
        caption=caption,
        grid=4,
        visual=tuple(torch.arange(count // (k + 2)) for k in range(stages)),
        multimodal=torch.arange(count // 8),
        fusion_trained=trained,
    )


def picture(path: Path) -> Any:
    """Of a figure, whether each pixel has ink."""
    image = pytest.importorskip("matplotlib.image")
    return (image.imread(path)[..., :3] < 0.99).any(-1)


@pytest.mark.parametrize(
    "samples",
    [
        [sample(1, "a")],
        [sample(1, LONG, stages=12)],
        [sample(4, "a dog jumps")],
        [sample(8, "W" * 400)],
        [sample(16, LONG, trained=True), sample(4, "costs $5 and $6_{"), sample(1, "")],
    ],
    ids=["1", "1-long", "4", "8-wide", "several"],
)
def test_words_and_pictures_are_inside(samples: list[Survivors], tmp_path: Path) -> None:
    ink = picture(draw_survivors(samples, tmp_path / "figure.png"))
    margin = 4
    for border in (ink[:margin], ink[-margin:], ink[:, :margin], ink[:, -margin:]):
        assert not border.any()
    assert ink[:, :60].any()  # the words that stand left of the pictures, which start at 140


def test_a_caption_is_no_formula(tmp_path: Path) -> None:
    draw_survivors([sample(2, r"$\foo{ and $5")], tmp_path / "figure.png")

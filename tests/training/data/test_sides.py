"""Mirroring makes a caption false that names a side: those clips stay as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from svitt_ops.training.data.augment import Augmentation
from svitt_ops.training.data.collate import Collator
from svitt_ops.training.data.datasets import Clip
from svitt_ops.training.data.text import clean_caption, names_a_side, train_tokenizer


@pytest.mark.parametrize(
    "caption",
    [
        "A car moves left.",
        "turning RIGHT",
        "the left-hand drawer",
        "the leftmost of three",
        "two steps rightwards",
        "it turns clockwise",
        "turning counter-clockwise",
        "it spins anticlockwise",
        "pushing something from left to right",
    ],
)
def test_captions_that_name_a_side(caption: str) -> None:
    assert names_a_side(clean_caption(caption))


@pytest.mark.parametrize("caption", ["a car moves up", "bright lights", "a clock", "a cleft chin"])
def test_captions_that_name_none(caption: str) -> None:
    assert not names_a_side(clean_caption(caption))


def test_their_clips_are_never_mirrored() -> None:
    captions = ["a car moves left", "a car moves up"] * 100
    collate = Collator(
        tokenizer=train_tokenizer(captions, 60), augmentation=Augmentation(flip=True)
    )
    frames = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    flips: Any = collate([Clip(frames, c, k, k) for k, c in enumerate(captions)])["flips"]
    assert not any(flips[::2])
    assert 25 < sum(flips[1::2]) < 75


def test_the_guide_says_so() -> None:
    guide = Path(__file__).parents[3] / "docs" / "train.md"
    assert "never one whose caption speaks of left, right or clockwise" in guide.read_text()

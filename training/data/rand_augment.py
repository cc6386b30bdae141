"""RandAugment, of the kinds that ALBEF's authors kept: no colour of a thing becomes another one.

Source: Cubuk et al. 2020; kinds, strengths and the chance of each are those of ALBEF's released
training. Drawn with the batch, applied on the training device, the same for a clip's frames.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from kornia.enhance import equalize, sharpness
from kornia.geometry.transform import warp_affine
from torch import Tensor

from svitt_ops.training.data import STRONGEST

Change = tuple[str, float]  # its kind, and how much: a factor, a share, pixels or degrees

CHANCE = 0.5
FACTORS = (0.1, 1.9)
"""Of brightness and sharpness, at strengths 0 and 10; 1 changes nothing."""
MOST = {"shear_x": 0.3, "shear_y": 0.3, "move_x": 10.0, "move_y": 10.0, "rotate": 30.0}
"""At strength 10: a share, pixels, degrees; either way."""
KINDS = ("identity", "autocontrast", "equalize", "brightness", "sharpness", *MOST)
GREY = 0.5  # of what comes in from outside


def draw_changes(rng: random.Random, count: int, strength: int) -> tuple[Change, ...]:
    """`count` of ten kinds, of a strength of 0 to 10; each is made half the time."""
    found = []
    for kind in rng.choices(KINDS, k=count):
        made, sign, share = rng.random() < CHANCE, rng.choice((-1, 1)), strength / STRONGEST
        low, high = FACTORS
        amount = sign * share * MOST[kind] if kind in MOST else low + share * (high - low)
        if made and kind != "identity":
            found.append((kind, amount))
    return tuple(found)


def change(frames: Tensor, changes: Sequence[Change]) -> Tensor:
    """Frames after changes, one after another, fp32 (frames, 3, height, width) in [0, 1]."""
    for kind, amount in changes:
        if kind == "equalize":
            frames = equalize(frames)
        elif kind == "autocontrast":
            frames = _stretched(frames)
        elif kind == "brightness":
            frames = (frames * amount).clamp(0, 1)
        elif kind == "sharpness":
            frames = sharpness(frames, amount)
        else:
            frames = _moved(frames, kind, amount)
    return frames


def _stretched(frames: Tensor) -> Tensor:
    """Each channel from black to full; one of a single value stays."""
    low, high = frames.amin((-2, -1), keepdim=True), frames.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (frames - low) / (high - low), frames)


def _moved(frames: Tensor, kind: str, amount: float) -> Tensor:
    """Sheared, shifted or turned about the middle."""
    height, width = frames.shape[-2:]
    turn = math.radians(amount) if kind == "rotate" else 0.0
    across, down = (amount if kind == f"shear_{axis}" else 0.0 for axis in "xy")
    linear = torch.tensor(
        [[math.cos(turn), math.sin(turn) + across], [down - math.sin(turn), math.cos(turn)]]
    )
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2])
    shift = torch.tensor([amount if kind == f"move_{axis}" else 0.0 for axis in "xy"])
    matrix = torch.cat([linear, (middle - linear @ middle + shift)[:, None]], 1).to(frames)
    return warp_affine(
        frames,
        matrix.expand(len(frames), 2, 3),
        (height, width),
        padding_mode="fill",
        fill_value=torch.full((3,), GREY).to(frames),
    )

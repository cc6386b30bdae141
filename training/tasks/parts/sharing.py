"""Texts of a batch about the same clip or picture: it is in the batch, and encoded, once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from svitt_ops.training.data.transport import Batch


def share_clips(batch: Batch, names: Sequence[Hashable]) -> None:
    """Keep the first of the clips of each name, and note as `clip_numbers` which each one was.

    Args:
        batch: a collator's, with a clip and what augmentation drew for it for each name. A clip is
            mirrored if all those of its name may be: none of their texts names a side.
        names: of the clips; those of one name are alike.
    """
    first: dict[Hashable, int] = {}
    for place, name in enumerate(names):
        first.setdefault(name, place)
    kept = list(first.values())
    numbers = {name: number for number, name in enumerate(first)}
    of_texts = [numbers[name] for name in names]
    clips = batch["clips"]
    batch["clips"] = clips[kept] if isinstance(clips, Tensor) else [clips[k] for k in kept]
    for drawn in ("boxes", "changes"):
        batch[drawn] = [batch[drawn][k] for k in kept]
    flips = [batch["flips"][k] for k in kept]
    for number, flip in zip(of_texts, batch["flips"], strict=True):
        flips[number] &= flip
    batch["flips"] = flips
    batch["clip_numbers"] = torch.tensor(of_texts)

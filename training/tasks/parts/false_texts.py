"""Texts of other clips, among which a model is to choose a clip's own.

Source: METER (CVPR 2022), whose fine-tuning for retrieval SCL (CVPR 2023) has.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from svitt_ops.training.data.collate import Collator, encode_texts
from svitt_ops.training.data.columns import FileNames
from svitt_ops.training.data.datasets import Clip, PairDataset
from svitt_ops.training.data.transport import Batch

ATTEMPTS = 100
"""Draws for a false text before a corpus counts as one without."""


@dataclass
class ChoiceClip(Clip):
    """A clip with texts that are none of its own."""

    false: tuple[str, ...] = ()


class ChoiceDataset(PairDataset):
    """Pairs to train on, each with texts of others.

    Args:
        false_texts: of each.
    """

    def __init__(self, *given: Any, false_texts: int, **more: Any) -> None:
        super().__init__(*given, **more)
        self.false_texts = false_texts
        name_of = FileNames()
        files: dict[str, int] = {}
        names = map(name_of, self.items.paths)
        self._files = np.fromiter((files.setdefault(x, len(files)) for x in names), np.int64)
        if len(files) < 2:
            raise ValueError(
                "retrieval: data.train must have several files, whose texts are false of each "
                f"other, got {len(files)}"
            )

    def read(self, number: int, seed: int, skipped: list[tuple[str, str]]) -> ChoiceClip:
        clip = super().read(number, seed, skipped)
        rng = random.Random(f"{seed} false")
        same = np.flatnonzero(self._files == self._files[number]).tolist()
        own = {text for k in same for text in self.items[k].captions}
        false = tuple(self._false(number, own, rng) for _ in range(self.false_texts))
        return ChoiceClip(**vars(clip), false=false)

    def _false(self, number: int, own: set[str], rng: random.Random) -> str:
        """A text of another file, and none of those that this one has."""
        for _ in range(ATTEMPTS):
            text = rng.choice(self.items[rng.randrange(len(self.items))].captions)
            if text not in own:
                return text
        path = self.items.paths[number]
        raise ValueError(f"retrieval: {path}: must have texts of others to choose from")


@dataclass(frozen=True, kw_only=True)
class ChoiceCollator(Collator):
    """Makes a batch of clips, their texts and the false ones, which are padded alike."""

    def __call__(self, clips: Sequence[Any]) -> Batch:
        batch = super().__call__(clips)
        texts = [text for clip in clips for text in (clip.caption, *clip.false)]
        encoded = encode_texts(self.tokenizer, texts, self.text_length, self.pad_to)
        for name, rows in encoded.items():
            choices = rows.unflatten(0, (len(clips), -1))
            # Copies: of a view, a worker would send what it is a view of.
            batch[name], batch[f"false_{name}"] = choices[:, 0].clone(), choices[:, 1:].clone()
        return batch

"""Two views of each picture and of each text, for losses within a modality.

Source: COOKIE (ICCV 2021): pictures are cropped and mirrored, texts lose words. Colours are changed
by the model, on its device.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svitt_ops.training.data.collate import Collator
from svitt_ops.training.data.datasets import Clip
from svitt_ops.training.data.text import names_a_side
from svitt_ops.training.data.transport import Batch

VIEWS = 2


@dataclass(frozen=True, kw_only=True)
class ViewCollator(Collator):
    """Makes a batch with views; every random choice comes from the clip's own seed."""

    of_pictures: bool = True
    """Whether pictures have views: `view_boxes`, `view_flips` and `view_changes`, a list for
    each of the two."""
    of_texts: bool = True
    """Whether texts have views: `view_input_ids` and `view_attention_mask`, (batch, 2, tokens)."""
    noise: float = 0.15
    """Share of the words' tokens that a view masks, substitutes or deletes."""

    def __call__(self, clips: Sequence[Clip]) -> Batch:
        batch = super().__call__(clips)
        rngs = [random.Random(f"{clip.seed} views") for clip in clips]
        if self.of_pictures:
            drawn = [
                [self.augmentation.draw(rng, *clip.frames.shape[-2:]) for _ in range(VIEWS)]
                for rng, clip in zip(rngs, clips, strict=True)
            ]
            batch["view_changes"] = [
                [self.augmentation.changes(rng) for rng in rngs] for _ in range(VIEWS)
            ]
            sided = [any(map(names_a_side, clip.texts)) for clip in clips]
            batch["view_boxes"] = [[views[k][0] for views in drawn] for k in range(VIEWS)]
            batch["view_flips"] = [
                [views[k][1] and not side for views, side in zip(drawn, sided, strict=True)]
                for k in range(VIEWS)
            ]
        if self.of_texts:
            batch |= self._noisy(batch["input_ids"], batch["attention_mask"], rngs)
        return batch

    def _noisy(
        self, ids: Tensor, attended: Tensor, rngs: Sequence[random.Random]
    ) -> dict[str, Tensor]:
        special = set(self.tokenizer.all_special_ids)
        words = [piece for piece in range(len(self.tokenizer)) if piece not in special]
        texts = [
            self._noisy_text(row[mask.bool()].tolist(), special, words, rng)
            for row, mask, rng in zip(ids, attended, rngs, strict=True)
            for _ in range(VIEWS)
        ]
        longest = self.text_length if self.pad_to == "max" else max(map(len, texts))
        found = torch.full((len(texts), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(found)
        for number, text in enumerate(texts):
            found[number, : len(text)] = torch.tensor(text)
            mask[number, : len(text)] = 1
        shape = (len(ids), VIEWS)
        return {
            "view_input_ids": found.unflatten(0, shape),
            "view_attention_mask": mask.unflatten(0, shape),
        }

    def _noisy_text(
        self, ids: list[int], special: set[int], words: list[int], rng: random.Random
    ) -> list[int]:
        """A text some of whose tokens are masked, others, or gone; one token at least stays."""
        found, left = [], 0
        for piece in ids:
            chosen, how = rng.random() < self.noise, rng.randrange(3)
            if not chosen or piece in special:
                left += piece not in special
                found.append(piece)
            elif how == 0:
                found.append(self.tokenizer.mask_token_id)
            elif how == 1:
                found.append(rng.choice(words))
        return found if left else ids

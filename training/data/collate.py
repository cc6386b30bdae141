"""Clips to batches: padding, masked language modelling, what augmentation is to do."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from svitt_ops.training.data.augment import Augmentation
from svitt_ops.training.data.datasets import Clip
from svitt_ops.training.data.text import names_a_side
from svitt_ops.training.data.transport import Batch

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Makes a batch of clips; every random choice comes from the clip's own seed."""

    tokenizer: PreTrainedTokenizerBase
    text_length: int = 32
    """Longest text, in tokens; longer ones are cut."""
    pad_to: str = "longest"
    """"longest" text of the batch, or "max": always `text_length`."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    mask_probability: float = 0.0
    """Share of tokens to mask for masked language modelling; 0: none is prepared."""
    mask_words: bool = False
    """Mask whole words, as many as make up that share of a text, one at least."""
    completion: tuple[float, int] | None = None
    """For semantic completion: the share of a text's pieces that are drawn, with replacement, to be
    [MASK] in `masked_input_ids`, and the patches of a frame that `patch_noise` is of."""

    def __call__(self, clips: Sequence[Clip]) -> Batch:
        rngs = [random.Random(clip.seed) for clip in clips]
        drawn = [
            self.augmentation.draw(rng, *clip.frames.shape[-2:])
            for rng, clip in zip(rngs, clips, strict=True)
        ]
        frames = [clip.frames for clip in clips]
        same = len({frame.shape for frame in frames}) == 1
        batch = Batch(
            clips=torch.stack(frames) if same else frames,
            boxes=[box for box, _ in drawn],
            flips=[
                flip and not any(map(names_a_side, clip.texts))
                for (_, flip), clip in zip(drawn, clips, strict=True)
            ],
            changes=[self.augmentation.changes(rng) for rng in rngs],
            pair_ids=torch.tensor([clip.pair_id for clip in clips]),
            skipped=[entry for clip in clips for entry in clip.skipped],
        )
        batch |= encode_texts(
            self.tokenizer, [clip.caption for clip in clips], self.text_length, self.pad_to
        )
        if self.mask_probability > 0:
            seeds = [rng.getrandbits(48) for rng in rngs]
            batch |= self._mask(batch["input_ids"], batch["attention_mask"], seeds, clips)
        if self.completion is not None:
            seeds = [rng.getrandbits(48) for rng in rngs]
            batch |= self._hide(batch["input_ids"], seeds, *self.completion)
        return batch

    def _mask(
        self, ids: Tensor, attended: Tensor, seeds: Sequence[int], clips: Sequence[Clip]
    ) -> dict[str, Tensor]:
        """BERT's masking: 80 % [MASK], 10 % another token, 10 % kept; special tokens never."""
        rows = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            # As many numbers as the longest text: padding does not change what is drawn.
            draws = torch.rand(3, self.text_length, generator=generator)
            rows.append(draws[:, : ids.shape[1]])
        chosen, how, other = torch.stack(rows, dim=1)
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        if self.mask_words:
            texts = [clip.caption for clip in clips]
            words = word_numbers(self.tokenizer, texts, self.text_length, self.pad_to)
            masked = choose_words(words.masked_fill(special, -1), chosen, self.mask_probability)
        else:
            masked = (chosen < self.mask_probability) & attended.bool() & ~special
        replaced = torch.where(how < 0.8, self.tokenizer.mask_token_id, ids)
        random_ids = (other * len(self.tokenizer)).long()
        replaced = torch.where(how >= 0.9, random_ids, replaced)
        return {
            "mlm_input_ids": torch.where(masked, replaced, ids),
            "mlm_labels": torch.where(masked, ids, IGNORED),
        }

    def _hide(
        self, ids: Tensor, seeds: Sequence[int], share: float, patches: int
    ) -> dict[str, Tensor]:
        """Texts without some of their pieces, and noise by which patches are removed."""
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        masked, noise = ids.clone(), []
        for row, free, seed in zip(masked, ~special, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            noise.append(torch.rand(patches, generator=generator))
            places = free.nonzero()[:, 0]
            if len(places):
                count = int(share * len(places)) + 1
                drawn = torch.randint(len(places), (count,), generator=generator)
                row[places[drawn]] = int(self.tokenizer.mask_token_id)
        return {"masked_input_ids": masked, "patch_noise": torch.stack(noise)}


def choose_words(words: Tensor, order: Tensor, share: float) -> Tensor:
    """Which pieces are masked, bool like `words`: whole words, at random, a share of each text.

    Args:
        words: int64 (texts, tokens), the number of each piece's word, -1 for what is none.
        order: noise like `words`; the words whose first pieces have the least come first.
        share: of a text's pieces, rounded; a word with more pieces than are left is passed over,
            and where that leaves none, the first is taken.
    """
    masked = torch.zeros_like(words, dtype=torch.bool)
    for number, (row, noise) in enumerate(zip(words.tolist(), order.tolist(), strict=True)):
        places: dict[int, list[int]] = {}
        for place, word in enumerate(row):
            if word >= 0:
                places.setdefault(word, []).append(place)
        ranked = sorted(places.values(), key=lambda found: noise[found[0]])
        left = max(1, round(share * sum(map(len, ranked))))
        chosen: list[int] = []
        for found in ranked:
            if len(chosen) + len(found) <= left:
                chosen += found
        masked[number, chosen or (ranked[0] if ranked else [])] = True
    return masked


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], text_length: int, pad_to: str
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of texts, int64 (texts, tokens)."""
    encoded = _encode(tokenizer, texts, text_length, pad_to)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def word_numbers(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], text_length: int, pad_to: str
) -> Tensor:
    """Which word of its text each piece belongs to, int64 (texts, tokens); -1: to none."""
    encoded = _encode(tokenizer, texts, text_length, pad_to)
    if not encoded.is_fast:
        raise ValueError(
            "optimizer.mask_words: must be false with a tokenizer that is not of the tokenizers"
            f" library, got {type(tokenizer).__name__}"
        )
    rows = [encoded.word_ids(number) for number in range(len(texts))]
    return torch.tensor([[-1 if word is None else word for word in row] for row in rows])


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], text_length: int, pad_to: str
) -> BatchEncoding:
    if pad_to not in ("longest", "max"):
        raise ValueError(f"pad_to: must be 'longest' or 'max', got {pad_to!r}")
    return tokenizer(
        list(texts),
        padding="max_length" if pad_to == "max" else "longest",
        truncation=True,
        max_length=text_length,
        return_tensors="pt",
    )


def count_cut(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], text_length: int) -> int:
    """How many texts are longer than `text_length` tokens."""
    lengths = encode_texts(tokenizer, texts, text_length + 1, "longest")["attention_mask"].sum(1)
    return int((lengths > text_length).sum())


def check_text_length(
    text_length: int, tokenizer: PreTrainedTokenizerBase, limit: int, name: str = "text_length"
) -> None:
    """Refuse a length without room for a word, or with more tokens than the text tower's limit."""
    least = tokenizer.num_special_tokens_to_add() + 1
    if not least <= text_length <= limit:
        raise ValueError(
            f"{name}: must be {least} to {limit} tokens (the model's max_position_embeddings),"
            f" got {text_length}"
        )

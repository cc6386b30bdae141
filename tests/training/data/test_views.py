"""Two views of each picture and of each text."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from svitt_ops.training.data.augment import Augmentation
from svitt_ops.training.data.datasets import Clip
from svitt_ops.training.data.text import train_tokenizer
from svitt_ops.training.data.views import ViewCollator
from svitt_ops.training.engine.recipes import Recipe
from svitt_ops.training.tasks.pretrain import build_collator

TEXT = "a red square then a blue circle and a green cross"
TOKENIZER = train_tokenizer([TEXT, "left"], 120)
COLLATOR = ViewCollator(
    tokenizer=TOKENIZER, augmentation=Augmentation(crop_scale=(0.2, 0.8), flip=True), noise=0.5
)


def clips(count: int, text: str = TEXT, first: int = 0) -> list[Clip]:
    return [
        Clip(torch.zeros(1, 3, 20, 30, dtype=torch.uint8), text, k, first + k) for k in range(count)
    ]


def test_views_depend_on_the_clip_alone() -> None:
    """Not on its batch, nor on whether there are others; the plain pair is as without views."""
    batch, alone = COLLATOR(clips(4)), COLLATOR(clips(4)[2:3])
    for view in (0, 1):
        assert batch["view_boxes"][view][2] == alone["view_boxes"][view][0]
        assert batch["view_flips"][view][2] == alone["view_flips"][view][0]
    for row in (0, 1):
        wanted = alone["view_input_ids"][0, row][alone["view_attention_mask"][0, row] > 0]
        found = batch["view_input_ids"][2, row][batch["view_attention_mask"][2, row] > 0]
        assert torch.equal(found, wanted)
    plain = replace(COLLATOR, of_pictures=False, of_texts=False)(clips(4))
    assert not any(name.startswith("view") for name in plain)
    assert all(plain[name] == batch[name] for name in ("boxes", "flips"))
    assert torch.equal(plain["input_ids"], batch["input_ids"])


def test_both_views_differ() -> None:
    batch = COLLATOR(clips(8))
    assert batch["view_input_ids"].shape[:2] == (8, 2)
    assert all(a != b for a, b in zip(*batch["view_boxes"], strict=True))
    first, second = batch["view_input_ids"].unbind(1)
    assert (first != second).any(1).sum() >= 7
    flips = batch["view_flips"][0] + batch["view_flips"][1]
    assert 0 < sum(flips) < len(flips)
    sided = COLLATOR(clips(8, "left of a square"))
    assert not any(map(any, sided["view_flips"]))


@pytest.mark.parametrize("noise", [0.0, 0.15, 0.5])
def test_words_are_masked_substituted_or_deleted(noise: float) -> None:
    """A third each, of the share; special tokens stay in place, padding comes last."""
    collator = replace(COLLATOR, noise=noise)
    batch = collator(clips(1500))
    plain = batch["input_ids"][0].tolist()
    length, count = len(plain), Counter[str]()
    special = set(TOKENIZER.all_special_ids)
    for row, mask in zip(
        batch["view_input_ids"].flatten(0, 1).tolist(),
        batch["view_attention_mask"].flatten(0, 1).tolist(),
        strict=True,
    ):
        kept = sum(mask)
        assert mask == [1] * kept + [0] * (len(mask) - kept)
        assert row[kept:] == [TOKENIZER.pad_token_id] * (len(row) - kept)
        row = row[:kept]
        assert row[0] == plain[0] and row[-1] == plain[-1] and len(row) > 2
        count["masked"] += row.count(TOKENIZER.mask_token_id)
        count["deleted"] += length - kept
        assert not special & set(row[1:-1]) - {TOKENIZER.mask_token_id}
    total = 3000 * (length - 2)
    assert count["masked"] == pytest.approx(total * noise / 3, rel=0.1)
    assert count["deleted"] == pytest.approx(total * noise / 3, rel=0.1)


def test_a_text_keeps_a_word() -> None:
    batch = replace(COLLATOR, noise=1.0)(clips(3))
    assert torch.equal(batch["view_input_ids"], batch["input_ids"][:, None].expand(-1, 2, -1))
    padded = replace(COLLATOR, pad_to="max", text_length=40)(clips(3))
    assert padded["view_input_ids"].shape == (3, 2, 40)


def test_whole_words_are_refused() -> None:
    recipe = Recipe(system="cookie")
    config = SimpleNamespace(weights={"tcl": 1})
    assert build_collator(recipe, TOKENIZER, config).noise == recipe.optimizer.mask_probability
    recipe.optimizer.mask_words = True
    with pytest.raises(ValueError, match=r"optimizer\.mask_words must be false, views of texts"):
        build_collator(recipe, TOKENIZER, config)

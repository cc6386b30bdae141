"""Order of the data, batches, augmentation and masking."""

import itertools
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from svitt_ops.training.data.annotations import Entry
from svitt_ops.training.data.augment import Augmentation, to_pixel_values
from svitt_ops.training.data.collate import Collator, choose_words, encode_texts, word_numbers
from svitt_ops.training.data.datasets import Clip, ClipSpec, GlobalBatches, Item, PairDataset
from svitt_ops.training.data.text import train_tokenizer
from svitt_ops.training.engine.schedule import learning_rate_factor

CAPTIONS = ["a red square then a blue circle", "a green cross", "a blue square then a red cross"]


def items(videos: int, images: int = 0, bundle: int = 0) -> list[Item]:
    return [
        Item(
            path=str(k),
            captions=("x",),
            kind="video" if k < videos else "image",
            together=str(k // bundle) if bundle else None,
        )
        for k in range(videos + images)
    ]


def take(batches: GlobalBatches, count: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(batches, count))


@given(st.integers(8, 40), st.sampled_from([1, 2, 4]), st.integers(0, 12))
def test_ranks_share_the_same_global_batches(n: int, world: int, start: int) -> None:
    whole = take(GlobalBatches(items(n), 8, seed=3, start=start), 5)
    parts = [
        take(GlobalBatches(items(n), 8, seed=3, rank=r, world_size=world, start=start), 5)
        for r in range(world)
    ]
    for number, batch in enumerate(whole):
        assert [key for part in parts for key in part[number]] == batch


@given(st.integers(8, 40), st.integers(0, 12))
def test_starting_late_goes_on_in_the_same_order(n: int, start: int) -> None:
    everything = take(GlobalBatches(items(n), 4, seed=1), start + 6)
    assert take(GlobalBatches(items(n), 4, seed=1, start=start), 6) == everything[start:]


def test_an_epoch_has_each_item_once_and_epochs_differ() -> None:
    batches = GlobalBatches(items(24), 8)
    assert batches.batches_per_epoch == 3
    first, second = (list(itertools.chain(*batches.epoch(k))) for k in (0, 1))
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert {epoch for batch in take(batches, 4) for _, epoch in batch} == {0, 1}


def test_kinds_are_not_mixed_and_bundles_stay_together() -> None:
    corpus = items(21, 11)
    for batch in GlobalBatches(corpus, 4).epoch(0):
        assert len({corpus[k].kind for k in batch}) == 1
    assert GlobalBatches(corpus, 4).batches_per_epoch == 7
    for batch in GlobalBatches(items(32, bundle=2), 8).epoch(5):
        assert all(k ^ 1 in batch for k in batch)


def test_batch_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        GlobalBatches(items(8), 4, world_size=3)
    with pytest.raises(ValueError, match="must not exceed the pairs"):
        GlobalBatches(items(8), 16)


@pytest.mark.parametrize(("positives", "ids"), [("video", [0, 1, 2]), ("caption", [0, 0, 1])])
def test_pair_ids(corpus: Path, positives: str, ids: list[int]) -> None:
    names = sorted(str(path) for path in (corpus / "videos").glob("*.mp4"))[:3]
    entries = [
        Entry(media=(name,), captions=(caption,), kind="video")
        for name, caption in zip(names, ("x", "x", "y"), strict=True)
    ]
    dataset = PairDataset(entries, ClipSpec(num_frames=2), positives=positives)
    assert [dataset[k, 0].pair_id for k in range(3)] == ids


def test_a_clip_is_cut_and_mirrored_alike_in_all_frames() -> None:
    still = torch.randint(0, 256, (1, 3, 40, 60), dtype=torch.uint8).expand(5, -1, -1, -1)
    augmentation = Augmentation(crop_scale=(0.3, 0.9), flip=True)
    drawn = [augmentation.draw(random.Random(k), 40, 60) for k in range(8)]
    boxes, flips = [box for box, _ in drawn], [flip for _, flip in drawn]
    assert len(set(boxes)) == 8
    assert len(set(flips)) == 2
    for top, left, height, width in boxes:
        assert 0 <= top <= top + height <= 40
        assert 0 <= left <= left + width <= 60
        assert 0.25 <= height * width / 2400 <= 0.95
    pixels = to_pixel_values(torch.stack([still] * 8), 16, boxes, flips)
    assert pixels.shape == (8, 5, 3, 16, 16)
    assert pixels.abs().max() <= 1
    assert torch.equal(pixels, pixels[:, :1].expand(-1, 5, -1, -1, -1))
    listed = to_pixel_values([still] * 8, 16, boxes, flips)
    assert torch.equal(pixels, listed)


def test_plain_resize_and_normalisation() -> None:
    clips = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(to_pixel_values(clips, 16), clips / 127.5 - 1)
    mirrored = to_pixel_values(clips, 16, flips=[False, True])
    torch.testing.assert_close(mirrored[1], (clips[1] / 127.5 - 1).flip(-1))
    flat = torch.full((1, 1, 3, 30, 50), 200, dtype=torch.uint8)
    torch.testing.assert_close(
        to_pixel_values(flat, 16), torch.full((1, 1, 3, 16, 16), 200 / 127.5 - 1)
    )
    sizes = [torch.zeros(2, 3, 20, 30, dtype=torch.uint8), torch.zeros(2, 3, 9, 9).byte()]
    assert to_pixel_values(sizes, 16).shape == (2, 2, 3, 16, 16)


def test_official_resize() -> None:
    """As torchvision resizes tensors of whole numbers: no antialiasing, clamped, rounded."""
    clips = torch.randint(0, 256, (2, 3, 3, 61, 47), dtype=torch.uint8)
    found = to_pixel_values(clips, 16, resize="official")
    wanted = F.interpolate(
        clips.flatten(0, 1).double(), (16, 16), mode="bicubic", align_corners=False
    )
    whole = (found + 1) * 127.5
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-4)
    assert (whole.flatten(0, 1).double() - wanted.clamp(0, 255)).abs().max() < 0.501
    assert whole.min() >= 0 and whole.max() <= 255
    boxes, flips = [(3, 5, 40, 30), (0, 0, 61, 47)], [True, False]
    cut = to_pixel_values(list(clips), 16, boxes, flips, resize="official")
    alone = to_pixel_values(clips[:1, :, :, 3:43, 5:35], 16, resize="official")
    assert torch.equal(cut[0], alone[0].flip(-1)) and torch.equal(cut[1], found[1])
    large = to_pixel_values(clips, 90, resize="official")
    assert ((large + 1) * 127.5).sub(((large + 1) * 127.5).round()).abs().max() < 1e-4
    smooth = to_pixel_values(clips, 16)
    assert torch.equal(smooth, to_pixel_values(clips, 16, resize="antialias"))
    assert (smooth - found).abs().mean() > 0.1  # of noise, most of all
    with pytest.raises(ValueError, match="resize: must be one of antialias, official, got 'area'"):
        to_pixel_values(clips, 16, resize="area")


def test_masking() -> None:
    tokenizer = train_tokenizer(CAPTIONS, 80)
    collate = Collator(tokenizer=tokenizer, text_length=16, mask_probability=0.5)
    clips = [
        Clip(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), CAPTIONS[k % 3], k, k) for k in range(300)
    ]
    batch = collate(clips)
    ids, masked, labels = batch["input_ids"], batch["mlm_input_ids"], batch["mlm_labels"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert special.sum(1).min() >= 2  # [CLS] and [SEP]
    eligible = batch["attention_mask"].bool() & ~special
    chosen = labels != -100
    assert not (chosen & ~eligible).any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert abs(chosen.sum() / eligible.sum() - 0.5) < 0.05
    assert abs((masked[chosen] == tokenizer.mask_token_id).float().mean() - 0.8) < 0.06
    assert abs((masked[chosen] == ids[chosen]).float().mean() - 0.1) < 0.06
    alone = collate(clips[1:2])
    length = alone["input_ids"].shape[1]
    assert torch.equal(alone["mlm_input_ids"][0], masked[1, :length])


def test_text_padding() -> None:
    tokenizer = train_tokenizer(CAPTIONS, 80)
    assert encode_texts(tokenizer, CAPTIONS, 20, "longest")["input_ids"].shape == (3, 9)
    assert encode_texts(tokenizer, CAPTIONS, 20, "max")["input_ids"].shape == (3, 20)
    assert encode_texts(tokenizer, CAPTIONS, 5, "longest")["input_ids"].shape == (3, 5)
    with pytest.raises(ValueError, match="pad_to"):
        encode_texts(tokenizer, CAPTIONS, 5, "none")


def test_learning_rate() -> None:
    def factor(step: int) -> float:
        return learning_rate_factor(step, total=110, warmup=10, floor=0.01)

    assert factor(0) == 0.01
    assert factor(5) == 0.5
    assert factor(10) == 1
    assert factor(60) == pytest.approx(0.5)
    assert factor(110) == 0.01
    assert factor(109) == 0.01  # clipped at the floor, not rescaled to it
    assert learning_rate_factor(0, total=10, warmup=0, floor=0.1) == 1


def test_learning_rate_in_steps() -> None:
    def factor(step: int, warmup: int = 0) -> float:
        shape = {"total": 90, "warmup": warmup, "floor": 0.01}
        return learning_rate_factor(step, **shape, decay="step", drop=0.7, drop_at=[1 / 9, 2 / 9])

    assert [factor(step) for step in (0, 9)] == [1, 1]
    assert [factor(step) for step in (10, 19)] == pytest.approx([0.7, 0.7])
    assert [factor(step) for step in (20, 90)] == pytest.approx([0.49, 0.49])
    assert [factor(step, 5) for step in (0, 1, 5)] == pytest.approx([0.01, 0.2, 1])


def test_words_are_masked_whole() -> None:
    """Of each text as many pieces as the share says, or one word if that is more."""
    words = torch.tensor([[-1, 0, 0, 1, 2, 2, 2, 3, -1, -1], [-1, 0, 0, 0, 0, -1, -1, -1, -1, -1]])
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(50):
        masked = choose_words(words, torch.rand(2, 10, generator=generator), 0.4)
        assert (
            masked[0].sum() in (2, 3) and masked[1].tolist() == [False] + [True] * 4 + [False] * 5
        )
        for word in range(4):
            pieces = masked[0][words[0] == word]
            assert pieces.all() or not pieces.any()
        seen.add(tuple(masked[0].tolist()))
    assert len(seen) >= 4
    assert not choose_words(torch.full((1, 3), -1), torch.rand(1, 3), 0.4).any()


def test_pieces_of_a_word_share_its_number() -> None:
    tokenizer = train_tokenizer(["ab abab"], 12)
    texts = ["abab ab", "ab"]
    numbers = word_numbers(tokenizer, texts, 10, "longest")
    ids = encode_texts(tokenizer, texts, 10, "longest")["input_ids"]
    assert numbers.shape == ids.shape
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert torch.equal(numbers == -1, special)
    assert numbers[0][~special[0]].unique().tolist() == [0, 1]


def test_what_completion_removes() -> None:
    """Theirs: 40 % of the pieces and one more, drawn with replacement; noise of each clip's own."""
    tokenizer = train_tokenizer(CAPTIONS, 60)
    collate = Collator(tokenizer=tokenizer, completion=(0.4, 9))
    frames = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    seen = set()
    for seed in range(30):
        clips = [Clip(frames, text, k, seed + k) for k, text in enumerate(CAPTIONS)]
        batch = collate(clips)
        ids, found = batch["input_ids"], batch["masked_input_ids"]
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        changed = ids != found
        assert not (changed & special).any()
        assert (found[changed] == tokenizer.mask_token_id).all()
        free = (~special).sum(1)
        assert ((changed.sum(1) >= 1) & (changed.sum(1) <= (0.4 * free).long() + 1)).all()
        assert batch["patch_noise"].shape == (3, 9)
        seen.add(tuple(changed[0].tolist()))
        alone = collate(clips[1:2])  # whatever it is padded to
        count = alone["input_ids"].shape[1]
        assert torch.equal(alone["masked_input_ids"][0], found[1, :count])
        assert torch.equal(alone["patch_noise"][0], batch["patch_noise"][1])
        assert torch.equal(batch["patch_noise"], collate(clips)["patch_noise"])
    assert len(seen) > 5
    assert "patch_noise" not in Collator(tokenizer=tokenizer)(clips)

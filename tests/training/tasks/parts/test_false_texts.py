"""False texts: of other files, not true of the clip, the same on every run."""

from dataclasses import replace
from pathlib import Path

import pytest

from svitt_ops.training.data.annotations import read_annotations
from svitt_ops.training.data.datasets import ClipSpec
from svitt_ops.training.data.text import train_tokenizer
from svitt_ops.training.tasks.parts.false_texts import ChoiceCollator, ChoiceDataset


def test_false_texts_are_of_others(corpus: Path) -> None:
    entries = read_annotations(corpus / "train.json").entries
    dataset = ChoiceDataset(entries, ClipSpec(num_frames=1), false_texts=5, seed=1)
    captions = {text for entry in entries for text in entry.captions}
    drawn = set()
    for epoch in range(4):
        for number in range(4):
            clip = dataset[number, epoch]
            assert len(clip.false) == 5 and set(clip.false) <= captions - {clip.caption}
            assert clip.false == dataset[number, epoch].false
            drawn.add(clip.false)
    assert len(drawn) == 16
    clips = [dataset[number, 0] for number in range(3)]
    tokenizer = train_tokenizer(captions, 100)
    batch = ChoiceCollator(tokenizer=tokenizer, text_length=16)(clips)
    assert batch["false_input_ids"].shape == (3, 5, batch["input_ids"].shape[1])
    for row, clip in zip(batch["false_input_ids"], clips, strict=True):
        texts = tokenizer.batch_decode(row, skip_special_tokens=True)
        assert [text.replace(" ", "") for text in texts] == [x.replace(" ", "") for x in clip.false]
    own = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert [x.replace(" ", "") for x in own] == [c.caption.replace(" ", "") for c in clips]


def test_what_is_said_of_a_file_anywhere_is_not_false_of_it(corpus: Path) -> None:
    """However its path is spelled; others share a text with it, and may be few."""
    first, other = read_annotations(corpus / "train.json").entries[:2]
    path = Path(first.media[0])
    spelled = str(path.parent / ".." / path.parent.name / path.name)
    entries = [
        replace(first, captions=("one",)),
        replace(first, captions=("two",), media=(spelled,)),
        replace(other, captions=("two", "three")),
    ]
    dataset = ChoiceDataset(entries, ClipSpec(num_frames=1), false_texts=15)
    assert {*dataset[0, 0].false} == {*dataset[1, 0].false} == {"three"}
    assert {*dataset[2, 0].false} == {"one"}


def test_a_corpus_without_false_texts(corpus: Path) -> None:
    entries = read_annotations(corpus / "train.json").entries[:2]
    spec = ClipSpec(num_frames=1)
    with pytest.raises(ValueError, match=r"data\.train must have several files, .*, got 1"):
        ChoiceDataset(entries[:1], spec, false_texts=1)
    alike = [replace(entry, captions=("one",)) for entry in entries]
    with pytest.raises(ValueError, match="must have texts of others to choose from"):
        ChoiceDataset(alike, spec, false_texts=1)[0, 0]

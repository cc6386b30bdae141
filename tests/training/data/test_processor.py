"""The processor: files, pictures, arrays and texts, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from svitt_ops.training.data.processor import VideoTextProcessor
from svitt_ops.training.data.text import train_tokenizer
from svitt_ops.training.data.video import UnusableVideoError, read_frames

FRAMES = torch.randint(256, (9, 3, 40, 56), dtype=torch.uint8)


@pytest.fixture(scope="module")
def processor() -> VideoTextProcessor:
    tokenizer = train_tokenizer(["a red circle, then a blue square"], 60)
    return VideoTextProcessor(tokenizer, size=16, num_frames=4, short_side=None)


def as_last(x: Tensor) -> np.ndarray:
    return x.movedim(-3, -1).numpy()


def pictures(x: Tensor) -> list[Image.Image]:
    return [Image.fromarray(as_last(frame)) for frame in x]


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: x.numpy(),
        as_last,
        lambda x: list(x),
        lambda x: list(as_last(x)),
        pictures,
        lambda x: x.movedim(-3, -1),
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    ],
)
def test_forms_of_a_video(processor: VideoTextProcessor, form: Any) -> None:
    wanted = processor(videos=FRAMES)["pixel_values"]
    assert wanted.shape == (1, 4, 3, 16, 16) and wanted.dtype == torch.float32
    assert -1 <= wanted.min() < -0.3 and 0.3 < wanted.max() <= 1
    assert torch.equal(processor(videos=form(FRAMES))["pixel_values"], wanted)
    several = processor(videos=[form(FRAMES), form(FRAMES[:2])])["pixel_values"]
    assert torch.equal(several[0], wanted[0])
    short = several[1]  # of two frames, the last stands for those that lack
    assert torch.equal(short[1], short[3]) and not torch.equal(short[0], short[1])


@pytest.mark.parametrize("form", [list, lambda x: x, as_last, pictures, lambda x: list(as_last(x))])
def test_forms_of_pictures(processor: VideoTextProcessor, form: Any) -> None:
    found = processor(images=form(FRAMES))["pixel_values"]
    assert found.shape == (9, 1, 3, 16, 16)
    one = form(FRAMES)[0]
    assert torch.equal(processor(images=one)["pixel_values"], found[:1])


def test_files(processor: VideoTextProcessor, corpus: Path, tmp_path: Path) -> None:
    film = next(iter(sorted((corpus / "videos").iterdir())))
    whole = processor(videos=read_frames(film))["pixel_values"]
    for path in (film, str(film)):
        assert torch.equal(processor(videos=path)["pixel_values"], whole)
    picture = tmp_path / "photo.png"
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(as_last(FRAMES[0])).save(picture, exif=turned)
    found = processor(images=[picture, picture])["pixel_values"]
    assert torch.equal(found, processor(images=[FRAMES[0].rot90(-1, (1, 2))] * 2)["pixel_values"])
    with Image.open(picture) as opened:
        assert torch.equal(processor(images=opened)["pixel_values"], found[:1])


def test_texts_are_cleaned(processor: VideoTextProcessor) -> None:
    found = processor(text=["A red circle!", "square"])
    plain = processor.tokenizer(["a red circle", "square"], padding=True, return_tensors="pt")
    assert torch.equal(found["input_ids"], plain["input_ids"])
    assert torch.equal(found["attention_mask"], plain["attention_mask"])
    assert {*processor(text="square", images=FRAMES[0])} == {*processor.model_input_names}


def test_it_comes_back(processor: VideoTextProcessor, tmp_path: Path) -> None:
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    own = VideoTextProcessor(
        processor.tokenizer, size=8, num_frames=2, sampling="ends", resize="official",
        short_side=None, text_length=5, max_words=2, image_mean=mean, image_std=std,
    )  # fmt: skip
    own.save_pretrained(tmp_path)
    again = VideoTextProcessor.from_pretrained(tmp_path)
    given: dict[str, Any] = {"videos": FRAMES, "text": "a red circle then a blue square"}
    before, after = own(**given), again(**given)
    assert all(torch.equal(before[key], after[key]) for key in processor.model_input_names)
    assert before["input_ids"].shape[1] <= 5
    plain = VideoTextProcessor(
        processor.tokenizer, size=8, num_frames=2, sampling="ends", resize="official"
    )
    colours = plain(videos=FRAMES)["pixel_values"] / 2 + 0.5
    wanted = (colours - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(before["pixel_values"], wanted)


@pytest.mark.parametrize(
    ("error", "line", "given"),
    [
        (ValueError, "images, text or videos must be given, got none", {}),
        (ValueError, "images must be None where videos", {"images": FRAMES[0], "videos": FRAMES}),
        (
            ValueError,
            "return_tensors must be 'pt', got 'np'",
            {"text": "a", "return_tensors": "np"},
        ),
        (ValueError, "videos must be at least one, got none", {"videos": []}),
        (ValueError, "images must be at least one, got none", {"images": []}),
        (ValueError, "text must be at least one, got none", {"text": []}),
        (TypeError, "text must be str, got int", {"text": ["a", 3]}),
        (TypeError, "a video must be a path, .* got torch.uint8 of", {"videos": FRAMES[0]}),
        (TypeError, "a video must be a path, .* got int", {"videos": [3]}),
        (ValueError, "a video must have frames, got none", {"videos": [[]]}),
        (ValueError, "a video must have frames, got none", {"videos": FRAMES[:0]}),
        (TypeError, "a picture must be a path, .* got dict", {"images": {"a": 1}}),
        (ValueError, "must be uint8 .* got torch.float32 of", {"images": FRAMES[0].float()}),
        (ValueError, r"got torch.uint8 of \(40, 56\)", {"images": FRAMES[0, 0]}),
        (ValueError, r"got torch.uint8 of \(4, 40, 56\)", {"images": FRAMES[:4, 0]}),
        (
            ValueError,
            r"must have one size, got \[\(20, 56\), \(40, 56\)\]",
            {"videos": [[FRAMES[0], FRAMES[0, :, :20]]]},
        ),
        (UnusableVideoError, "no-such.mp4", {"videos": "no-such.mp4"}),
    ],
)
def test_refused(
    processor: VideoTextProcessor, error: type[Exception], line: str, given: dict[str, Any]
) -> None:
    with pytest.raises(error, match=line):
        processor(**given)


def test_settings_refused(processor: VideoTextProcessor) -> None:
    with pytest.raises(ValueError, match="resize must be one of antialias, official, got 'no'"):
        VideoTextProcessor(processor.tokenizer, resize="no")

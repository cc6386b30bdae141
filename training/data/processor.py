"""Files, pictures and texts to what a model takes, as it was trained: for use by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from svitt_ops.training.data import RESIZES
from svitt_ops.training.data.augment import to_pixel_values
from svitt_ops.training.data.collate import encode_texts
from svitt_ops.training.data.pictures import to_pixels
from svitt_ops.training.data.sampling import sample_positions
from svitt_ops.training.data.text import clean_caption
from svitt_ops.training.data.video import read_frames

HALF = (0.5, 0.5, 0.5)


class VideoTextProcessor(ProcessorMixin):
    """Makes the inputs of a model of this library.

    It is saved beside every trained model, and `AutoProcessor.from_pretrained(folder)` finds it
    after `import svitt_ops.models`. A clip of a file is the one that `svitt evaluate` sees.

    Args:
        tokenizer: of the texts.
        size: height and width of the model's pictures.
        num_frames: of a clip.
        sampling: which frames of a video are a clip: "middle" of equal chunks, "ends", or "fpsX".
        text_length: tokens of the longest text; longer ones are cut.
        short_side: frames of files are scaled down to this as they are decoded; None: never.
        resize: how pictures become the model's size: "antialias" or "official".
        max_words: where texts are cut; None: nowhere.
        image_mean, image_std: taken out of the colours, which are 0 to 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        size: int = 224,
        num_frames: int = 4,
        sampling: str = "middle",
        text_length: int = 32,
        short_side: int | None = 256,
        resize: str = "antialias",
        max_words: int | None = None,
        image_mean: Sequence[float] = HALF,
        image_std: Sequence[float] = HALF,
    ) -> None:
        if resize not in RESIZES:
            raise ValueError(
                f"VideoTextProcessor: resize must be one of {', '.join(RESIZES)}, got {resize!r}"
            )
        super().__init__(tokenizer)
        self.size = size
        self.num_frames = num_frames
        self.sampling = sampling
        self.text_length = text_length
        self.short_side = short_side
        self.resize = resize
        self.max_words = max_words
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, return_tensors: str = "pt"
    ) -> BatchFeature:
        """Inputs of a model.

        Args:
            images: one picture or several: paths, PIL pictures, or uint8 arrays or tensors
                ``(height, width, 3)`` or ``(3, height, width)``.
            text: one or several.
            videos: one or several, in the place of images: paths, uint8 arrays or tensors
                ``(frames, height, width, 3)`` or ``(frames, 3, height, width)``, or lists of
                frames, each as a picture. Of more frames than the model takes, some are chosen as
                from a file with a frame a second; of fewer, the last is repeated.
            return_tensors: only "pt".

        Returns:
            Of pictures and videos ``pixel_values``, fp32 ``(clips, frames, 3, size, size)``; of
            texts ``input_ids`` and ``attention_mask``, int64 ``(texts, tokens)``.

        Raises:
            UnusableVideoError: a file cannot be read.
            ValueError, TypeError: nothing is given, or what cannot be understood.
        """
        if return_tensors != "pt":
            raise ValueError(f"{_NAME}: return_tensors must be 'pt', got {return_tensors!r}")
        if images is None and text is None and videos is None:
            raise ValueError(f"{_NAME}: images, text or videos must be given, got none")
        if images is not None and videos is not None:
            raise ValueError(f"{_NAME}: images must be None where videos are given: two batches")
        found: dict[str, Tensor] = {}
        if videos is not None:
            single = not isinstance(videos, list | tuple) or (bool(videos) and _is_frame(videos[0]))
            clips = [self._video(video) for video in ([videos] if single else videos)]
            found["pixel_values"] = self._pixel_values(clips, "videos")
        elif images is not None:
            several = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
            clips = [self._picture(image)[None] for image in (images if several else [images])]
            found["pixel_values"] = self._pixel_values(clips, "images")
        if text is not None:
            found |= self._texts([text] if isinstance(text, str) else list(text))
        return BatchFeature(found)

    @property
    def model_input_names(self) -> list[str]:
        """Keys of what is made."""
        return ["pixel_values", "input_ids", "attention_mask"]

    def _texts(self, texts: list[Any]) -> dict[str, Tensor]:
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"{_NAME}: text must be str, got {type(text).__name__}")
        if not texts:
            raise ValueError(f"{_NAME}: text must be at least one, got none")
        cleaned = [clean_caption(text, self.max_words) for text in texts]
        return encode_texts(self.tokenizer, cleaned, self.text_length, "longest")

    def _video(self, video: Any) -> Tensor:
        """uint8 (frames, 3, height, width)."""
        if isinstance(video, str | Path):
            return read_frames(video, self._choose, short_side=self.short_side)
        if not isinstance(video, list | tuple) and getattr(video, "ndim", 0) != 4:
            raise TypeError(
                f"{_NAME}: a video must be a path, a 4-dimensional array or a list of frames, got"
                f" {_kind(video)}"
            )
        if not len(video):
            raise ValueError(f"{_NAME}: a video must have frames, got none")
        frames = [self._picture(video[k]) for k in self._choose(range(len(video)))]
        if len({frame.shape for frame in frames}) > 1:
            sizes = sorted({tuple(frame.shape[1:]) for frame in frames})
            raise ValueError(f"{_NAME}: frames of a video must have one size, got {sizes}")
        return torch.stack(frames)

    def _choose(self, times: Sequence[float]) -> list[int]:
        return sample_positions(times, self.num_frames, self.sampling)

    def _picture(self, picture: Any) -> Tensor:
        """uint8 (3, height, width)."""
        if isinstance(picture, str | Path):
            return read_frames(picture, lambda times: [0], short_side=self.short_side)[0]
        if isinstance(picture, Image.Image):
            return to_pixels(picture, self.short_side)
        if not isinstance(picture, np.ndarray | Tensor):
            raise TypeError(
                f"{_NAME}: a picture must be a path, a PIL picture or an array, got"
                f" {_kind(picture)}"
            )
        pixels = torch.as_tensor(picture)
        # An array of 3 x n x 3 is taken as its library has it: channels last in numpy.
        first, last = (pixels.ndim == 3 and pixels.shape[k] == 3 for k in (0, -1))
        if not (first or last) or pixels.dtype != torch.uint8:
            raise ValueError(
                f"{_NAME}: a picture must be uint8 of (height, width, 3) or (3, height, width), got"
                f" {_kind(picture)}"
            )
        if last and not (first and isinstance(picture, Tensor)):
            pixels = pixels.permute(2, 0, 1)
        return pixels

    def _pixel_values(self, clips: list[Tensor], name: str) -> Tensor:
        if not clips:
            raise ValueError(f"{_NAME}: {name} must be at least one, got none")
        pixels = to_pixel_values(clips, self.size, resize=self.resize)
        if {*self.image_mean, *self.image_std} == {*HALF}:
            return pixels
        mean, std = (pixels.new_tensor(x)[:, None, None] for x in (self.image_mean, self.image_std))
        return (pixels / 2 + 0.5 - mean) / std


_NAME = VideoTextProcessor.__name__


def _is_frame(value: Any) -> bool:
    return isinstance(value, Image.Image) or getattr(value, "ndim", 0) == 3


def _kind(value: Any) -> str:
    """What a value is, in an error."""
    if isinstance(value, np.ndarray | Tensor):
        return f"{value.dtype} of {tuple(value.shape)}"
    return type(value).__name__

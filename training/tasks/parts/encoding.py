"""A gallery's texts and videos as embeddings and states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.data.augment import to_pixel_values
from svitt_ops.training.data.collate import encode_texts
from svitt_ops.training.data.datasets import SkipLog
from svitt_ops.training.data.transport import leave_interrupts_to_parent
from svitt_ops.training.tasks.parts.checks import check_finite
from svitt_ops.training.tasks.parts.gallery import GalleryClips, stack_clips

log = logging.getLogger(__name__)
Progress = Callable[..., Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class EncodedTexts:
    """Texts of a gallery."""

    embeds: Tensor  # (texts, dim)
    states: Tensor | None  # (texts, tokens, width)
    mask: Tensor  # (texts, tokens)


@dataclass(frozen=True, kw_only=True)
class EncodedVideos:
    """Videos of a gallery."""

    embeds: Tensor  # (videos, dim), the mean over clips: its product is the mean similarity
    states: Tensor | None  # (videos, clips, tokens, width)


@torch.inference_mode()
def encode_gallery_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    text_length: int,
    batch_size: int = 256,
    keep_states: bool = True,
) -> EncodedTexts:
    """Embeddings and states of all texts, padded alike; a ValueError where they are not finite."""
    device = next(model.parameters()).device
    inputs = encode_texts(tokenizer, texts, text_length, "longest")
    embeds, states = [], []
    for start in range(0, len(texts), batch_size):
        ids, mask = (t[start : start + batch_size].to(device) for t in inputs.values())
        output = model.encode_text(ids, mask)
        embeds.append(output.embeds.float())
        if keep_states:
            states.append(output.states)
    mask = inputs["attention_mask"].to(device)
    found = torch.cat(embeds)
    check_finite(found, "retrieval: embeddings of texts", lambda k: f"text {k} ({texts[k]!r})")
    kept = torch.cat(states) if keep_states else None
    return EncodedTexts(embeds=found, states=kept, mask=mask)


@torch.inference_mode()
def encode_gallery_videos(
    model: Any,
    clips: GalleryClips,
    *,
    batch_size: int = 32,
    workers: int = 0,
    keep_states: bool = True,
    progress: Progress | None = None,
    resize: str = "antialias",
) -> tuple[EncodedVideos, list[int], SkipLog]:
    """Embeddings and states of a gallery's videos; the numbers of those that cannot be read.

    Raises:
        ValueError: no video can be read, or embeddings are not finite.
    """
    skipped = SkipLog()
    usable: list[int] = []
    embeds, states = [], []
    for numbers, output in encode_clips(
        model,
        clips,
        skipped,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
        resize=resize,
    ):
        usable += numbers
        per_video = (len(numbers), -1)
        embeds.append(output.embeds.float().unflatten(0, per_video).mean(1))
        if keep_states:
            states.append(output.states.unflatten(0, per_video).cpu())
    videos, readable = clips.gallery.videos, set(usable)
    found = torch.cat(embeds)
    what = "retrieval: embeddings of videos"
    check_finite(found, what, lambda k: f"video {usable[k]} ({videos[usable[k]]})")
    kept = torch.cat(states) if keep_states else None
    unusable = [k for k in range(len(videos)) if k not in readable]
    return EncodedVideos(embeds=found, states=kept), unusable, skipped


@torch.inference_mode()
def encode_clips(
    model: Any,
    clips: GalleryClips,
    skipped: SkipLog,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
    resize: str = "antialias",
) -> Iterator[tuple[list[int], Any]]:
    """What a model makes of a gallery's clips, some videos at a time.

    Args:
        model: has `encode_video`.
        clips: of the gallery.
        skipped: gets the videos that cannot be read.
        batch_size: clips at a time.
        workers: processes that decode.
        progress: wraps the loop, such as tqdm.
        resize: as in `to_pixel_values`.

    Yields:
        The numbers of the videos, and the output for their clips, video by video.

    Raises:
        ValueError: no video can be read.
    """
    if not len(clips):
        raise ValueError(f"{clips.task}: the gallery has no videos")
    device = next(model.parameters()).device
    readable = False
    loader = DataLoader(
        clips,
        batch_size=max(1, batch_size // clips.num_clips),
        num_workers=workers,
        collate_fn=stack_clips,
        shuffle=False,
        worker_init_fn=leave_interrupts_to_parent,
    )
    videos = clips.gallery.videos
    for batch in loader if progress is None else progress(loader, desc="encode videos"):
        for number, reason in batch["unusable"]:
            skipped.add([(videos[number], reason)])
            log.warning("skipped: %s", reason)
        if not batch["numbers"]:
            continue
        readable = True
        frames = batch["frames"]
        on_device = (
            frames.to(device) if isinstance(frames, Tensor) else [f.to(device) for f in frames]
        )
        if clips.reader.spec.features:
            yield batch["numbers"], model.encode_video(on_device)
            continue
        with torch.autocast(device.type, enabled=False):  # pictures as in training
            pixels = to_pixel_values(on_device, model.config.image_size, resize=resize)
        yield batch["numbers"], model.encode_video(pixels)
    if not readable:
        raise ValueError(f"{clips.task}: no video could be read; the first: {skipped.first()}")

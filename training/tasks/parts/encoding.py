"""A gallery's texts and videos as embeddings and states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.data.augment import to_pixel_values
from svitt_ops.training.data.collate import encode_texts
from svitt_ops.training.data.datasets import SkipLog
from svitt_ops.training.tasks.parts.checks import check_finite
from svitt_ops.training.tasks.parts.gallery import GalleryClips, stack_clips

log = logging.getLogger(__name__)
Progress = Callable[..., Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class EncodedTexts:
    """Texts of a gallery."""

    embeds: Tensor  # (texts, dim)
    states: Tensor  # (texts, tokens, width)
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
) -> EncodedTexts:
    """Embeddings and states of all texts, padded alike; a ValueError where they are not finite."""
    device = next(model.parameters()).device
    inputs = encode_texts(tokenizer, texts, text_length, "longest")
    embeds, states = [], []
    for start in range(0, len(texts), batch_size):
        ids, mask = (t[start : start + batch_size].to(device) for t in inputs.values())
        output = model.encode_text(ids, mask)
        embeds.append(output.embeds.float())
        states.append(output.states)
    mask = inputs["attention_mask"].to(device)
    found = torch.cat(embeds)
    check_finite(found, "retrieval: embeddings of texts", lambda k: f"text {k} ({texts[k]!r})")
    return EncodedTexts(embeds=found, states=torch.cat(states), mask=mask)


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
    if not len(clips):
        raise ValueError("retrieval: the gallery has no videos")
    device = next(model.parameters()).device
    skipped = SkipLog()
    usable: list[int] = []
    unusable: list[int] = []
    embeds, states = [], []
    loader = DataLoader(
        clips,
        batch_size=max(1, batch_size // clips.num_clips),
        num_workers=workers,
        collate_fn=stack_clips,
        shuffle=False,
    )
    videos = clips.gallery.videos
    for batch in loader if progress is None else progress(loader, desc="encode videos"):
        for number, reason in batch["unusable"]:
            unusable.append(number)
            skipped.add([(videos[number], reason)])
            log.warning("skipped: %s", reason)
        if not batch["numbers"]:
            continue
        usable += batch["numbers"]
        frames = batch["frames"]
        on_device = (
            frames.to(device) if isinstance(frames, Tensor) else [f.to(device) for f in frames]
        )
        with torch.autocast(device.type, enabled=False):  # pictures as in training
            pixels = to_pixel_values(on_device, model.config.image_size, resize=resize)
        output = model.encode_video(pixels)
        per_video = (len(batch["numbers"]), -1)
        embeds.append(output.embeds.float().unflatten(0, per_video).mean(1))
        if keep_states:
            states.append(output.states.unflatten(0, per_video).cpu())
    if not embeds:
        raise ValueError(f"retrieval: no video could be read; the first: {skipped.first()}")
    found = torch.cat(embeds)
    what = "retrieval: embeddings of videos"
    check_finite(found, what, lambda k: f"video {usable[k]} ({videos[usable[k]]})")
    kept = torch.cat(states) if keep_states else None
    return EncodedVideos(embeds=found, states=kept), unusable, skipped

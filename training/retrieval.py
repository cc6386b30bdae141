"""Text-to-video and video-to-text retrieval: contrastive search, then match re-ranking."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.augment import to_pixel_values
from svitt_ops.training.collate import encode_texts
from svitt_ops.training.datasets import SkipLog
from svitt_ops.training.gallery import Gallery, GalleryClips, stack_clips

if TYPE_CHECKING:
    from svitt_ops.models import SViTTForPreTraining

log = logging.getLogger(__name__)
Progress = Callable[..., Iterable[Any]]
RECALLS = (1, 5, 10)
BELOW = 1e4  # what candidates that were not re-ranked lie below those that were


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How to evaluate retrieval."""

    top_k: int = 128
    """Candidates of the contrastive search that the match head ranks anew; 0: none."""
    clips: int = 1
    """Clips of each video."""
    strided: bool = False
    """Clips take every n-th frame instead of following each other."""
    merge: Literal["logsumexp", "mean", "max"] = "logsumexp"
    """How match scores of the clips become one."""
    batch_size: int = 32
    """Clips that are encoded, and pairs that are matched, at a time."""


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
    model: SViTTForPreTraining,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    text_length: int,
    batch_size: int = 256,
) -> EncodedTexts:
    """Embeddings and states of all texts, padded alike."""
    device = next(model.parameters()).device
    inputs = encode_texts(tokenizer, texts, text_length, "longest")
    embeds, states = [], []
    for start in range(0, len(texts), batch_size):
        ids, mask = (t[start : start + batch_size].to(device) for t in inputs.values())
        output = model.encode_text(ids, mask)
        embeds.append(output.embeds.float())
        states.append(output.states)
    mask = inputs["attention_mask"].to(device)
    return EncodedTexts(embeds=torch.cat(embeds), states=torch.cat(states), mask=mask)


@torch.inference_mode()
def encode_gallery_videos(
    model: SViTTForPreTraining,
    clips: GalleryClips,
    *,
    batch_size: int = 32,
    workers: int = 0,
    keep_states: bool = True,
    progress: Progress | None = None,
    resize: str = "antialias",
) -> tuple[EncodedVideos, list[int], SkipLog]:
    """Embeddings and states of a gallery's videos; the numbers of those that cannot be read."""
    device = next(model.parameters()).device
    skipped = SkipLog()
    unusable: list[int] = []
    embeds, states = [], []
    loader = DataLoader(
        clips, batch_size=batch_size, num_workers=workers, collate_fn=stack_clips, shuffle=False
    )
    shown = loader if progress is None else progress(loader, desc="encode videos")
    for read, frames in shown:
        for clip in read:
            if clip.frames is None:
                unusable.append(clip.number)
                skipped.add([(clips.gallery.videos[clip.number], clip.reason)])
                log.warning("skipped: %s", clip.reason)
        if frames is None:
            continue
        on_device = (
            frames.to(device) if isinstance(frames, Tensor) else [f.to(device) for f in frames]
        )
        pixels = to_pixel_values(on_device, model.config.image_size, resize=resize)
        output = model.encode_video(pixels)
        per_video = (len(read) - sum(clip.frames is None for clip in read), -1)
        embeds.append(output.embeds.float().unflatten(0, per_video).mean(1))
        if keep_states:
            states.append(output.states.unflatten(0, per_video).cpu())
    if not embeds:
        raise ValueError(f"retrieval: no video could be read; the first: {skipped.first()}")
    kept = torch.cat(states) if keep_states else None
    return EncodedVideos(embeds=torch.cat(embeds), states=kept), unusable, skipped


def retrieval(
    model: SViTTForPreTraining,
    tokenizer: PreTrainedTokenizerBase,
    clips: GalleryClips,
    *,
    text_length: int = 32,
    settings: Evaluation | None = None,
    rerank: bool | None = None,
    bf16: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
    resize: str = "antialias",
) -> dict[str, Any]:
    """Evaluate retrieval in both directions.

    Args:
        model: in whatever mode; evaluated in eval mode.
        tokenizer: the model's.
        clips: what to search.
        text_length: longest text, in tokens.
        settings: candidates, merging of clips, batch size.
        rerank: whether the match head ranks the best candidates anew; default: if it was trained.
        bf16: run under autocast.
        workers: processes that decode.
        progress: wraps the loops, such as tqdm; called with the iterable and desc=.
        resize: as in `to_pixel_values`.

    Returns:
        Percentages `text_to_video` and `video_to_text`, each {"R1", "R5", "R10", "mean"},
        `mean` of both; `contrastive`: the same before re-ranking; `videos`, `texts`, `skipped`.
    """
    settings = settings or Evaluation()
    if rerank is None:
        rerank = model.config.loss_weights.get("vtm", 1) > 0
    rerank = rerank and settings.top_k > 0
    device = next(model.parameters()).device
    context = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    was_training = model.training
    model.eval()
    try:
        with context, torch.inference_mode():
            videos, unusable, skipped = encode_gallery_videos(
                model,
                clips,
                batch_size=settings.batch_size,
                workers=workers,
                keep_states=rerank,
                progress=progress,
                resize=resize,
            )
            gallery = clips.gallery.without(unusable)
            texts = encode_gallery_texts(model, tokenizer, gallery.texts, text_length=text_length)
            scores = texts.embeds @ videos.embeds.T
            found: dict[str, Any] = {"contrastive": recalls(scores, gallery)}
            if rerank:
                by_text = _rerank(model, scores, texts, videos, settings, False, progress)
                by_video = _rerank(model, scores, texts, videos, settings, True, progress)
                found |= recalls(by_text, gallery, by_video)
            else:
                found |= found["contrastive"]
    finally:
        model.train(was_training)
    counts = {"videos": len(gallery.videos), "texts": len(gallery.texts)}
    return found | counts | {"skipped": dict(skipped.reasons)}


def recalls(
    text_scores: Tensor, gallery: Gallery, video_scores: Tensor | None = None
) -> dict[str, Any]:
    """R@1/5/10 and their mean in percent, both ways, from scores (texts, videos)."""
    video_scores = text_scores if video_scores is None else video_scores
    groups = torch.tensor(gallery.text_groups)[:, None] == torch.tensor(gallery.video_groups)
    groups = groups.to(text_scores.device)
    result: dict[str, Any] = {
        "text_to_video": recall_table(best_ranks(text_scores, groups)),
        "video_to_text": recall_table(best_ranks(video_scores.T, groups.T)),
    }
    result["mean"] = (result["text_to_video"]["mean"] + result["video_to_text"]["mean"]) / 2
    return result


def best_ranks(scores: Tensor, positives: Tensor) -> Tensor:
    """Rank, from 0, of the best positive of each row; candidates that tie with it come first."""
    best = scores.masked_fill(~positives, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~positives).sum(1)


def recall_table(ranks: Tensor) -> dict[str, float]:
    """R@1/5/10 and their mean, in percent."""
    table = {f"R{k}": (ranks < k).double().mean().item() * 100 for k in RECALLS}
    table["mean"] = sum(table.values()) / len(RECALLS)
    return table


def _rerank(
    model: SViTTForPreTraining,
    scores: Tensor,
    texts: EncodedTexts,
    videos: EncodedVideos,
    settings: Evaluation,
    by_video: bool,
    progress: Progress | None,
) -> Tensor:
    """Scores (texts, videos) in which each query's best candidates have their match score."""
    assert videos.states is not None
    merged = scores - BELOW
    queries = scores.T if by_video else scores
    candidates = queries.topk(min(settings.top_k, queries.shape[1]), dim=1).indices
    chunk = max(1, settings.batch_size // videos.states.shape[1])
    what = "video to text" if by_video else "text to video"
    shown = candidates if progress is None else progress(candidates, desc=f"re-rank {what}")
    for query, chosen in enumerate(shown):
        for part in chosen.split(chunk):
            other = torch.full_like(part, query)
            text, video = (part, other) if by_video else (other, part)
            match = _match(model, texts, videos.states, text, video, settings.merge)
            merged[text, video] = match.to(merged.dtype)
    return merged


def _match(
    model: SViTTForPreTraining,
    texts: EncodedTexts,
    states: Tensor,
    text: Tensor,
    video: Tensor,
    merge: str,
) -> Tensor:
    """Match scores of pairs, over all clips of the videos."""
    num_clips = states.shape[1]
    pairs = states[video.cpu()].flatten(0, 1).to(texts.states.device)
    rows = text.repeat_interleave(num_clips)
    logits = model.match_logits(texts.states[rows], texts.mask[rows], pairs)[:, 1]
    logits = logits.float().unflatten(0, (-1, num_clips))
    if merge == "logsumexp":
        return logits.logsumexp(1)
    return logits.mean(1) if merge == "mean" else logits.amax(1)

"""Text-to-video and video-to-text retrieval: contrastive search, then match re-ranking."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.data.augment import to_pixel_values
from svitt_ops.training.data.collate import count_cut, encode_texts
from svitt_ops.training.data.datasets import SkipLog
from svitt_ops.training.tasks.parts.checks import check_finite
from svitt_ops.training.tasks.parts.gallery import Gallery, GalleryClips, stack_clips

if TYPE_CHECKING:
    from svitt_ops.models import SViTTForPreTraining

log = logging.getLogger(__name__)
Progress = Callable[..., Iterable[Any]]
Merge = Literal["logsumexp", "mean", "max"]
RECALLS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How to evaluate retrieval."""

    top_k: int = 128
    """Candidates of the contrastive search that the match head ranks anew; 0: none."""
    clips: int = 1
    """Clips of each video."""
    strided: bool = False
    """Clips take every n-th frame instead of following each other."""
    merge: Merge = "logsumexp"
    """How match scores of the clips become one."""
    batch_size: int = 32
    """Clips that are encoded, and pairs that are matched, at a time."""

    def __post_init__(self) -> None:
        for name, least in (("top_k", 0), ("clips", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"evaluation: {name} must be at least {least}, got {value}")
        if self.merge not in get_args(Merge):
            raise ValueError(
                f"evaluation: merge must be one of {', '.join(get_args(Merge))}, got {self.merge!r}"
            )


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
    model: SViTTForPreTraining,
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

    Scores are compared in fp32, whatever the towers compute in: rounded scores tie, and ties count
    against the query (see `best_ranks`).

    Args:
        model: in whatever mode; evaluated in eval mode.
        tokenizer: the model's.
        clips: what to search.
        text_length: longest text, in tokens.
        settings: candidates, merging of clips, batch size.
        rerank: whether the match head ranks the best candidates anew; default: if it was trained.
        bf16: run the towers and the fusion layers under autocast.
        workers: processes that decode.
        progress: wraps the loops, such as tqdm; called with the iterable and desc=.
        resize: as in `to_pixel_values`.

    Returns:
        Percentages `text_to_video` and `video_to_text`, each {"R1", "R5", "R10", "mean"},
        `mean` of both; `contrastive`: the same before re-ranking; `videos`, `texts`, `skipped`,
        and `texts_cut`, the texts longer than `text_length`.

    Raises:
        ValueError: no video can be read; embeddings or scores are not finite.
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
            if len(set(gallery.video_groups)) < 2:
                log.warning(
                    "retrieval: all %d videos belong together, so that any model gets 100 %%",
                    len(gallery.videos),
                )
            texts = encode_gallery_texts(model, tokenizer, gallery.texts, text_length=text_length)
            with torch.autocast(device.type, enabled=False):
                scores = texts.embeds @ videos.embeds.T
            found: dict[str, Any] = {"contrastive": recalls(scores, gallery)}
            if rerank:
                ranked = [
                    _rerank(model, scores, gallery, texts, videos, settings, by_video, progress)
                    for by_video in (False, True)
                ]
                found |= recalls(ranked[0], gallery, ranked[1])
            else:
                found |= found["contrastive"]
    finally:
        model.train(was_training)
    counts = {"videos": len(gallery.videos), "texts": len(gallery.texts)}
    cut = {"texts_cut": count_cut(tokenizer, gallery.texts, text_length)}
    return found | counts | cut | {"skipped": dict(skipped.reasons)}


def recalls(
    text_scores: Tensor, gallery: Gallery, video_scores: Tensor | None = None
) -> dict[str, Any]:
    """R@1/5/10 and their mean in percent, both ways, from scores (texts, videos).

    Scores that are not finite raise a ValueError: no number can be said of them.
    """
    video_scores = text_scores if video_scores is None else video_scores
    for scores in (text_scores, video_scores):
        check_finite(scores, "retrieval: scores of texts", lambda k: f"{gallery.texts[k]!r}")
    groups = torch.tensor(gallery.text_groups)[:, None] == torch.tensor(gallery.video_groups)
    groups = groups.to(text_scores.device)
    result: dict[str, Any] = {
        "text_to_video": recall_table(best_ranks(text_scores, groups)),
        "video_to_text": recall_table(best_ranks(video_scores.T, groups.T)),
    }
    result["mean"] = (result["text_to_video"]["mean"] + result["video_to_text"]["mean"]) / 2
    return result


def best_ranks(scores: Tensor, positives: Tensor) -> Tensor:
    """Rank, from 0, of the best positive of each row; candidates that tie with it come first.

    So a collapsed model, which gives everything one score, is last everywhere and finds nothing.
    (`svitt_ops.retrieval_ranks`, for training code, lets ties pass.) What is not finite never
    passes for success: a row whose best positive is NaN or infinite has the last place, as if all
    candidates tied with it, and a candidate that is NaN or infinite comes first.

    Args:
        scores: floating ``(queries, candidates)``.
        positives: bool, of the same shape.

    Returns:
        int64 ``(queries,)``: how many candidates that are no positives come before the best one.
    """
    best = scores.masked_fill(~positives, -torch.inf).amax(1, keepdim=True)  # NaN if any is
    finite = torch.isfinite(best)
    if not finite.all():
        log.warning("%d of %d ranks: no finite best score", int((~finite).sum()), len(scores))
    ahead = ~(scores < best) | ~finite  # a NaN is not less
    return (ahead & ~positives).sum(1)


def recall_table(ranks: Tensor) -> dict[str, float]:
    """R@1/5/10 and their mean, in percent."""
    table = {f"R{k}": (ranks < k).double().mean().item() * 100 for k in RECALLS}
    table["mean"] = sum(table.values()) / len(RECALLS)
    return table


def _rerank(
    model: SViTTForPreTraining,
    scores: Tensor,
    gallery: Gallery,
    texts: EncodedTexts,
    videos: EncodedVideos,
    settings: Evaluation,
    by_video: bool,
    progress: Progress | None,
) -> Tensor:
    """Scores (texts, videos) in which each query's best candidates have their match score."""
    assert videos.states is not None
    queries = scores.T if by_video else scores
    candidates = queries.topk(min(settings.top_k, queries.shape[1]), dim=1).indices
    chunk = max(1, settings.batch_size // videos.states.shape[1])
    what = "video to text" if by_video else "text to video"
    shown = candidates if progress is None else progress(candidates, desc=f"re-rank {what}")
    rows = []
    for query, chosen in enumerate(shown):
        parts = []
        for part in chosen.split(chunk):
            other = torch.full_like(part, query)
            text, video = (part, other) if by_video else (other, part)
            parts.append(_match(model, texts, videos.states, text, video, settings.merge))
        rows.append(torch.cat(parts))
    match = torch.stack(rows)
    names = gallery.videos if by_video else gallery.texts
    check_finite(match, f"retrieval: match scores, {what}", lambda k: f"those of {names[k]!r}")
    # The others keep their order, below. In fp64: of the 24 bits of an fp32 score of 0.9, 17 are
    # left beside a match score of 100, and scores that differ in the others would tie.
    match = match.double()
    below = queries.amax(1, keepdim=True) - match.amin(1, keepdim=True) + 1
    merged = (queries.double() - below).scatter(1, candidates, match)
    return merged.T if by_video else merged


def _match(
    model: SViTTForPreTraining,
    texts: EncodedTexts,
    states: Tensor,
    text: Tensor,
    video: Tensor,
    merge: Merge,
) -> Tensor:
    """Match scores of pairs, over all clips of the videos."""
    num_clips = states.shape[1]
    pairs = states[video.cpu()].flatten(0, 1).to(texts.states.device)
    rows = text.repeat_interleave(num_clips)
    logits = model.match_logits(texts.states[rows], texts.mask[rows], pairs)[:, 1]
    logits = logits.float().unflatten(0, (-1, num_clips))  # their sums and means in fp32 too
    if merge == "logsumexp":
        return logits.logsumexp(1)
    return logits.mean(1) if merge == "mean" else logits.amax(1)

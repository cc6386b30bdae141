"""Ranks and recalls from scores of texts and videos."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from svitt_ops.training.tasks.parts.checks import check_finite
from svitt_ops.training.tasks.parts.gallery import Gallery

log = logging.getLogger(__name__)
RECALLS = (1, 5, 10)


def recalls(
    text_scores: Tensor, gallery: Gallery, video_scores: Tensor | None = None
) -> dict[str, Any]:
    """R@1/5/10, their mean and their sum in percent, both ways, from scores (texts, videos).

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
    result["rsum"] = sum(table[f"R{k}"] for table in result.values() for k in RECALLS)
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


def are_first(scores: Tensor, answers: Tensor) -> Tensor:
    """Whether the right candidate of each row has a higher score than every other one.

    Args:
        scores: floating ``(queries, candidates)``.
        answers: int64 ``(queries,)``, the number of the right candidate.

    Returns:
        bool ``(queries,)``.
    """
    others = scores.scatter(1, answers[:, None], -torch.inf)
    return scores.gather(1, answers[:, None])[:, 0] > others.amax(1)


def recall_table(ranks: Tensor) -> dict[str, float]:
    """R@1/5/10 and their mean, in percent."""
    table = {f"R{k}": (ranks < k).double().mean().item() * 100 for k in RECALLS}
    table["mean"] = sum(table.values()) / len(RECALLS)
    return table

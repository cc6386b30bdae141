"""Losses over the fusion layers, and what they are drawn from."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so

IGNORED = -100
"""Label of what adds nothing to a loss."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that count; 0, not NaN, where none does."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def draw_negatives(
    video: Tensor, text: Tensor, temperature: Tensor, ids: Tensor | None, *, hard: bool = True
) -> tuple[Tensor, Tensor]:
    """A wrong clip for each text and a wrong text for each clip: rows, -1 where there is none.

    Args:
        video: embeddings of the clips ``(batch, dim)``.
        text: those of the texts.
        temperature: of the contrastive loss.
        ids: int64 ``(batch,)``; pairs with equal ids are no negatives of each other.
        hard: drawn by similarity; False: all are equally likely.
    """
    queries = [text.detach(), video.detach()]
    if not hard:
        queries = [torch.zeros_like(x) for x in queries]
    temperature = temperature.detach()
    clip = so.sample_hard_negatives(queries[0], video, temperature, ids=ids)
    return clip, so.sample_hard_negatives(queries[1], text, temperature, ids=ids)


def match_loss(
    logits: Callable[[Tensor, Tensor, Tensor], Tensor],
    text: Tensor,
    attention_mask: Tensor,
    video: Tensor,
    negatives: tuple[Tensor, Tensor],
) -> Tensor:
    """Loss of 3 B pairs: those that match, and one wrong clip and one wrong text for each.

    A row of the batch without a negative (all others have its id) is left out: its pair is made
    with row 0 to keep the shapes, and its label is ignored.

    Args:
        logits: of pairs, from texts, their mask and clips: ``(pairs, 2)``, the second is "yes".
        text: what ``logits`` takes, by row of the batch.
        attention_mask: ``(batch, tokens)``, 0 at padding.
        video: as ``text``.
        negatives: of `draw_negatives`.
    """
    clip, other = (rows.clamp(min=0) for rows in negatives)
    found = logits(
        torch.cat([text, text, text[other]]),
        torch.cat([attention_mask, attention_mask, attention_mask[other]]),
        torch.cat([video, video[clip], video]),
    )
    wrong = torch.cat(negatives)
    matching = torch.ones_like(negatives[0])
    return cross_entropy(found, torch.cat([matching, torch.where(wrong < 0, IGNORED, 0)]))

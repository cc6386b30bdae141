"""Losses over the fusion layers, and what they are drawn from."""

from __future__ import annotations

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


def distilled_cross_entropies(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, alpha: float, *, axis: int = -1
) -> Tensor:
    """Cross-entropy of every label with targets that a teacher has a share in.

    ``-sum_c t_c log softmax(logits)_c`` with ``t = (1 - alpha) y + alpha softmax(teacher)``.

    Args:
        logits: ``(..., classes)``.
        labels: int64 ``(...)``; those that are `IGNORED` have loss 0.
        teacher: logits like ``logits``, without gradient; None only with ``alpha=0``.
        alpha: share of the teacher, in [0, 1].
        axis: over which the logarithm of the teacher's part is normalised; another one than the
            last is no distribution over classes, and is only for what released code does.

    Returns:
        fp32, like ``labels``.

    Source:
        ALBEF (NeurIPS 2021), equation 7.
    """
    logits = logits.float()
    hard = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    if not alpha:
        return hard
    if teacher is None or teacher.shape != logits.shape:
        got = None if teacher is None else tuple(teacher.shape)
        raise ValueError(
            f"distilled_cross_entropies: teacher must have shape {tuple(logits.shape)}, got {got}"
        )
    soft = -(teacher.detach().float().softmax(-1) * logits.log_softmax(axis)).sum(-1)
    return (1 - alpha) * hard + alpha * soft.masked_fill(labels == IGNORED, 0)


def mean_of_labels(losses: Tensor, labels: Tensor) -> Tensor:
    """Mean of losses over the labels that count; 0 where none does."""
    return losses.sum() / (labels != IGNORED).sum().clamp(min=1)


def draw_negatives(
    video: Tensor,
    text: Tensor,
    temperature: Tensor,
    ids: Tensor | None,
    *,
    hard: bool = True,
    keys: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """A wrong clip for each text and a wrong text for each clip: rows, -1 where there is none.

    Args:
        video: embeddings of the clips ``(batch, dim)``.
        text: those of the texts.
        temperature: of the contrastive loss.
        ids: int64 ``(batch,)``; pairs with equal ids are no negatives of each other.
        hard: drawn by similarity; False: all are equally likely.
        keys: other embeddings of the clips and of the texts, by whose similarity to a text and to a
            clip they are drawn; by default ``video`` and ``text``.
    """
    video_keys, text_keys = (video, text) if keys is None else keys
    queries = [text.detach(), video.detach()]
    if not hard:
        queries = [torch.zeros_like(x) for x in queries]
    temperature = temperature.detach()
    clip = so.sample_hard_negatives(queries[0], video_keys, temperature, ids=ids)
    return clip, so.sample_hard_negatives(queries[1], text_keys, temperature, ids=ids)


def match_pairs(negatives: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """3 B pairs: those that match, and one wrong clip and one wrong text for each.

    A row of the batch without a negative (all others have its id) is left out: its pair is made
    with row 0 to keep the shapes, and its label is ignored.

    Args:
        negatives: of `draw_negatives`.

    Returns:
        Rows of the texts and of the clips, and labels, int64 ``(3 B,)`` each.
    """
    clip, text = (rows.clamp(min=0) for rows in negatives)
    own = torch.arange(len(clip), device=clip.device)
    wrong = torch.where(torch.cat(negatives) < 0, IGNORED, 0)
    labels = torch.cat([torch.ones_like(own), wrong])
    return torch.cat([own, own, text]), torch.cat([own, clip, own]), labels


def labelled(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """States ``(..., dim)`` and labels ``(...)`` of the places that add to a loss, in one row.

    All of them where shapes must not depend on values.
    """
    states, labels = states.flatten(0, -2), labels.flatten()
    if torch.compiler.is_compiling() or labels.is_meta:
        return states, labels
    places = (labels != IGNORED).nonzero().squeeze(1)
    return states.index_select(0, places), labels.index_select(0, places)

"""The triplet losses of matching, over the batch of all processes.

Source: VSE++ (BMVC 2018), equations 5 and 6.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

import svitt_ops as so

HARDEST = 2e-9
"""A temperature at which what is drawn by similarity is the most similar one: it makes much of the
last digit of fp32, and of products up to 1 logits that the op still takes, below 1e9."""


def triplet_loss(
    images: Tensor,
    texts: Tensor,
    margin: float,
    *,
    negatives: Literal["hardest", "all"] = "hardest",
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``sum_i max_j [margin + s_ij - s_ii]_+``, over the texts of images and the images of texts.

    Args:
        images: normalised embeddings ``(B, D)``.
        texts: like ``images``; row i belongs to row i of ``images``.
        margin: at least 0.
        negatives: "hardest", whose term is the greatest of a row, found without the matrix of
            similarities; or "all", the sum of all terms.
        ids: int64 ``(B,)``; rows with equal ids are no negatives of each other.
        group: processes that hold parts of one batch. Each returns the loss of all, and gradients
            whose mean over the processes, which DDP takes, is that of this loss.

    Returns:
        fp32, summed over the batch.
    """
    if images.dim() != 2 or images.shape != texts.shape:
        raise ValueError(
            f"triplet_loss: texts must have the shape of images, (B, D), got {tuple(texts.shape)}"
            f" and {tuple(images.shape)}"
        )
    if ids is not None and (ids.dtype != torch.int64 or ids.shape != images.shape[:1]):
        raise ValueError(
            f"triplet_loss: ids must be int64 of shape ({len(images)},), got {ids.dtype} of"
            f" {tuple(ids.shape)}"
        )
    with torch.autocast(images.device.type, enabled=False):  # rounded similarities would tie
        return _triplet_loss(images.float(), texts.float(), margin, negatives, ids, group)


def _triplet_loss(
    images: Tensor,
    texts: Tensor,
    margin: float,
    negatives: str,
    ids: Tensor | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    images, texts = gathered(images, group), gathered(texts, group)
    ids = None if ids is None else gathered(ids, group)
    matching = (images * texts).sum(1)
    total = 0 * matching.sum()  # NaN, where an embedding is: it has no negative
    for query, key in ((images, texts), (texts, images)):
        if negatives == "hardest":
            hardest = so.sample_hard_negatives(query, key, HARDEST, ids=ids)
            terms = margin + (query * key[hardest.clamp(min=0)]).sum(1) - matching
            none = hardest < 0
        else:
            terms = margin + query @ key.T - matching[:, None]
            rows = torch.arange(len(terms), device=terms.device) if ids is None else ids
            none = rows[:, None] == rows
        total = total + terms.clamp(min=0).masked_fill(none, 0).sum()
    return total


def gathered(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all processes, which all make the same of them.

    So the gradient of a process's own rows is the same on all; times the processes, their mean is
    right.
    """
    return rows if group is None else _GatherRows.apply(rows, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.place = dist.get_rank(group) * len(rows), len(rows), dist.get_world_size(group)
        found = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, rows.contiguous(), group=group)
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        first, count, world = ctx.place
        return grad[first : first + count] * world, None

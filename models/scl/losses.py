"""SCL's losses: semantic completion, pairs that match or not, and the rank of a clip's text.

Source: SCL (CVPR 2023), equations 1 to 9.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

import svitt_ops as so
from svitt_ops.models.parts.losses import IGNORED, cross_entropy


def completion_loss(
    recovered: Tensor,
    complete: Tensor,
    temperature: float,
    *,
    group: ProcessGroup | None = None,
    symmetric: bool = True,
    over_frames: bool = False,
) -> Tensor:
    """Contrast of what was recovered from a masked input with what the whole one says.

    ``InfoNCE(r, c) + InfoNCE(c, r)`` of cosines over a temperature, or the first alone, without
    gradient to the complete side; the negatives are other samples' of either side. Of clips it is
    the mean over the frames.

    Args:
        recovered: ``(batch, dim)``, or ``(batch, frames, dim)``.
        complete: like ``recovered``.
        temperature: fixed.
        group: processes that share the batch.
        symmetric: whether complete features are also told among all recovered ones.
        over_frames: scale clips' features to length 1 over the frames, as the released code does,
            so that products are no cosines.
    """
    dim = 1 if over_frames and recovered.dim() == 3 else -1
    frames = [
        F.normalize(side.float(), dim=dim).view(len(side), -1, side.shape[-1]).unbind(1)
        for side in (recovered, complete.detach())
    ]
    ways = 2 if symmetric else 1  # of which the op takes the mean
    losses = [
        ways * so.info_nce(one, other, temperature, group=group, symmetric=symmetric)
        for one, other in zip(*frames, strict=True)
    ]
    return torch.stack(losses).mean()


def draw_pairs(batch: int, ids: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which clip each text gets, and whether it is its own: ``(batch,)`` each.

    Half of the texts, an odd one more, get another text's clip, all equally likely. One whose id
    all others have keeps its own, and its label is ignored.

    Args:
        batch: pairs.
        ids: int64 ``(batch,)``; pairs with equal ids are true of each other.
        device: where they are.
    """
    rows = torch.arange(batch, device=device)
    ids = rows if ids is None else ids
    others = ids[:, None] != ids
    wrong = torch.rand(batch, batch, device=device).masked_fill(~others, -1).argmax(1)
    own = torch.randperm(batch, device=device) < batch // 2
    labels = torch.where(own, 1, torch.where(others.any(1), 0, IGNORED))
    return torch.where(labels == 0, wrong, rows), labels


def rank_loss(scores: Tensor) -> Tensor:
    """Cross-entropy of the first of some texts, scores ``(clips, texts)``: the true one."""
    return cross_entropy(scores, torch.zeros_like(scores[:, 0], dtype=torch.int64))


def text_contrast(
    video: Tensor, text: Tensor, temperature: Tensor, ids: Tensor | None = None
) -> Tensor:
    """Contrast of clips with all texts of a process's batch, in this one direction.

    Args:
        video: embeddings ``(clips, dim)``.
        text: embeddings ``(batch, texts, dim)``, the first of each row true of the row's clip;
            there may be more rows than clips.
        temperature: learned.
        ids: int64 ``(batch,)``, of the rows; the first texts of rows with a clip's id are no
            negatives of it.
    """
    own = torch.arange(len(video), device=video.device)
    with torch.autocast(video.device.type, enabled=False):  # rounded logits would tie
        logits = video.float() @ text.flatten(0, 1).float().T / temperature
    if ids is not None:
        same = ids[: len(video), None] == ids
        same[own, own] = False
        logits[:, :: text.shape[1]].masked_fill_(same, float("-inf"))
    return cross_entropy(logits, own * text.shape[1])


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of soft scores ``(batch, answers)``: summed over the answers, mean."""
    found = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
    return found.sum(1).mean()

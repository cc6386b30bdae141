"""Soft masks of images, and the focal contrastive loss.

Source: Soft masking for vision-language pretraining (CVPR 2023) and its supplement, section 2;
focal loss (ICCV 2017).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 50
"""Halvings of an interval of length 2, which end below the rounding of fp64 sums."""


def choose_words(maps: Tensor, allowed: Tensor) -> Tensor:
    """The map of one word of each text, drawn uniformly.

    Args:
        maps: ``(batch, tokens, n)``.
        allowed: bool ``(batch, tokens)``, True at words.

    Returns:
        ``(batch, n)``; zeros for a text without a word.
    """
    some = allowed.any(1)
    weights = torch.where(some[:, None], allowed, True).float()
    chosen = torch.multinomial(weights, 1)
    found = maps.gather(1, chosen[..., None].expand(-1, -1, maps.shape[2]))[:, 0]
    return found * some[:, None]


def normalized(maps: Tensor, how: str) -> Tensor:
    """Maps ``(batch, n)`` in [0, 1]: over their "max", or from their "minmax"; zeros stay zeros."""
    if how == "minmax":
        maps = maps - maps.amin(1, keepdim=True)
    top = maps.amax(1, keepdim=True)
    return torch.where(top > 0, maps / top.clamp(min=torch.finfo(maps.dtype).tiny), 0)


def compensated(maps: Tensor, share: float, how: str) -> Tensor:
    """Masks with a given mass: their sum is ``share`` times the number of patches.

    "add" is ``clip(c + b, 0, 1)``, which always exists; "multiply" is ``min(1, l c)`` for rows that
    have enough patches above 0, and "add" for the others; "none" leaves the maps as they are.

    Args:
        maps: ``(batch, n)``, in [0, 1].
        share: of the patches, in [0, 1].
        how: "add", "multiply" or "none".

    Returns:
        ``(batch, n)``.
    """
    if how == "none":
        return maps
    c, mass = maps.double(), share * maps.shape[1]
    found = _added(c, mass)
    if how == "multiply":
        enough = ((c > 0).sum(1, keepdim=True) >= mass) & (c.amax(1, keepdim=True) > 0)
        found = torch.where(enough, _multiplied(c, mass), found)
    return found.to(maps.dtype)


def _added(c: Tensor, mass: float) -> Tensor:
    """``clip(c + b, 0, 1)`` with the b, from -1 to 1, that gives each row its mass."""
    low = c.new_full((len(c), 1), -1.0)
    high = -low
    for _ in range(STEPS):
        middle = (low + high) / 2
        below = (c + middle).clamp(0, 1).sum(1, keepdim=True) < mass
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (c + (low + high) / 2).clamp(0, 1)


def _multiplied(c: Tensor, mass: float) -> Tensor:
    """``min(1, l c)`` with each row's mass, where there is such an l."""
    ranked = c.sort(1, descending=True).values
    rest = ranked.flip(1).cumsum(1).flip(1)  # of what is not among the k greatest
    full = torch.arange(c.shape[1], device=c.device)
    factors = (mass - full).clamp(min=0) / rest.clamp(min=torch.finfo(c.dtype).tiny)
    # The k greatest reach 1: the least k whose factor leaves the next below it.
    fits = factors * ranked <= 1
    first = fits.to(torch.int8).argmax(1, keepdim=True)
    factor = factors.gather(1, first)
    kept = full < first
    order = c.argsort(1, descending=True)
    values = torch.where(kept, 1, (ranked * factor).clamp(max=1))
    return torch.zeros_like(c).scatter(1, order, values)


def soft_masked(states: Tensor, mask: Tensor, keeps: bool) -> Tensor:
    """States of images with their patches scaled; [CLS] stays.

    Args:
        states: ``(batch, 1 + n, dim)``.
        mask: ``(batch, n)``, what is taken of every patch, or what ``keeps`` it.
        keeps: which of both.
    """
    kept = mask if keeps else 1 - mask
    return states * F.pad(kept, (1, 0), value=1.0)[..., None].to(states.dtype)


def focal_contrast(
    query: Tensor,
    candidates: Tensor,
    temperature: Tensor,
    positives: Tensor,
    teacher: Tensor,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Focal contrastive loss: ``-1/B sum_ij y_ij (1 - p_ij)^gamma log p_ij``.

    ``p = softmax(query . candidates / temperature)``; y is as in `svitt_ops.queue_info_nce`, which
    has this loss for ``gamma=0``. The matrix of similarities is stored: ``4 B C`` bytes, a few
    times.

    Args:
        query: ``(B, D)``, normalised.
        candidates: ``(C, D)``, without gradient.
        temperature: one element.
        positives: bool ``(B, C)``, at least one in each row.
        teacher: ``(B, D)``, the twin's embeddings of what ``query`` embeds.
        alpha: share of the teacher in the targets.
        gamma: 0 or more.
    """
    with torch.no_grad():
        targets = positives / positives.sum(1, keepdim=True)
        if alpha:
            soft = (teacher.float() @ candidates.float().T / temperature).softmax(1)
            targets = alpha * soft + (1 - alpha) * targets
    log_p = (query.float() @ candidates.float().T / temperature).log_softmax(1)
    # -expm1 keeps the digits of 1 - p; its root has no gradient at 0.
    far = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return -(targets * far**gamma * log_p).sum(1).mean()

"""Which patches of an image are masked, and which words of its text become its labels.

Source: BEiT (ICLR 2022) for the blocks; SIMLA (ECCV 2022), section 2.4 and supplement 3, for words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_BLOCK = 16
"""Patches of the smallest block."""
ASPECT = 0.3
"""Bound of a block's aspect ratio, and its inverse the other."""
TRIES = 10
"""Draws of a block until one fits and masks something."""


def block_masks(
    batch: int, side: int, count: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Masks of rectangular blocks.

    Blocks of a random area from 16 patches to what is left, and of a random aspect ratio, are
    placed at random until ``count`` patches are masked, or no block of ten draws masks a patch more
    without passing it.

    Args:
        batch: images.
        side: patches along a side of each.
        count: the most patches that are masked in one.
        generator: of the random numbers, on the CPU; torch's default one if None.

    Returns:
        bool ``(batch, side * side)`` on the CPU, True where a patch is masked.
    """
    masks = torch.zeros(batch, side, side, dtype=torch.bool)
    for mask in masks:
        left = count
        while left > 0:
            added = _add_block(mask, left, generator)
            if not added:
                break
            left -= added
    return masks.flatten(1)


def _add_block(mask: Tensor, most: int, generator: torch.Generator | None) -> int:
    """Mask a block that adds 1 to ``most`` patches; returns how many, 0 if none was found."""
    side, reach = len(mask), math.log(1 / ASPECT)
    least = min(LEAST_BLOCK, most)
    draws = torch.rand(TRIES, 4, dtype=torch.float64, generator=generator).tolist()
    for of_area, of_aspect, of_top, of_left in draws:
        area = least + of_area * (most - least)
        aspect = math.exp((2 * of_aspect - 1) * reach)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < side and 0 < width < side):
            continue
        top, left = (int(x * (side - n + 1)) for x, n in ((of_top, height), (of_left, width)))
        block = mask[top : top + height, left : left + width]
        added = height * width - int(block.sum())
        if 0 < added <= most:
            block.fill_(True)
            return added
    return 0


def votes_of_heads(attention: Tensor, count: int) -> Tensor:
    """How many heads have a place among the ``count`` that they attend most.

    Args:
        attention: ``(batch, heads, tokens)``.
        count: places of each head.

    Returns:
        int64 ``(batch, tokens)``.
    """
    best = attention.topk(min(count, attention.shape[-1]), -1).indices
    votes = torch.zeros_like(attention, dtype=torch.int64).scatter(-1, best, 1)
    return votes.sum(1)


def best_places(scores: Tensor, allowed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places of each text with the best scores; of equal ones, the first counts as the best.

    Args:
        scores: ``(batch, tokens)``; a place of score 0 is not chosen.
        allowed: bool ``(batch, tokens)``, False at places that are not chosen.
        count: the most places.

    Returns:
        int64 ``(batch, count)``, the best first, and bool, whether each is chosen.
    """
    ranked = scores.masked_fill(~allowed, 0).sort(dim=1, descending=True, stable=True)
    return ranked.indices[:, :count], ranked.values[:, :count] > 0


def keyword_targets(
    scores: Tensor, input_ids: Tensor, allowed: Tensor, count: int, vocab_size: int
) -> Tensor:
    """The words of the places with the best scores, as labels; arguments as of `best_places`.

    Args:
        scores: ``(batch, tokens)``.
        input_ids: int64 ``(batch, tokens)``; the first is [CLS], which is no label.
        allowed: bool ``(batch, tokens)``.
        count: the most labels.
        vocab_size: pieces.

    Returns:
        ``(batch, vocab_size)``, 1 at labels, 0 elsewhere.
    """
    best, chosen = best_places(scores, allowed, count)
    targets = torch.zeros(len(scores), vocab_size, device=scores.device)
    targets.scatter_reduce_(1, input_ids.gather(1, best), chosen.to(targets.dtype), "amax")
    return targets.scatter(1, input_ids[:, :1], 0)

"""Token pruning by full sorts and gathers, obviously right."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class PrunedTokens(NamedTuple):
    """What `prune_tokens` keeps, in the order of the sequence."""

    tokens: Tensor
    """``(batch, num_global + keep, dim)``, the dtype of the tokens given."""
    indices: Tensor
    """int64 ``(batch, keep)``, ascending; 0 is the first token after the globals."""
    position_codes: Tensor | None
    """int32 ``(batch, keep)``, codes of the kept tokens; None if none were given."""


def select_tokens(scores: Tensor, keep: int) -> Tensor:
    """`svitt_ops.select_tokens` in plain PyTorch."""
    missing = scores.isnan()
    # torch.sort takes NaN for the largest value; here it comes after -inf.
    ranked = scores.masked_fill(missing, float("-inf")).sort(dim=1, descending=True, stable=True)
    last = missing.gather(1, ranked.indices).to(torch.uint8).sort(dim=1, stable=True)
    return ranked.indices.gather(1, last.indices)[:, :keep].sort(dim=1).values


def prune_tokens(
    tokens: Tensor,
    scores: Tensor,
    *,
    keep: int | None = None,
    keep_rate: float | None = None,
    num_global: int = 1,
    position_codes: Tensor | None = None,
) -> PrunedTokens:
    """`svitt_ops.prune_tokens` in plain, differentiable PyTorch."""
    if keep is None:
        assert keep_rate is not None
        keep = math.ceil(round(keep_rate * scores.shape[1], 9))
    indices = select_tokens(scores, keep)
    kept = tokens[:, num_global:].gather(1, indices[:, :, None].expand(-1, -1, tokens.shape[2]))
    codes = None
    if position_codes is not None:
        codes = position_codes.expand(scores.shape).gather(1, indices)
    return PrunedTokens(torch.cat([tokens[:, :num_global], kept], 1), indices, codes)


def inverse_of(indices: Tensor, num_tokens: int) -> Tensor:
    """The slot that each of the tokens was kept in, -1 where it was not; int32."""
    inverse = indices.new_full((indices.shape[0], num_tokens), -1)
    slots = torch.arange(indices.shape[1], device=indices.device)
    return inverse.scatter_(1, indices, slots.expand(indices.shape)).int()


def prune_backward(grad_out: Tensor, inverse: Tensor, num_global: int) -> Tensor:
    """Gradient of the tokens, gathered through the inverse map.

    For where autograd cannot go: a kernel runs below it.
    """
    kept = (inverse >= 0)[:, :, None]
    slots = inverse.clamp(min=0).long()[:, :, None].expand(-1, -1, grad_out.shape[2])
    rest = grad_out[:, num_global:].gather(1, slots).masked_fill(~kept, 0.0)
    return torch.cat([grad_out[:, :num_global], rest], 1)

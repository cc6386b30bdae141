"""What the towers' layers share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Two projections around a GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Residual(nn.Module):
    """Adds a branch to the stream, with layer scale and stochastic depth.

    ``x + mask / (1 - rate) * scale * branch``, where the mask drops whole samples while training.

    Args:
        dim: width of the stream.
        scale: initial layer scale; 0 leaves it out.
        drop_rate: probability that a sample's branch is dropped.
    """

    def __init__(self, dim: int, scale: float, drop_rate: float) -> None:
        super().__init__()
        self.initial_scale, self.drop_rate = scale, drop_rate
        self.scale = nn.Parameter(torch.full((dim,), scale)) if scale else None

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        factor: Tensor | None = self.scale
        if self.training and self.drop_rate:
            kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_rate
            kept = kept / (1 - self.drop_rate)
            factor = kept if factor is None else kept * factor
        if factor is None:
            return x + branch
        return torch.addcmul(x, branch.to(x.dtype), factor.to(x.dtype))  # one pass over memory

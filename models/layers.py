"""What the towers' layers share."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svitt_ops.models.configuration import OFFICIAL, VideoConfig


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


def eval_generator(config: VideoConfig) -> torch.Generator | None:
    """What draws outside training, on each call from the start; None is torch's own."""
    if config.eval_pattern_seed is None or config.compat == OFFICIAL:
        return None
    return torch.Generator().manual_seed(config.eval_pattern_seed)


def random_scores(tokens: Tensor, generator: torch.Generator | None) -> Tensor:
    """Scores ``(batch, n)`` that drop tokens ``(batch, n, ...)`` at random."""
    shape = tokens.shape[:2]
    if generator is None:
        return torch.rand(shape, device=tokens.device)
    # Alike for all samples, so that what becomes of one does not depend on its batch.
    return torch.rand(1, shape[1], generator=generator).to(tokens.device).expand(shape)


def in_fp32(layer: nn.Module, states: Tensor) -> Tensor:
    """A layer whose output is ranked, outside of autocast: rounded scores would tie."""
    device = states.device.type
    if not torch.amp.is_autocast_available(device):
        return cast(Tensor, layer(states))
    with torch.autocast(device, enabled=False):
        # The dtype of the weights is fp32 unless somebody cast the model.
        return cast(Tensor, layer(states.to(next(layer.parameters()).dtype)))

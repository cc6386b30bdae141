"""What the towers' layers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svitt_ops.models.parts.configuration import VideoConfig
from svitt_ops.randomness import SeededGenerator, rand, seeded


class FeedForward(nn.Module):
    """Two projections around a GELU, or around another activation."""

    def __init__(
        self, dim: int, hidden_dim: int, activation: Callable[[Tensor], Tensor] = F.gelu
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.activation(self.up(x)))
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


def eval_generator(config: VideoConfig) -> torch.Generator | SeededGenerator | None:
    """What draws outside training, on each call from the start; None is torch's own."""
    seed = config.eval_pattern_seed
    if seed is None or config.official:
        return None
    return seeded(seed)


def random_scores(tokens: Tensor, generator: torch.Generator | SeededGenerator | None) -> Tensor:
    """Scores ``(batch, n)`` that drop tokens ``(batch, n, ...)`` at random."""
    batch, count = tokens.shape[:2]
    # Of a seed alike for all samples, so that what becomes of one does not depend on its batch.
    drawn = rand((batch if generator is None else 1, count), generator, tokens.device)
    return drawn.expand(batch, count)


def renormalized(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Frames ``(..., 3, h, w)`` of mean and deviation 0.5, now of others, those of weights."""
    if set(mean) == set(std) == {0.5}:
        return frames
    scale = frames.new_tensor([0.5 / s for s in std])[:, None, None]
    shift = frames.new_tensor([(0.5 - m) / s for m, s in zip(mean, std, strict=True)])
    return torch.addcmul(shift[:, None, None], frames, scale)


def embed(projection: nn.Module, states: Tensor) -> Tensor:
    """Projections of length 1."""
    return F.normalize(in_fp32(projection, states).float(), dim=-1)


def in_fp32(layer: nn.Module, states: Tensor, *more: Tensor) -> Tensor:
    """A layer whose output is ranked, outside of autocast: rounded scores would tie."""
    device = states.device.type
    if not torch.amp.is_autocast_available(device):
        return cast(Tensor, layer(states, *more))
    with torch.autocast(device, enabled=False):
        # The dtype of the weights is fp32 unless somebody cast the model.
        return cast(Tensor, layer(states.to(next(layer.parameters()).dtype), *more))

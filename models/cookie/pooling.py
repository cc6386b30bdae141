"""From tokens to one vector: their mean, or a learned mean of sorted values.

Source: GPO, Learning the best pooling strategy for visual semantic embedding (CVPR 2021).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 0.1
"""Of the softmax over the places of sorted values."""


class MeanPooling(nn.Module):
    """The mean of the tokens that exist."""

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Pool the first ``lengths`` tokens of ``(batch, n, dim)`` to ``(batch, dim)``."""
        tokens = tokens.float()
        if lengths is None:
            return tokens.mean(1)
        exists = _places(tokens) < lengths[:, None]
        return (tokens * exists[..., None]).sum(1) / lengths[:, None].clamp(min=1)


class GeneralizedPooling(nn.Module):
    """GPO: ``sum_k theta_k sorted_k``, each dimension sorted by itself, descending.

    The weights of a sequence depend on its length alone: ``theta = softmax(score / 0.1)``, where a
    recurrent layer scores sinusoidal positions from both ends.

    Args:
        size: width of the positions and of the recurrent layer.
    """

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.size = size
        self.gru = nn.GRU(size, size, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(size, 1, bias=False)

    def weights(self, lengths: Tensor) -> Tensor:
        """Weights ``(batch, longest)`` of places in sequences of so many tokens, 0 behind them."""
        with torch.autocast(lengths.device.type, enabled=False):
            return self._weights(lengths)

    def _weights(self, lengths: Tensor) -> Tensor:
        longest = int(lengths.max())
        places = positions(longest, self.size).to(self.linear.weight)
        packed = nn.utils.rnn.pack_padded_sequence(
            places.expand(len(lengths), -1, -1), lengths.cpu(), True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=longest
        )
        both = states.unflatten(2, (2, self.size)).mean(2)
        scores = self.linear(both)[..., 0] / TEMPERATURE
        absent = torch.arange(longest, device=scores.device) >= lengths[:, None]
        return scores.masked_fill(absent, -torch.inf).softmax(1)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Pool the first ``lengths`` tokens of ``(batch, n, dim)`` to ``(batch, dim)``."""
        if lengths is None:
            lengths = torch.full(tokens.shape[:1], tokens.shape[1], device=tokens.device)
        kinds, kind = lengths.clamp(min=1).unique(return_inverse=True)
        weights = self.weights(kinds)[kind]
        absent = _places(tokens) >= lengths[:, None]
        found = (
            tokens.float()
            .masked_fill(absent[..., None], -torch.inf)
            .sort(1, descending=True)
            .values
        )
        found = found[:, : weights.shape[1]]
        found = torch.where(absent[:, : weights.shape[1], None], 0, found)
        return (weights[..., None] * found).sum(1)


def leave_out(tokens: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Tokens ``(batch, n, dim)`` of which the first lengths ``(batch,)`` are pooled in training.

    Of each sequence a share is left out that is drawn itself, up to ``most``; one token stays.
    """
    noise = torch.rand(tokens.shape[:2], device=tokens.device)
    shares = most * torch.rand(len(tokens), device=tokens.device)
    lengths = (noise >= shares[:, None]).sum(1).clamp(min=1)
    order = noise.argsort(1, descending=True)
    return tokens.gather(1, order[..., None].expand_as(tokens)), lengths


def positions(count: int, size: int) -> Tensor:
    """Sinusoidal positions 0 to ``count - 1``, ``(count, size)``: sine and cosine by turns."""
    rates = torch.exp(torch.arange(0, size, 2) * (-math.log(10000.0) / size))
    angles = torch.arange(count)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


def _places(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device)

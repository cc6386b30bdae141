"""Heads over the fusion layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svitt_ops.models.parts.configuration import TwoTowersConfig


class MaskedTokenHead(nn.Module):
    """Logits of the pieces; the decoder is the table of word embeddings itself, so tied."""

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__()
        dim = config.text_hidden_size
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, config.text_layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(states))), words, self.bias)

"""A one-stream model: image and text go through one encoder together, so each pair costs a pass.

Source: as UNITER (ECCV 2020) and its kin, which COOKIE (ICCV 2021), figure 4, is compared with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from svitt_ops.models.cookie.configuration import COOKIEConfig
from svitt_ops.models.cookie.convolution import ConvolutionalTower
from svitt_ops.models.parts.text import TextEmbeddings, TextLayer


class OneStream(nn.Module):
    """BERT's layers over the features of an image and the words of a text.

    Args:
        config: whose ResNet and text layers, as many and as wide, it has.
    """

    def __init__(self, config: COOKIEConfig) -> None:
        super().__init__()
        self.video = ConvolutionalTower(config)
        self.embeddings = TextEmbeddings(config)
        width = config.text_hidden_size
        self.projection = nn.Linear(config.cnn_sizes[-1], width)
        self.positions = nn.Parameter(torch.randn(config.grid_size**2, width))
        layers: Any = (TextLayer(config, fuses=False) for _ in range(config.text_num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.score = nn.Linear(width, 1)

    def encode_video(self, pixel_values: Tensor) -> Tensor:
        """Features ``(batch, n, text_hidden_size)``, which an image is given once."""
        found = self.video.features(pixel_values).flatten(2).mT
        projected: Tensor = self.projection(found)
        return projected + self.positions

    def forward(self, features: Tensor, input_ids: Tensor) -> Tensor:
        """Scores ``(batch,)`` of pairs of features and texts ``(batch, tokens)``."""
        states = torch.cat([self.embeddings(input_ids), features], 1)
        for layer in self.layers:
            states, _ = layer(states)
        found: Tensor = self.score(states[:, 0])[:, 0]
        return found

"""COOKIE's transformer layers: over an image's features, and those that both modalities share."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from svitt_ops.models.cookie.configuration import COOKIEConfig
from svitt_ops.models.cookie.convolution import ConvolutionalTower
from svitt_ops.models.parts.layers import FeedForward
from svitt_ops.models.parts.text import TextLayer


class VisionTower(ConvolutionalTower):
    """Features of an image, or given ones of a video's frames, below layers of their own (TAV-TE).

    Args:
        config: of the model.
    """

    def __init__(self, config: COOKIEConfig) -> None:
        super().__init__(config)
        width = config.feature_size or config.cnn_sizes[-1]
        if config.feature_size:
            del self.cnn
        self.projection = nn.Linear(width, config.hidden_size)
        shape = (config.num_frames, config.grid_size**2, config.hidden_size)
        self.patch_positions = nn.Parameter(torch.zeros(shape))
        own = config.of_shared_layers()
        self.layers = nn.ModuleList(
            TextLayer(own, fuses=False) for _ in range(config.num_hidden_layers)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images, as of `features`, or given features ``(batch, frames, feature_size)``.

        Of features there are as many frames as the configuration has, or fewer. Returns tokens
        ``(batch, n, hidden_size)``.
        """
        config, places = self.config, cast(Tensor, self.patch_positions)
        if config.feature_size:
            given = pixel_values.shape[1:]
            few = pixel_values.dim() == 3 and 1 <= given[0] <= len(places)
            if not few or given[1] != config.feature_size:
                raise ValueError(
                    f"VisionTower: features must have shape (batch, 1 to {len(places)}, "
                    f"{config.feature_size}), got {tuple(pixel_values.shape)}"
                )
            found, places = pixel_values, places[: given[0]]
        else:
            found = self.features(pixel_values).flatten(2).mT
        states = self.projection(found) + places.flatten(0, 1)
        for layer in self.layers:
            states, _ = layer(states)
        return cast(Tensor, states)


class FeedForwardLayer(nn.Module):
    """A layer of each token alone: what shares weights without attention."""

    def __init__(self, config: COOKIEConfig) -> None:
        super().__init__()
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor, ignored: Tensor | None = None) -> tuple[Tensor, None]:
        return self.mlp_norm(states + self.dropout(self.mlp(states))), None


class SharedLayers(nn.ModuleList):
    """The layers that features and words go through, each alone (WS-TE).

    Args:
        config: of the model.
    """

    def __init__(self, config: COOKIEConfig) -> None:
        own = config.of_shared_layers()
        fc = config.weight_sharing == "fc"
        super().__init__(
            FeedForwardLayer(config) if fc else TextLayer(own, fuses=False)
            for _ in range(config.shared_layers)
        )

    def forward(self, states: Tensor, ignored: Tensor | None = None) -> Tensor:
        """``(batch, n, hidden_size)``; ``ignored``, bool ``(batch, n)``, is True at padding."""
        for layer in self:
            states, _ = layer(states, ignored)
        return states

"""A text about two images: every fusion layer twice, and the images take turns.

Source: ALBEF (NeurIPS 2021), section 4.4 and figure 4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from svitt_ops.models.parts.clips import clips_of_texts
from svitt_ops.models.parts.configuration import TwoTowersConfig
from svitt_ops.models.parts.fused_towers import FusedTowers
from svitt_ops.models.parts.outputs import VideoOutput
from svitt_ops.models.parts.text import TextLayer, check_mask
from svitt_ops.nn import CrossAttention


class SharedKeys(CrossAttention):
    """Attention over another image by the key and value projections of another module."""

    def __init__(self, source: CrossAttention) -> None:
        dim = source.query.in_features
        super().__init__(dim, source.num_heads, context_dim=source.key.in_features)
        for name in ("key", "value"):
            delattr(self, name)
        # In a tuple it is no submodule: the weights belong to one module, and are stored once.
        self._source = (source,)

    def __getattr__(self, name: str) -> Any:
        if name in ("key", "value"):
            return getattr(self._source[0], name)
        return super().__getattr__(name)


class PairedFusion(nn.Module):
    """Fusion layers for two images.

    The first `config.unpaired_layers` stand alone, and read the images by turns. Of each other
    layer there are two, the first one over the first image, the second one over the second. They
    share the projections of keys and values, and nothing else.
    """

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__()
        count, alone = config.num_fusion_layers, config.unpaired_layers
        self.layers = nn.ModuleList(TextLayer(config, fuses=True) for _ in range(count))
        self.second = nn.ModuleList(TextLayer(config, fuses=True) for _ in range(count - alone))
        for number, layer in enumerate(self.second):
            layer.cross_attention = SharedKeys(self.layers[alone + number].cross_attention)

    def forward(
        self, states: Tensor, attention_mask: Tensor, images: tuple[Tensor, Tensor]
    ) -> Tensor:
        """States of texts ``(batch, tokens, dim)`` that attended to two images each.

        Args:
            states: ``(batch, tokens, dim)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            images: both of ``(batch, 1 + n, hidden_size)``.
        """
        check_mask(attention_mask, states)
        ignored, alone = attention_mask == 0, len(self.layers) - len(self.second)
        for number, layer in enumerate(self.layers):
            states, _ = layer(states, ignored, images[number % 2 if number < alone else 0])
            if number >= alone:
                states, _ = self.second[number - alone](states, ignored, images[1])
        return states


class ReadsTwoImages(FusedTowers):
    """The towers, and fusion layers over two images.

    From weights of a model over one image, the second layer of each pair starts as the first.
    """

    fusion_class = PairedFusion

    def encode_pair(self, pixel_values: Tensor) -> VideoOutput:
        """Encode images, each alone; what `encode_video` returns, of ``2 batch`` images.

        Args:
            pixel_values: ``(batch, 2, 3, image_size, image_size)``; those of a text stand behind
                each other in what is returned.
        """
        if pixel_values.dim() != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"{type(self).__name__}: pixel_values must have shape (batch, 2, 3, height, width),"
                f" got {tuple(pixel_values.shape)}"
            )
        return self.encode_video(pixel_values.flatten(0, 1))

    def fuse_pair(
        self, text_states: Tensor, attention_mask: Tensor, images: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The texts' [CLS] after the fusion layers, ``(batch, text_hidden_size)``."""
        return cast(Tensor, self.fusion(text_states, attention_mask, images)[:, 0])

    def read(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        clip_numbers: Tensor | None = None,
    ) -> Tensor:
        """The text's [CLS] after it attended to both images, ``(batch, text_hidden_size)``."""
        if clip_numbers is None:
            images = self.encode_pair(pixel_values).states.unflatten(0, (-1, 2))
        else:
            found = self.encode_video(pixel_values).states
            images = clips_of_texts(self, found, clip_numbers, len(input_ids), 2)
        text = self.encode_text(input_ids, attention_mask).states
        return self.fuse_pair(text, attention_mask, (images[:, 0], images[:, 1]))

    @torch.no_grad()
    def start_missing(self, missing: Sequence[str]) -> list[str]:
        """Start the second layers of pairs as copies of the first ones, where they have weights."""
        tensors, lacking, started = self.state_dict(), set(missing), set()
        for name in missing:
            match = re.fullmatch(r"fusion\.second\.(\d+)\.(.+)", name)
            if match:
                first = int(match[1]) + self.config.unpaired_layers
                source = f"fusion.layers.{first}.{match[2]}"
                if source not in lacking:
                    tensors[name].copy_(tensors[source])
                    started.add(name)
        # A twin then copies what they have come to be.
        return super().start_missing([name for name in missing if name not in started])

"""SViTT on Frozen, and Frozen itself: two towers that meet in the contrastive loss only.

Source: SViTT (CVPR 2023), supplement B.2; Frozen in time (ICCV 2021).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svitt_ops as so
from svitt_ops.models.frozen.configuration import FrozenConfig
from svitt_ops.models.frozen.divided import DividedLayer
from svitt_ops.models.parts.layers import embed
from svitt_ops.models.parts.outputs import PreTrainingOutput, TextOutput, VideoOutput
from svitt_ops.models.parts.two_towers import TwoTowers
from svitt_ops.models.parts.video import VideoTower


class FrozenForRetrieval(TwoTowers):
    """Clips and texts in one space; their similarity is the cosine."""

    config_class = FrozenConfig
    config: FrozenConfig

    def build(self, config: Any) -> None:
        super().build(config)
        if config.attention == "divided":
            for number, layer in enumerate(self.video.layers):
                self.video.layers[number] = DividedLayer(config, layer.add_mlp.drop_rate)
        self.video_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Not at a layer's turn: transformers passes over modules without tensors of their own.
        for layer in module.layers if isinstance(module, VideoTower) else ():
            if isinstance(layer, DividedLayer) and self.config.zero_init_time:
                layer.start_time_at_zero()

    def encode_video(self, pixel_values: Tensor) -> VideoOutput:
        """Encode clips ``(batch, frames, 3, image_size, image_size)``."""
        found = self.video(pixel_values)
        states = self.video_norm(found.tokens)
        return VideoOutput(
            embeds=embed(self.video_projection, self.pool(states)),
            states=states,
            indices=found.indices,
            indices_per_stage=found.indices_per_stage,
        )

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TextOutput:
        """Encode texts; both arguments ``(batch, tokens)``, the mask 0 at padding."""
        states = self.text(input_ids, attention_mask)
        return TextOutput(embeds=embed(self.text_projection, F.relu(states[:, 0])), states=states)

    def clamp_temperature(self) -> None:
        """Nothing: the temperature is not learned."""

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_ids: Tensor | None = None,
    ) -> PreTrainingOutput:
        """Contrastive loss of a batch of pairs; arguments as of `SViTTForPreTraining`."""
        video = self.encode_video(pixel_values)
        text = self.encode_text(input_ids, attention_mask)
        temperature, group = self.config.temperature_init, self.group()
        loss = so.info_nce(video.embeds, text.embeds, temperature, ids=pair_ids, group=group)
        return PreTrainingOutput(
            loss=loss, loss_vtc=loss, video_embeds=video.embeds, text_embeds=text.embeds
        )

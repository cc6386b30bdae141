"""SViTT on Frozen: two towers that meet in the contrastive loss only.

Source: SViTT (CVPR 2023), supplement B.2; Frozen in time (ICCV 2021).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import svitt_ops as so
from svitt_ops.models.frozen.configuration import FrozenConfig
from svitt_ops.models.parts.layers import embed
from svitt_ops.models.parts.outputs import PreTrainingOutput, TextOutput, VideoOutput
from svitt_ops.models.parts.two_towers import TwoTowers


class FrozenForRetrieval(TwoTowers):
    """Clips and texts in one space; their similarity is the cosine."""

    config_class = FrozenConfig
    config: FrozenConfig

    def build(self, config: Any) -> None:
        super().build(config)
        self.video_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

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

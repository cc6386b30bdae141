"""Two towers and fusion layers over both: what clips and texts become, alone and together."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from svitt_ops.models.parts.layers import embed
from svitt_ops.models.parts.outputs import FusionOutput, TextOutput, VideoOutput
from svitt_ops.models.parts.text import FusionEncoder
from svitt_ops.models.parts.two_towers import TwoTowers


class FusedTowers(TwoTowers):
    """The towers and the fusion layers."""

    norms_pooled: ClassVar[bool] = True
    """Whether a clip's vector, pooled from the tower's tokens, has a norm of its own."""
    fusion_class: ClassVar[type[nn.Module]] = FusionEncoder
    """The fusion layers."""

    # Without a word: it is what this class is for.
    _keys_to_ignore_on_load_unexpected = [r"^(match_head|token_head|decoder)\.", r"^temperature$"]  # noqa: RUF012

    def build(self, config: Any) -> None:
        super().build(config)
        self.video_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        if self.projects and self.norms_pooled:
            self.pooler_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.fusion = self.fusion_class(config)

    def pair_width(self, config: Any) -> int:
        """Width of the vector that says what a text and a clip are together."""
        width: int = config.text_hidden_size
        return width

    def encode_video(self, pixel_values: Tensor) -> VideoOutput:
        """Encode clips.

        Args:
            pixel_values: ``(batch, frames, 3, image_size, image_size)``, normalised to mean 0.5 and
                deviation 0.5 as BEiT's; at most ``config.num_frames`` frames.
        """
        found = self.video(pixel_values)
        embeds = None
        if self.projects:
            embeds = embed(self.video_projection, self.pooler_norm(self.pool(found.tokens)))
        return VideoOutput(
            embeds=embeds,
            states=self.video_norm(found.tokens),
            indices=found.indices,
            indices_per_stage=found.indices_per_stage,
        )

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TextOutput:
        """Encode texts; both arguments ``(batch, tokens)``, the mask 0 at padding."""
        states = self.text(input_ids, attention_mask)
        embeds = embed(self.text_projection, states[:, 0]) if self.projects else None
        return TextOutput(embeds=embeds, states=states)

    def fuse(
        self,
        text_states: Tensor,
        attention_mask: Tensor,
        video_states: Tensor,
        video_indices: Tensor | None = None,
        *,
        clips: Tensor | None = None,
    ) -> FusionOutput:
        """Let texts attend over their clips, row by row.

        Args:
            text_states: ``(batch, tokens, text_hidden_size)`` of `encode_text`.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            video_states: ``(batch, 1 + n, hidden_size)`` of `encode_video`.
            video_indices: ``(batch, n)``, numbers of the patches, carried along.
            clips: int64 ``(batch,)``, the row of the video's arguments of each text, where texts
                share clips; by default its own.
        """
        found = self.fusion(text_states, attention_mask, video_states, video_indices, clips)
        return FusionOutput(states=found[0], video_indices=found[1])

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[VideoOutput, TextOutput, FusionOutput]:
        """Encode pairs and fuse them."""
        video = self.encode_video(pixel_values)
        text = self.encode_text(input_ids, attention_mask)
        return video, text, self.fuse(text.states, attention_mask, video.states, video.indices)

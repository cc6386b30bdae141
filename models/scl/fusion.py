"""Two streams of fusion layers, of texts and of clips, each of which attends over the other.

Source: METER (CVPR 2022), whose fusion SCL (CVPR 2023) has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svitt_ops.models.parts.outputs import FusionOutput
from svitt_ops.models.parts.text import TextLayer, check_mask
from svitt_ops.models.scl.configuration import SCLConfig


@dataclass
class DualStreamOutput(FusionOutput):
    """Texts and clips that have attended to each other.

    Attributes:
        video_states: ``(batch, frames (1 + n), text_hidden_size)``, each frame's [CLS] first.
        pooled: ``(batch, 2 text_hidden_size)``, what the heads read: of the text's [CLS], and of
            the mean of the frames' [CLS].
    """

    video_states: Tensor | None = None
    pooled: Tensor | None = None


class DualStreamFusion(nn.Module):
    """What follows the towers: projections to one width, layers of both streams, and poolers."""

    def __init__(self, config: SCLConfig) -> None:
        super().__init__()
        dim = config.text_hidden_size
        self.text_transform = nn.Linear(dim, dim)
        self.video_transform = nn.Linear(config.hidden_size, dim)
        self.layers, self.video_layers = (
            nn.ModuleList(
                TextLayer(
                    config,
                    fuses=True,
                    context_dim=dim,
                    eps=config.fusion_layer_norm_eps,
                    intermediate_size=config.fusion_intermediate_size,
                )
                for _ in range(config.num_fusion_layers)
            )
            for _ in range(2)
        )
        self.text_pooler, self.video_pooler = (nn.Linear(dim, dim) for _ in range(2))

    def forward(
        self, text: Tensor, attention_mask: Tensor, video: Tensor, frame_size: int
    ) -> DualStreamOutput:
        """Fuse texts ``(batch, tokens, dim)`` with clips, in whose tokens frames begin with [CLS].

        In every layer a stream attends over what the other one enters that layer with.

        Args:
            text: ``(batch, tokens, dim)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            video: ``(batch, frames * frame_size, dim)``.
            frame_size: tokens of a frame.
        """
        check_mask(attention_mask, text)
        if video.shape[1] % frame_size:
            raise ValueError(
                f"DualStreamFusion: video must have frames of {frame_size} tokens, got "
                f"{video.shape[1]} tokens"
            )
        ignored = attention_mask == 0
        for of_text, of_video in zip(self.layers, self.video_layers, strict=True):
            (text, _), (video, _) = (
                of_text(text, ignored, video),
                of_video(video, None, text, None, ignored),
            )
        frames = video[:, ::frame_size].mean(1)
        pooled = [self.text_pooler(text[:, 0]), self.video_pooler(frames)]
        return DualStreamOutput(states=text, video_states=video, pooled=torch.cat(pooled, 1).tanh())


class TwoLayerHead(nn.Module):
    """Two projections around a norm and a GELU: of embeddings, of answers, of statements."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim, 1e-5)
        self.out = nn.Linear(hidden_dim, out_dim)

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = self.out(F.gelu(self.norm(self.dense(states))))
        return found


class WordHead(nn.Module):
    """Logits of the pieces, by a decoder that is not the table of word embeddings."""

    def __init__(self, config: SCLConfig) -> None:
        super().__init__()
        dim = config.text_hidden_size
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, config.fusion_layer_norm_eps)
        self.decoder = nn.Linear(dim, config.vocab_size)

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = self.decoder(self.norm(F.gelu(self.dense(states))))
        return found

"""Singularity: every frame is encoded alone, and texts attend to those of all frames at once.

Source: Singularity (ACL 2023).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svitt_ops.models.parts.answers import AnswersQuestions
from svitt_ops.models.parts.choices import ChoosesTexts
from svitt_ops.models.parts.fused_towers import FusedTowers
from svitt_ops.models.parts.layers import embed
from svitt_ops.models.parts.outputs import VideoOutput
from svitt_ops.models.parts.pairs import LearnsFromPairs, MatchesPairs
from svitt_ops.models.parts.text import TextLayer
from svitt_ops.models.singularity.configuration import SingularityConfig


class TemporalEncoder(nn.Module):
    """Embeddings of the frames, and layers in which each place attends over them.

    So the released code has it; SViTT's supplement (B.5) has frames meet after pooling over places.

    Args:
        config: of the model.
    """

    def __init__(self, config: SingularityConfig) -> None:
        super().__init__()
        # Not an `nn.Embedding`: its shape is that of the authors' checkpoints.
        self.embeddings = nn.Parameter(torch.zeros(1, config.num_frames, 1, config.hidden_size))
        self.layers = nn.ModuleList(
            TextLayer(config, fuses=False) for _ in range(config.temporal_layers)
        )

    def forward(self, states: Tensor) -> Tensor:
        """States ``(batch, frames, places, dim)`` of frames that know of each other.

        A single frame only gets its embedding.
        """
        frames, places = states.shape[1:3]
        states = states + frames_of(self.embeddings, frames)
        if frames == 1:
            return states
        over_time = states.transpose(1, 2).flatten(0, 1)
        for layer in self.layers:
            over_time, _ = layer(over_time)
        return over_time.unflatten(0, (-1, places)).transpose(1, 2)


def frames_of(embeddings: Tensor, frames: int) -> Tensor:
    """Embeddings ``(1, T, 1, dim)`` for a number of frames: the first ones, or interpolated."""
    known = embeddings.shape[1]
    if frames <= known:
        return embeddings[:, :frames]
    table = embeddings[:, :, 0].transpose(1, 2)  # (1, dim, T)
    longer = F.interpolate(table, size=frames, mode="linear", align_corners=False)
    return longer.transpose(1, 2)[:, :, None]


class SingularityModel(FusedTowers):
    """The towers and the fusion layers of Singularity.

    Without layers over time nothing depends on the order of the frames.
    """

    config_class = SingularityConfig
    config: SingularityConfig

    def build(self, config: SingularityConfig) -> None:
        super().build(config)
        self.temporal = TemporalEncoder(config) if config.temporal_layers else None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TemporalEncoder):
            nn.init.zeros_(module.embeddings)

    def fit_frames(self, num_frames: int) -> None:
        """Take the first embeddings of the frames, or interpolate them."""
        if self.temporal is not None:
            old = self.temporal.embeddings
            new = frames_of(old.detach(), num_frames).clone()
            self.temporal.embeddings = nn.Parameter(new, requires_grad=old.requires_grad)

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether a loss may depend on some parameters only: pictures need no layers over time."""
        return self.config.temporal_layers > 0 or super().leaves_parameters_unused

    def encode_video(self, pixel_values: Tensor) -> VideoOutput:
        """Encode clips, frame by frame.

        Args:
            pixel_values: ``(batch, frames, 3, image_size, image_size)``, normalised to mean 0.5 and
                deviation 0.5 as BEiT's; any number of frames. The layers over time interpolate
                their embeddings for more than ``config.num_frames``.

        Returns:
            The states of all frames behind each other, ``(batch, frames * (1 + n), hidden_size)``,
            each frame's [CLS] first. The embeddings are the mean over the frames of theirs, which
            have length 1: its product with a text's is the mean of their cosines.
        """
        if pixel_values.dim() != 5 or not pixel_values.shape[1]:
            raise ValueError(
                f"{type(self).__name__}: pixel_values must have shape (batch, frames, 3, height, "
                f"width) with one frame at least, got {tuple(pixel_values.shape)}"
            )
        shape = pixel_values.shape[:2]
        found = self.video(pixel_values.flatten(0, 1)[:, None])
        states = self.video_norm(found.tokens).unflatten(0, shape)
        if self.temporal is not None:
            states = self.temporal(states)
        embeds = None
        if self.projects:
            if self.config.pool_over_time and shape[1] > 1:
                pooled = states[:, :, 0]
            else:
                pooled = self.pooler_norm(self.pool(found.tokens)).unflatten(0, shape)
            embeds = embed(self.video_projection, pooled).mean(1)
        return VideoOutput(embeds=embeds, states=states.flatten(1, 2))


class SingularityForRetrieval(SingularityModel, MatchesPairs):
    """Singularity with a learned temperature and the match head."""


class SingularityForPreTraining(SingularityForRetrieval, LearnsFromPairs):
    """Singularity with a learned temperature and the heads of VTC, VTM and MLM."""


class SingularityForMultipleChoice(SingularityForRetrieval, ChoosesTexts):
    """The retrieval model with `choose`; it is trained as that is, on pairs."""


class SingularityForQuestionAnswering(SingularityModel, AnswersQuestions):
    """Singularity with an answer decoder instead of the heads that compare clips and texts."""

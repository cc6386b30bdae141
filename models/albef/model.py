"""ALBEF: an image tower, a text tower, fusion layers over both, and a model for each task.

Source: ALBEF (NeurIPS 2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from svitt_ops.models.albef.configuration import ALBEFConfig
from svitt_ops.models.parts.answers import AnswersQuestions
from svitt_ops.models.parts.classification import Classifies, DistilsClasses
from svitt_ops.models.parts.distillation import DistilsAnswers, DistilsPairs, DistilsWords
from svitt_ops.models.parts.fused_towers import FusedTowers
from svitt_ops.models.parts.grounding import GroundsWords
from svitt_ops.models.parts.layers import embed, in_fp32, renormalized
from svitt_ops.models.parts.losses import cross_entropy
from svitt_ops.models.parts.outputs import ClassificationOutput, VideoOutput
from svitt_ops.models.parts.paired_images import ReadsTwoImages
from svitt_ops.models.parts.words import PredictsWords

ASSIGNMENT_TEMPERATURE = 0.07
"""Of the similarities that wrong images of text assignment are drawn by."""


class ALBEFModel(FusedTowers):
    """The towers and the fusion layers of ALBEF."""

    norms_pooled = False
    config_class = ALBEFConfig
    config: ALBEFConfig

    def encode_video(self, pixel_values: Tensor, masked: Tensor | None = None) -> VideoOutput:
        """Encode images.

        Args:
            pixel_values: ``(batch, 3, image_size, image_size)``, or with one frame,
                ``(batch, 1, 3, image_size, image_size)``; normalised to mean 0.5 and deviation 0.5,
                from which they come to the mean and deviation of the configuration.
            masked: bool ``(batch, n)``, patches that a mask token takes the place of.
        """
        frames = pixel_values[:, None] if pixel_values.dim() == 4 else pixel_values
        config = self.config
        found = self.video(renormalized(frames, config.image_mean, config.image_std), masked)
        states = self.video_norm(found.tokens)
        embeds = embed(self.video_projection, self.pool(states)) if self.projects else None
        return VideoOutput(embeds=embeds, states=states, indices=found.indices)


class ALBEFForRetrieval(ALBEFModel, DistilsPairs, GroundsWords):
    """ALBEF with a learned temperature, the match head, and a twin with queues."""

    teacher_class = ALBEFModel


class ALBEFWords(ALBEFModel, PredictsWords):
    """What the twin of the pretraining model is."""


class ALBEFForPreTraining(ALBEFForRetrieval, DistilsWords):
    """ALBEF with a learned temperature and the heads of ITC, ITM and MLM."""

    teacher_class = ALBEFWords


class ALBEFAnswers(ALBEFModel, AnswersQuestions):
    """What the twin of the question-answering model is."""


class ALBEFForQuestionAnswering(ALBEFModel, DistilsAnswers):
    """ALBEF with an answer decoder instead of the heads that compare images and texts."""

    teacher_class = ALBEFAnswers


class ALBEFClasses(ALBEFModel, Classifies):
    """What the twin of the entailment model is."""

    classes = ("contradiction", "neutral", "entailment")


class ALBEFForVisualEntailment(ALBEFModel, DistilsClasses):
    """What follows from an image: a text contradicts it, is neutral, or is entailed."""

    teacher_class = ALBEFClasses
    classes = ALBEFClasses.classes


class ALBEFPairs(ALBEFModel, ReadsTwoImages, Classifies):
    """What the twin of the reasoning model is."""

    classes = ("false", "true")


class ALBEFForVisualReasoning(ALBEFModel, ReadsTwoImages, DistilsClasses):
    """Whether a text is true of two images, `pixel_values` ``(batch, 2, 3, height, width)``."""

    teacher_class = ALBEFPairs
    classes = ALBEFPairs.classes


class ALBEFForTextAssignment(ALBEFModel, ReadsTwoImages):
    """Pretraining of the doubled layers: which of two images a text belongs to, if to any.

    A text has its own image and a similar one, in either order, or two similar ones. A third each.
    """

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 (as the base's)
        r"^(match_head|token_head|class_head|text_projection)\.",
        r"^temperature$",
    ]

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether a loss may depend on some parameters only: projections have no gradient here."""
        return True

    def build(self, config: Any) -> None:
        super().build(config)
        self.assignment_head = nn.Linear(config.text_hidden_size, 3)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> ClassificationOutput:
        """Loss of a batch of pairs; the logits are of "first", "second" and "none".

        Args:
            pixel_values: ``(batch, 3, image_size, image_size)``, at least three images.
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
        """
        if len(pixel_values) < 3:
            raise ValueError(
                f"{type(self).__name__}: pixel_values must be of at least 3 images, "
                f"got {len(pixel_values)}"
            )
        video = self.encode_video(pixel_values)
        text = self.encode_text(input_ids, attention_mask).states
        labels, rows = draw_assignments(video.embeds)
        images = (video.states[rows[:, 0]], video.states[rows[:, 1]])
        states = self.fuse_pair(text, attention_mask, images)
        logits = in_fp32(self.assignment_head, states)
        loss = cross_entropy(logits, labels)
        return ClassificationOutput(loss=loss, loss_class=loss, logits=logits, states=states)


@torch.no_grad()
def draw_assignments(embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Labels ``(batch,)``, and which two images ``(batch, 2)`` each text gets.

    Wrong images are drawn by their similarity to the text's own, without replacement.
    """
    batch, device = len(embeds), embeds.device
    scores = (embeds.float() @ embeds.float().T) / ASSIGNMENT_TEMPERATURE
    scores.fill_diagonal_(-torch.inf)
    # The two greatest of scores with Gumbel noise are such a draw.
    noise = -torch.empty_like(scores).exponential_().log()
    wrong = (scores + noise).topk(2, 1).indices
    labels = torch.randint(3, (batch,), device=device)
    own = torch.arange(batch, device=device)
    first = torch.where(labels == 0, own, wrong[:, 0])
    second = torch.where(labels == 1, own, torch.where(labels == 0, wrong[:, 0], wrong[:, 1]))
    return labels, torch.stack([first, second], 1)

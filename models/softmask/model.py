"""SoftMask: ALBEF that matches texts with images whose most telling regions are softly masked.

Source: Soft masking for vision-language pretraining (CVPR 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from svitt_ops.models.albef.model import (
    ALBEFForPreTraining,
    ALBEFForQuestionAnswering,
    ALBEFForRetrieval,
    ALBEFForVisualEntailment,
    ALBEFForVisualReasoning,
    ALBEFModel,
)
from svitt_ops.models.parts.distortion import distort
from svitt_ops.models.parts.losses import cross_entropy
from svitt_ops.models.parts.outputs import PreTrainingOutput, TextOutput, VideoOutput
from svitt_ops.models.parts.words import check_masked
from svitt_ops.models.softmask.configuration import SoftMaskConfig
from svitt_ops.models.softmask.masks import (
    choose_words,
    compensated,
    focal_contrast,
    normalized,
    soft_masked,
)


@dataclass
class SoftMaskPreTrainingOutput(PreTrainingOutput):
    """Losses of a batch; besides those of `PreTrainingOutput`:

    Attributes:
        loss_soft: matching loss of the pairs with softly masked images.
    """

    loss_soft: Tensor | None = None


class SoftMaskModel(ALBEFModel):
    """The towers and the fusion layers of SoftMask, which are ALBEF's."""

    config_class = SoftMaskConfig


class SoftMaskForRetrieval(ALBEFForRetrieval):
    """As ALBEF's: fine-tuning has the plain contrastive loss, and no masks."""

    config_class = SoftMaskConfig


class SoftMaskForPreTraining(ALBEFForPreTraining):
    """SoftMask with a learned temperature and the heads of ITC, ITM and MLM."""

    config_class = SoftMaskConfig
    output_class = SoftMaskPreTrainingOutput
    losses = ("vtc", "vtm", "mlm", "soft")

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_ids: Tensor | None = None,
        mlm_input_ids: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        masked_input_ids: Tensor | None = None,
        *,
        alpha: float | None = None,
    ) -> PreTrainingOutput:
        """Losses of a batch of pairs; arguments as of `ALBEFForPreTraining.forward`, and one more.

        Images are distorted while training. ``masked_input_ids``, ``(batch, tokens)``, are what the
        contrastive and the matching loss read; by default the texts with masked words.
        """
        config = self.config
        if self.training:
            rates = (config.jitter, config.grayscale_rate, config.blur_rate)
            pixel_values = distort(pixel_values, *rates)
        given = (masked_input_ids, mlm_input_ids) if config.reads_masked_text else ()
        text = next((ids for ids in given if ids is not None), input_ids)
        return super().forward(
            pixel_values, text, attention_mask, pair_ids, mlm_input_ids, mlm_labels,
            alpha=alpha, words=(mlm_input_ids, mlm_labels),
        )  # fmt: skip

    def contrast(
        self,
        embeds: tuple[Tensor, Tensor],
        keys: tuple[Tensor, Tensor],
        ids: Tensor | None,
        alpha: float,
    ) -> Tensor:
        """Mean of both directions' focal losses; images first in ``embeds`` and ``keys``."""
        gamma = self.config.focal_gamma
        if not gamma:
            return super().contrast(embeds, keys, ids, alpha)
        *older, older_ids = self.other_keys(keys, ids)
        batch = len(embeds[0])
        if ids is None or older_ids is None:
            positives = torch.eye(batch, batch + len(older[0]), device=embeds[0].device) > 0
        else:
            positives = ids[:, None] == torch.cat([ids, older_ids])
        both = [
            focal_contrast(
                embeds[one],
                torch.cat([keys[1 - one], older[1 - one]]),
                self.temperature,
                positives,
                keys[one],
                alpha,
                gamma,
            )
            for one in (0, 1)
        ]
        return (both[0] + both[1]) / 2

    def more_losses(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        video: VideoOutput,
        text: TextOutput,
        taught: tuple[VideoOutput, TextOutput],
        alpha: float,
        words: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> dict[str, Tensor]:
        """The matching loss of masked images, and the masked words', if they read these too."""
        config, losses = self.config, {}
        if config.mask_source == "none" or not (config.weights["soft"] or config.masks_words_too):
            return {}
        states, text_states = cast(Tensor, video.states), cast(Tensor, text.states)
        mask = self.soft_mask(text_states, input_ids, attention_mask, states)
        states = soft_masked(states, mask, config.mask_keeps)
        if config.weights["soft"]:
            logits = self.match_logits(text_states, attention_mask, states)
            matching = torch.ones(len(logits), dtype=torch.int64, device=logits.device)
            losses["soft"] = cross_entropy(logits, matching)
        if config.masks_words_too and config.weights["mlm"]:
            ids, labels = check_masked(type(self).__name__, *words, input_ids)
            losses["mlm"] = self.word_loss(
                ids, labels, attention_mask, states, cast(Tensor, taught[0].states), alpha
            )
        return losses

    @torch.no_grad()
    def soft_mask(
        self, text_states: Tensor, input_ids: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> Tensor:
        """What is to be masked of images, by a word of each text that is drawn at random.

        Args:
            text_states: ``(batch, tokens, text_hidden_size)`` of `encode_text`.
            input_ids: ``(batch, tokens)``; the first piece is [CLS].
            attention_mask: ``(batch, tokens)``, 0 at padding.
            video_states: ``(batch, 1 + n, hidden_size)`` of `encode_video`.

        Returns:
            fp32 ``(batch, n)``, in [0, 1]; unless ``mask_compensation`` is "none", each row's sum
            is ``mask_mass`` times n.
        """
        if self.config.mask_source == "random":
            maps = torch.rand(video_states[:, 1:, 0].shape, device=video_states.device)
        else:
            maps = choose_words(*self._maps(text_states, input_ids, attention_mask, video_states))
        return self._masks(maps)

    @torch.no_grad()
    def word_masks(
        self, text_states: Tensor, input_ids: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The soft mask that each piece of a text makes; arguments as of `soft_mask`.

        Returns:
            fp32 ``(batch, tokens, n)``, and bool ``(batch, tokens)``, True at the pieces that
            `soft_mask` draws from; the others' masks mean nothing.

        Raises:
            ValueError: masks are not made from words.
        """
        if not self.config.masks_by_words:
            raise ValueError(
                f"{type(self).__name__}: mask_source must be 'gradcam' or 'cross_attention' for"
                f" masks of words, got {self.config.mask_source!r}"
            )
        maps, allowed = self._maps(text_states, input_ids, attention_mask, video_states)
        return self._masks(maps.flatten(0, 1)).view_as(maps), allowed

    def _maps(
        self, text_states: Tensor, input_ids: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What masks are made of, ``(batch, tokens, n)``, and where a text has words."""
        config = self.config
        allowed = attention_mask != 0
        allowed[:, 0] = False
        for piece in config.mask_excluded_ids:
            allowed &= input_ids != piece
        found = self.word_maps(text_states, attention_mask, video_states, layer=config.mask_layer)
        by_gradient = config.mask_source == "gradcam"
        return found.words if by_gradient else found.attention.mean(1), allowed

    def _masks(self, maps: Tensor) -> Tensor:
        """Masks of maps ``(rows, n)``."""
        maps = normalized(maps.float(), self.config.mask_normalization)
        return compensated(maps, self.config.mask_mass, self.config.mask_compensation)


class SoftMaskForQuestionAnswering(ALBEFForQuestionAnswering):
    """SoftMask with an answer decoder, as ALBEF's."""

    config_class = SoftMaskConfig


class SoftMaskForVisualReasoning(ALBEFForVisualReasoning):
    """Whether a text is true of two images, as ALBEF's."""

    config_class = SoftMaskConfig


class SoftMaskForVisualEntailment(ALBEFForVisualEntailment):
    """What follows from an image, as ALBEF's."""

    config_class = SoftMaskConfig


TASKS: dict[str, type[Any]] = {
    "pretraining": SoftMaskForPreTraining,
    "retrieval": SoftMaskForRetrieval,
    "question_answering": SoftMaskForQuestionAnswering,
    "visual_reasoning": SoftMaskForVisualReasoning,
    "visual_entailment": SoftMaskForVisualEntailment,
}

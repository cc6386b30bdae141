"""Losses of pairs, of masked words, of answers and of classes that a momentum twin has a share in.

Source: ALBEF (NeurIPS 2021), sections 3.2 and 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import svitt_ops as so
from svitt_ops.models.parts.answers import AnswersQuestions
from svitt_ops.models.parts.losses import (
    distilled_cross_entropies,
    draw_negatives,
    match_pairs,
    mean_of_labels,
)
from svitt_ops.models.parts.momentum import FeatureQueue, HasTeacher, other_rows
from svitt_ops.models.parts.outputs import (
    PreTrainingOutput,
    QuestionAnsweringOutput,
    TextOutput,
    VideoOutput,
)
from svitt_ops.models.parts.pairs import LearnsFromPairs, MatchesPairs
from svitt_ops.models.parts.words import check_masked


class DistilsPairs(HasTeacher, MatchesPairs):
    """Pairs against the twin's embeddings, those of the batch and those of its queues."""

    def build(self, config: Any) -> None:
        super().build(config)
        if config.momentum is not None:
            self.queue = FeatureQueue(config.queue_size, config.projection_dim)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_ids: Tensor | None = None,
        *,
        alpha: float | None = None,
    ) -> PreTrainingOutput:
        """Losses of a batch of pairs; arguments as of `DistilsWords`."""
        video = self.encode_video(pixel_values)
        text = self.encode_text(input_ids, attention_mask)
        taught = self.teach(pixel_values, input_ids, attention_mask)
        share = self.share_of_teacher(alpha)
        losses = self.taught_losses(video, text, attention_mask, pair_ids, taught, share)
        return self._weighted(video, text, losses)

    @torch.no_grad()
    def teach(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[VideoOutput, TextOutput]:
        """What the twin makes of a batch."""
        if self.teacher is None:
            raise ValueError(
                f"{type(self).__name__}: momentum must be a number to train with, got None"
            )
        video = self.teacher.encode_video(pixel_values)
        return video, self.teacher.encode_text(input_ids, attention_mask)

    def taught_losses(
        self,
        video: VideoOutput,
        text: TextOutput,
        attention_mask: Tensor,
        pair_ids: Tensor | None,
        taught: tuple[VideoOutput, TextOutput],
        alpha: float,
    ) -> dict[str, Tensor]:
        """The contrastive and the matching loss; while training, the queues then take the batch."""
        weight, losses = self.config.weights, {}
        keys = taught[0].embeds, taught[1].embeds
        if weight["vtc"]:
            losses["vtc"] = self.contrast((video.embeds, text.embeds), keys, pair_ids, alpha)
        if weight["vtm"]:
            wrong = draw_negatives(
                video.embeds,
                text.embeds,
                self.temperature,
                pair_ids,
                hard=self.config.hard_negatives,
                keys=keys,
            )
            pairs = match_pairs(wrong)
            losses["vtm"] = self._match_loss(text.states, attention_mask, video.states, pairs)
        if self.training:
            self.queue.push(*keys, pair_ids if self.config.queues_ids else None)
        return losses

    def contrast(
        self,
        embeds: tuple[Tensor, Tensor],
        keys: tuple[Tensor, Tensor],
        ids: Tensor | None,
        alpha: float,
    ) -> Tensor:
        """Mean of both directions' losses; pictures first in ``embeds`` and ``keys``."""
        *older, older_ids = self.other_keys(keys, ids)
        both = [
            so.queue_info_nce(
                embeds[one],
                keys[1 - one],
                older[1 - one],
                self.temperature,
                teacher_query=keys[one] if alpha else None,
                alpha=alpha,
                query_ids=ids,
                queue_ids=older_ids,
            )
            for one in (0, 1)
        ]
        return (both[0] + both[1]) / 2

    def other_keys(
        self, keys: tuple[Tensor, Tensor], ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What a batch is contrasted with besides its own keys: pictures', texts', and their ids.

        These are the queues', and before them those of the processes that share the batch.
        """
        queue = self.queue
        video, text = (x.to(keys[0].dtype) for x in (queue.video, queue.text))
        older = None if ids is None else queue.ids
        if self.group() is not None:
            video, text = (
                torch.cat([other_rows(new), old])
                for new, old in zip(keys, (video, text), strict=True)
            )
            older = None if ids is None else torch.cat([other_rows(ids), queue.ids])
        return video, text, older


class DistilsWords(DistilsPairs, LearnsFromPairs):
    """The same, and masked words; the twin's head says what else could stand there."""

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_ids: Tensor | None = None,
        mlm_input_ids: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        *,
        alpha: float | None = None,
        **given: Any,
    ) -> PreTrainingOutput:
        """Losses of a batch of pairs.

        While training, the queues take the twin's embeddings of the batch.

        Args:
            pixel_values: ``(batch, 3, image_size, image_size)``, or with a dimension of one frame.
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            pair_ids: int64 ``(batch,)``; pairs with equal ids, of the batch and of the queue, are
                positives of each other.
            mlm_input_ids: ``input_ids`` with masked tokens; needed unless MLM has weight 0.
            mlm_labels: ``(batch, tokens)``, what was masked, -100 elsewhere.
            alpha: share of the twin in the targets; by default the one of this step.
            given: for the losses that a system has besides.
        """
        if self.config.official:  # which has no ids in pretraining
            pair_ids = None
        share = self.share_of_teacher(alpha)
        video = self.encode_video(pixel_values)
        text = self.encode_text(input_ids, attention_mask)
        taught = self.teach(pixel_values, input_ids, attention_mask)
        losses = self.taught_losses(video, text, attention_mask, pair_ids, taught, share)
        if self.config.weights["mlm"]:
            ids, labels = check_masked(type(self).__name__, mlm_input_ids, mlm_labels, input_ids)
            losses["mlm"] = self.word_loss(
                ids, labels, attention_mask, video.states, taught[0].states, share
            )
        losses |= self.more_losses(
            pixel_values, input_ids, attention_mask, video, text, taught, share, **given
        )
        return self._weighted(video, text, losses)

    def more_losses(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        video: VideoOutput,
        text: TextOutput,
        taught: tuple[VideoOutput, TextOutput],
        alpha: float,
    ) -> dict[str, Tensor]:
        """The losses that a system has besides, by name."""
        return {}

    def word_loss(
        self,
        ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor,
        video_states: Tensor,
        teacher_states: Tensor,
        alpha: float,
    ) -> Tensor:
        """Loss of masked words; ``teacher_states`` are the pictures' by the twin."""
        logits, teacher = self.word_logits(ids, attention_mask, video_states), None
        if alpha:
            with torch.no_grad():
                teacher = self.teacher.word_logits(ids, attention_mask, teacher_states)
        axis = self.config.word_axis
        losses = distilled_cross_entropies(logits, labels, teacher, alpha, axis=axis)
        return mean_of_labels(losses, labels)


class DistilsAnswers(HasTeacher, AnswersQuestions):
    """An answer decoder, and a twin of the whole model that has a share in its targets."""

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answers_per_question: Tensor | None = None,
        answer_weights: Tensor | None = None,
        clip_numbers: Tensor | None = None,
        *,
        alpha: float | None = None,
    ) -> QuestionAnsweringOutput:
        """Loss of a batch of questions and answers; arguments as of `AnswersQuestions.forward`.

        ``alpha`` is the share of the twin in the targets, by default the one of this step.
        """
        share = self.share_of_teacher(alpha) * self.config.distils_answers
        answers = (answer_ids, answer_mask, answers_per_question)

        questions = (pixel_values, input_ids, attention_mask, clip_numbers)
        states, teacher = self.read_questions(*questions), None
        if share:
            with torch.no_grad():
                taught = self.teacher.read_questions(*questions)
                teacher = self.teacher.answer_logits(taught, attention_mask, *answers)
        losses = self.answer_losses(
            states, attention_mask, *answers, teacher_logits=teacher, alpha=share
        )
        return self._weighted_answers(losses, answer_weights, states)

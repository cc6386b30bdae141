"""SViTT that answers questions: its fusion layers read them, a decoder writes the answers."""

from __future__ import annotations

from torch import Tensor

from svitt_ops.models.parts.answers import AnswersQuestions
from svitt_ops.models.parts.outputs import QuestionAnsweringOutput
from svitt_ops.models.svitt.configuration import SViTTConfig
from svitt_ops.models.svitt.model import SViTTModel


class SViTTForQuestionAnswering(AnswersQuestions, SViTTModel):
    """SViTT with an answer decoder instead of the heads that compare clips and texts.

    Multimodal pruning acts as it does in pretraining. From weights without a decoder,
    `from_pretrained` starts it from the fusion layers and the head for masked tokens.
    """

    config_class = SViTTConfig
    config: SViTTConfig
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 (as the base's)
        r"^(match_head|video_projection|text_projection|pooler_norm)\.",
        r"^temperature$",
    ]

    def encode_questions(
        self, input_ids: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> Tensor:
        """States of questions that have attended to their clips, row by row.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            video_states: ``(batch, 1 + n, hidden_size)`` of `encode_video`, or
                ``(batch, clips, 1 + n, hidden_size)`` for several clips of each video, every one
                of which the question attends alone.

        Returns:
            ``(batch, tokens, text_hidden_size)``, or ``(batch, clips, tokens, text_hidden_size)``.
        """
        text = self.encode_text(input_ids, attention_mask).states
        if video_states.dim() == 3:
            return self.fuse(text, attention_mask, video_states).states
        clips = video_states.shape[1]
        text, mask = (x.repeat_interleave(clips, 0) for x in (text, attention_mask))
        fused = self.fuse(text, mask, video_states.flatten(0, 1)).states
        return fused.unflatten(0, (-1, clips))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answers_per_question: Tensor | None = None,
        answer_weights: Tensor | None = None,
    ) -> QuestionAnsweringOutput:
        """Loss of a batch of questions and their answers: ``sum_a w_a loss_a / batch``.

        Args:
            pixel_values: ``(batch, frames, 3, image_size, image_size)``.
            input_ids: ``(batch, tokens)``, the questions.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            answer_ids: ``(answers, answer tokens)``: [CLS], the answer, [SEP], padding; those to
                the first question come first.
            answer_mask: ``(answers, answer tokens)``, 0 at padding.
            answers_per_question: int64 ``(batch,)``, adding up to ``answers``; by default one each.
            answer_weights: ``(answers,)``, such as how often the answer was given; by default 1.
        """
        video = self.encode_video(pixel_values)
        states = self.encode_questions(input_ids, attention_mask, video.states)
        losses = self.answer_losses(
            states, attention_mask, answer_ids, answer_mask, answers_per_question
        )
        weighted = losses
        if answer_weights is not None:
            if answer_weights.shape != losses.shape:
                raise ValueError(
                    f"{type(self).__name__}: answer_weights must have shape "
                    f"{tuple(losses.shape)}, got {tuple(answer_weights.shape)}"
                )
            weighted = losses * answer_weights
        loss = weighted.sum() / len(input_ids)
        return QuestionAnsweringOutput(
            loss=loss, loss_lm=loss, answer_losses=losses, question_states=states
        )

"""Answers to questions: their loss, and the ranking of a closed list of them.

Source: ALBEF (NeurIPS 2021), section 4.4; SViTT (CVPR 2023) for several clips.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svitt_ops.models.parts.clips import Merge, clips_of_texts, merge_clips
from svitt_ops.models.parts.decoder import AnswerDecoder
from svitt_ops.models.parts.fused_towers import FusedTowers
from svitt_ops.models.parts.heads import MaskedTokenHead
from svitt_ops.models.parts.layers import in_fp32
from svitt_ops.models.parts.losses import IGNORED, distilled_cross_entropies
from svitt_ops.models.parts.outputs import AnswerRanking, QuestionAnsweringOutput

log = logging.getLogger(__name__)
STARTS = {"decoder.embeddings.": "text.embeddings.", "decoder.layers.": "fusion.layers."}
"""Parts of the decoder, and what they start from."""


class AnswersQuestions(FusedTowers):
    """An answer decoder and its head instead of the heads that compare clips and texts.

    The head is named as that for masked tokens, whose weights it starts from. From weights without
    a decoder, `from_pretrained` starts it from the fusion layers. Multimodal pruning acts as it
    does in pretraining.
    """

    projects = False
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 (as the base's)
        r"^(match_head|video_projection|text_projection|pooler_norm)\.",
        r"^temperature$",
    ]

    @property
    def decoder_start(self) -> int:
        """The fusion layer that the decoder's first layer starts from."""
        return 0

    def build(self, config: Any) -> None:
        super().build(config)
        self.decoder = AnswerDecoder(config)
        self.token_head = MaskedTokenHead(config)

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
        clip_numbers: Tensor | None = None,
    ) -> QuestionAnsweringOutput:
        """Loss of a batch of questions and their answers: ``sum_a w_a loss_a / batch``.

        Args:
            pixel_values: ``(clips, frames, 3, image_size, image_size)``.
            input_ids: ``(batch, tokens)``, the questions.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            answer_ids: ``(answers, answer tokens)``: [CLS], the answer, [SEP], padding; those to
                the first question come first.
            answer_mask: ``(answers, answer tokens)``, 0 at padding.
            answers_per_question: int64 ``(batch,)``, adding up to ``answers``; by default one each.
            answer_weights: ``(answers,)``, such as how often the answer was given; by default 1.
            clip_numbers: int64 ``(batch,)``, the clip that each question is about; by default they
                have one each, in order.
        """
        states = self.read_questions(pixel_values, input_ids, attention_mask, clip_numbers)
        losses = self.answer_losses(
            states, attention_mask, answer_ids, answer_mask, answers_per_question
        )
        return self._weighted_answers(losses, answer_weights, states)

    def read_questions(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        clip_numbers: Tensor | None,
    ) -> Tensor:
        """States of questions that attended to their clips; arguments as of `forward`."""
        video = self.encode_video(pixel_values).states
        if clip_numbers is not None:
            video = clips_of_texts(self, video, clip_numbers, len(input_ids))
        return self.encode_questions(input_ids, attention_mask, video)

    def _weighted_answers(
        self, losses: Tensor, weights: Tensor | None, states: Tensor
    ) -> QuestionAnsweringOutput:
        weighted = losses
        if weights is not None:
            if weights.shape != losses.shape:
                raise ValueError(
                    f"{type(self).__name__}: answer_weights must have shape "
                    f"{tuple(losses.shape)}, got {tuple(weights.shape)}"
                )
            weighted = losses * weights
        loss = weighted.sum() / len(states)
        return QuestionAnsweringOutput(
            loss=loss, loss_lm=loss, answer_losses=losses, question_states=states
        )

    @torch.no_grad()
    def start_missing(self, missing: Sequence[str]) -> list[str]:
        """Start a decoder without weights from the text's embeddings and the fusion layers.

        Layer j starts from fusion layer `decoder_start` + j. A tensor that has no counterpart of
        its shape with weights stays as it is.
        """
        tensors, lacking = self.state_dict(), set(missing)
        wanted = {name for name in tensors if name.startswith("decoder.")}
        if not wanted <= lacking:  # a decoder with weights, if not with all of them
            return list(missing)
        started = set()
        for part, start in STARTS.items():
            for name in (name for name in wanted if name.startswith(part)):
                source = name.replace(part, start, 1)
                source = re.sub(
                    r"^fusion\.layers\.(\d+)",
                    lambda match: f"fusion.layers.{int(match[1]) + self.decoder_start}",
                    source,
                )
                fits = source in tensors and tensors[source].shape == tensors[name].shape
                if fits and source not in lacking:
                    tensors[name].copy_(tensors[source])
                    started.add(name)
        if started:
            log.warning(
                "the answer decoder starts from the fusion layers and the embeddings of texts: "
                "%d of its %d tensors",
                len(started),
                len(wanted),
            )
        return [name for name in missing if name not in started]

    def answer_losses(
        self,
        question_states: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answers_per_question: Tensor | None = None,
        *,
        teacher_logits: Tensor | None = None,
        alpha: float = 0.0,
    ) -> Tensor:
        """Loss of every answer, summed over its tokens: ``(answers,)``.

        Args:
            question_states: ``(batch, tokens, text_hidden_size)``.
            question_mask: ``(batch, tokens)``, 0 at padding.
            answer_ids: ``(answers, answer tokens)``: [CLS], the answer, [SEP], padding; those to
                the first question come first.
            answer_mask: ``(answers, answer tokens)``, 0 at padding.
            answers_per_question: int64 ``(batch,)``, answers to each; by default one.
            teacher_logits: of a teacher's `answer_logits`; needed where ``alpha > 0``.
            alpha: share of the teacher in the targets.
        """
        logits = self.answer_logits(
            question_states, question_mask, answer_ids, answer_mask, answers_per_question
        )
        labels = answer_ids[:, 1:].masked_fill(answer_mask[:, 1:] == 0, IGNORED)
        return distilled_cross_entropies(logits, labels, teacher_logits, alpha).sum(1)

    def answer_logits(
        self,
        question_states: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answers_per_question: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token, fp32 ``(answers, answer tokens - 1, vocab_size)``.

        Arguments as of `answer_losses`.
        """
        batch, count = question_states.shape[0], len(answer_ids)
        self._check_answers(answer_ids, answer_mask)
        self._check_counts(answers_per_question, batch, count)
        ignored = question_mask == 0
        if answers_per_question is not None:
            rows = torch.arange(batch, device=question_states.device)
            rows = rows.repeat_interleave(answers_per_question, output_size=count)
            question_states, ignored = question_states[rows], ignored[rows]
        decoded = self.decoder(answer_ids[:, :-1], question_states, ignored)
        logits: Tensor = self.token_head(decoded, self.decoder.embeddings.word.weight).float()
        return logits

    @torch.no_grad()
    def rank_answers(
        self,
        question_states: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        k: int = 128,
        merge: Merge = "logsumexp",
        rows: int = 512,
    ) -> AnswerRanking:
        """The best answers of a closed list, by likelihood.

        The k answers whose first tokens are likeliest are decoded whole: ``log p(a) = sum_t
        log p(a_t | a_<t, question)``, in fp32 whatever the layers compute in. Of answers with equal
        scores the first in the list is the better one. Under ``compat="svitt-official"``
        the first token counts twice; unless ``merge`` is "concat", also for one clip, its
        probability then is a softmax of the merged probabilities of all tokens, which is nearly
        flat, as the authors' recipes have it.

        Args:
            question_states: ``(batch, tokens, text_hidden_size)``, or
                ``(batch, clips, tokens, text_hidden_size)`` for several clips of each video.
            question_mask: ``(batch, tokens)``, 0 at padding.
            answer_ids: ``(answers, answer tokens)``, the same list for all questions, tokenized
                once: [CLS], the answer, [SEP], padding.
            answer_mask: ``(answers, answer tokens)``, 0 at padding.
            k: answers that are decoded whole; at most all of the list are.
            merge: how log probabilities of the clips become one; "concat": there is one clip,
                maybe of the states of several behind each other.
            rows: answers that are decoded at a time, which bounds the memory: their logits take
                ``4 * vocab_size`` bytes a token.

        Returns:
            `AnswerRanking`, best first, ``(batch, min(k, answers))``.

        Raises:
            ValueError: the list is empty, has an answer without a token, or a shape does not fit.

        Complexity:
            The decoder's layers over ``batch * clips * (1 + k * answer tokens)`` tokens. Keys and
            values of a question are computed once, whatever k.
        """
        clips = question_states if question_states.dim() == 4 else question_states[:, None]
        self._check_questions(clips, question_mask)
        self._check_answers(answer_ids, answer_mask)
        self._check_list(answer_mask)
        for name, value in (("k", k), ("rows", rows)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        if merge == "concat" and clips.shape[1] != 1:
            raise ValueError(
                f"{type(self).__name__}: merge='concat' must have 1 clip, got {clips.shape[1]}"
            )
        ignored, official = question_mask == 0, self.config.official
        start = answer_ids[:1, :1].expand(len(clips), 1)
        vocabulary = torch.stack(
            [
                self._logits(self.decoder(start, states, ignored)[:, 0]).log_softmax(-1)
                for states in clips.unbind(1)
            ],
            1,
        )  # (batch, clips, vocab_size)
        of_clips = vocabulary[:, :, answer_ids[:, 1]]
        first = merge_clips(of_clips, merge, 1)
        if official and merge != "concat":
            merged = merge_clips(vocabulary.exp(), merge, 1).log_softmax(-1)
            first = merged[:, answer_ids[:, 1]]
        best = first.sort(dim=1, descending=True, stable=True).indices[:, :k]
        rest = torch.stack(
            [
                self._rest(states, ignored, answer_ids[best], answer_mask[best], rows)
                for states in clips.unbind(1)
            ],
            1,
        )
        scores = of_clips.gather(2, best[:, None].expand_as(rest)) + rest
        if official:
            scores = scores + first.gather(1, best)[:, None]
        scores, order = merge_clips(scores, merge, 1).sort(dim=1, descending=True, stable=True)
        return AnswerRanking(answers=best.gather(1, order), scores=scores)

    def _rest(
        self, question: Tensor, ignored: Tensor, ids: Tensor, mask: Tensor, rows: int
    ) -> Tensor:
        """Log-likelihoods of answers ``(batch, k, tokens)`` from their second tokens on."""
        found = []
        step = max(1, rows // len(question))
        for part, real in zip(ids.split(step, 1), (mask[..., 2:] != 0).split(step, 1), strict=True):
            decoded = self.decoder(part[..., :-1].flatten(0, 1), question, ignored)
            states = decoded.unflatten(0, part.shape[:2])[:, :, 1:]
            # Most of a list is short: padding takes no part in the product with all words.
            losses = F.cross_entropy(
                self._logits(states[real]), part[..., 2:][real], reduction="none"
            )
            sums = losses.new_zeros(real.shape).masked_scatter(real, -losses)
            found.append(sums.sum(-1))
        return torch.cat(found, 1)

    def _logits(self, states: Tensor) -> Tensor:
        return in_fp32(self.token_head, states, self.decoder.embeddings.word.weight).float()

    def _check_answers(self, answer_ids: Tensor, answer_mask: Tensor) -> None:
        who, longest = type(self).__name__, self.config.max_position_embeddings
        if answer_ids.dim() != 2 or not 2 <= answer_ids.shape[1] <= longest:
            raise ValueError(
                f"{who}: answer_ids must have shape (answers, 2 to {longest} tokens), "
                f"got {tuple(answer_ids.shape)}"
            )
        if answer_mask.shape != answer_ids.shape:
            raise ValueError(
                f"{who}: answer_mask must have shape {tuple(answer_ids.shape)}, "
                f"got {tuple(answer_mask.shape)}"
            )

    def _check_counts(self, counts: Tensor | None, batch: int, answers: int) -> None:
        who = type(self).__name__
        if counts is None:
            if answers != batch:
                raise ValueError(
                    f"{who}: answers_per_question must be given for {answers} answers to {batch} "
                    "questions, got None"
                )
            return
        if counts.shape != (batch,):
            raise ValueError(
                f"{who}: answers_per_question must have shape ({batch},), got {tuple(counts.shape)}"
            )
        if torch.compiler.is_compiling() or counts.is_meta:
            return
        if int(counts.sum()) != answers:
            raise ValueError(
                f"{who}: answers_per_question must add up to the {answers} rows of answer_ids, "
                f"got {int(counts.sum())}"
            )

    def _check_questions(self, clips: Tensor, question_mask: Tensor) -> None:
        if clips.dim() != 4 or question_mask.shape != (clips.shape[0], clips.shape[2]):
            raise ValueError(
                f"{type(self).__name__}: question_states must have shape (batch, tokens, dim) or "
                f"(batch, clips, tokens, dim) for a question_mask of shape "
                f"{tuple(question_mask.shape)}, got {tuple(clips.shape)} with clips"
            )

    def _check_list(self, answer_mask: Tensor) -> None:
        who = type(self).__name__
        if not len(answer_mask):
            raise ValueError(f"{who}: answer_ids must hold at least one answer, got 0")
        empty = (answer_mask[:, :2] == 0).any(1).nonzero()
        if len(empty):
            raise ValueError(
                f"{who}: answer_mask must be 1 at the first two tokens of every answer, "
                f"got 0 in row {int(empty[0])}"
            )

"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class VideoOutput(ModelOutput):
    """Encoded clips.

    Attributes:
        embeds: ``(batch, projection_dim)``, L2-normalised; of frames that are encoded alone, the
            mean of theirs, which are.
        states: ``(batch, 1 + n, hidden_size)``, [CLS] and the n patches that survive; those of
            frames that are encoded alone behind each other.
        indices: int64 ``(batch, n)``, numbers of these patches in (frame, row, column) order.
        indices_per_stage: the same after each pruning.
    """

    embeds: Tensor | None = None
    states: Tensor | None = None
    indices: Tensor | None = None
    indices_per_stage: tuple[Tensor, ...] | None = None


@dataclass
class TextOutput(ModelOutput):
    """Encoded texts.

    Attributes:
        embeds: ``(batch, projection_dim)``, L2-normalised.
        states: ``(batch, tokens, text_hidden_size)``.
    """

    embeds: Tensor | None = None
    states: Tensor | None = None


@dataclass
class FusionOutput(ModelOutput):
    """Texts that have attended to their clips.

    Attributes:
        states: ``(batch, tokens, text_hidden_size)``.
        video_indices: int64 ``(batch, m)``, the patches that multimodal pruning left.
    """

    states: Tensor | None = None
    video_indices: Tensor | None = None


@dataclass
class PreTrainingOutput(ModelOutput):
    """Losses of a batch, and the embeddings they come from; a loss of weight 0 is None.

    Attributes:
        loss: weighted sum of the others.
        loss_vtc: contrastive loss of clips and texts.
        loss_vtm: matching loss of pairs that match and pairs that do not.
        loss_mlm: loss of the masked tokens.
        video_embeds: ``(batch, projection_dim)``.
        text_embeds: ``(batch, projection_dim)``.
    """

    loss: Tensor | None = None
    loss_vtc: Tensor | None = None
    loss_vtm: Tensor | None = None
    loss_mlm: Tensor | None = None
    video_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """Losses of a batch of questions, and the states that they come from.

    Attributes:
        loss: `loss_lm`, the only one.
        loss_lm: losses of the answers, weighted, summed, over the number of questions.
        answer_losses: ``(answers,)``, each summed over the answer's tokens.
        question_states: ``(batch, tokens, text_hidden_size)``.
    """

    loss: Tensor | None = None
    loss_lm: Tensor | None = None
    answer_losses: Tensor | None = None
    question_states: Tensor | None = None


@dataclass
class AnswerRanking(ModelOutput):
    """The best answers to questions, best first.

    Attributes:
        answers: int64 ``(batch, k)``, numbers of rows of the list.
        scores: ``(batch, k)``, log-likelihoods; their softmax is what the authors report.
    """

    answers: Tensor | None = None
    scores: Tensor | None = None


@dataclass
class MultipleChoiceOutput(ModelOutput):
    """Chosen options.

    Attributes:
        choices: int64 ``(batch,)``, numbers of the options.
        scores: ``(batch, options)``, match scores.
    """

    choices: Tensor | None = None
    scores: Tensor | None = None


@dataclass
class ClassificationOutput(ModelOutput):
    """Classes of texts about pictures.

    Attributes:
        loss: `loss_class`, the only one; None without labels.
        loss_class: cross-entropy, of targets that a momentum twin may have a share in.
        logits: ``(batch, classes)``.
        states: ``(batch, text_hidden_size)``, what the logits come from.
    """

    loss: Tensor | None = None
    loss_class: Tensor | None = None
    logits: Tensor | None = None
    states: Tensor | None = None

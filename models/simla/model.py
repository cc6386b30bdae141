"""SIMLA: an image tower, one encoder for texts and for fusion in both directions, and its tasks.

Source: SIMLA (ECCV 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svitt_ops.models.albef.model import ALBEFClasses, ALBEFModel, ALBEFPairs
from svitt_ops.models.parts.answers import AnswersQuestions
from svitt_ops.models.parts.classification import Classifies, DistilsClasses
from svitt_ops.models.parts.distillation import DistilsAnswers, DistilsPairs, DistilsWords
from svitt_ops.models.parts.grounding import GroundsWords, keep_attention
from svitt_ops.models.parts.layers import embed
from svitt_ops.models.parts.losses import IGNORED, distilled_cross_entropies, mean_of_labels
from svitt_ops.models.parts.outputs import PreTrainingOutput, TextOutput, VideoOutput
from svitt_ops.models.parts.paired_images import ReadsTwoImages
from svitt_ops.models.parts.unpickling import read_tensors
from svitt_ops.models.parts.words import PredictsWords
from svitt_ops.models.simla.configuration import SIMLAConfig
from svitt_ops.models.simla.masking import (
    best_places,
    block_masks,
    keyword_targets,
    votes_of_heads,
)
from svitt_ops.models.simla.tokenizer import ImageTokenizer, dalle_sizes, load_dalle, start


@dataclass
class SIMLAPreTrainingOutput(PreTrainingOutput):
    """Losses of a batch; besides those of `PreTrainingOutput`:

    Attributes:
        loss_mim: loss of the masked patches' visual tokens.
        loss_psl: loss of the words that are an image's labels.
    """

    loss_mim: Tensor | None = None
    loss_psl: Tensor | None = None


class SIMLAModel(ALBEFModel):
    """The image tower and the encoder of SIMLA.

    Texts alone pass the layers without attention over images. Fusion starts again from the
    embeddings of the tokens, so these are the states of `encode_text`, which `fuse` takes.
    """

    config_class = SIMLAConfig
    config: SIMLAConfig

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether a loss may depend on some parameters only: the mask token is for pretraining."""
        return True

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TextOutput:
        """Encode texts; both arguments ``(batch, tokens)``, the mask 0 at padding.

        Returns:
            Embeddings by the whole encoder, and as states those of the tokens before it.
        """
        words = self.text(input_ids, attention_mask)
        if not self.projects:
            return TextOutput(states=words)
        states, ignored = words, attention_mask == 0
        for layer in self.fusion.layers:
            states, _ = layer(states, ignored)
        return TextOutput(embeds=embed(self.text_projection, states[:, 0]), states=words)

    def read_image(self, video_states: Tensor, words: Tensor, attention_mask: Tensor) -> Tensor:
        """Let images attend over their texts, row by row.

        Args:
            video_states: ``(batch, 1 + n, hidden_size)`` of `encode_video`.
            words: ``(batch, tokens, hidden_size)`` of `encode_text`.
            attention_mask: ``(batch, tokens)``, 0 at padding.

        Returns:
            ``(batch, 1 + n, hidden_size)``.
        """
        states, ignored = self.text.embeddings.place(video_states), attention_mask == 0
        for layer in self.fusion.layers:
            states, _ = layer(states, None, words, video_ignored=ignored)
        return states

    def attention_of_patches(
        self, video_states: Tensor, words: Tensor, attention_mask: Tensor, *, layer: int
    ) -> Tensor:
        """How the patches of images, as queries, attend to their texts in one layer.

        Args:
            video_states: ``(batch, 1 + n, hidden_size)`` of `encode_video`.
            words: ``(batch, tokens, hidden_size)`` of `encode_text`.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            layer: which, from 0.

        Returns:
            ``(batch, n, tokens)``, mean over the heads.
        """
        with keep_attention(self.fusion.layers[layer].cross_attention) as maps:
            self.read_image(video_states, words, attention_mask)
        return maps[0][:, :, 1:].mean(1)

    def attention_of_cls(
        self, words: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> Tensor:
        """A text's attention from [CLS] over itself in `config.keyword_layer`, fusing.

        Returns:
            ``(batch, heads, tokens)``.
        """
        layers = self.fusion.layers[: self.config.keyword_layer % len(self.fusion.layers) + 1]
        states, ignored = words, attention_mask == 0
        with keep_attention(layers[-1].attention) as maps:
            for layer in layers:
                states, _ = layer(states, ignored, video_states)
        return maps[0][:, :, 0]


class SIMLAForRetrieval(SIMLAModel, DistilsPairs, GroundsWords):
    """SIMLA with a learned temperature, the match head, and a twin with queues."""

    teacher_class = SIMLAModel


class SIMLAConcepts(SIMLAModel, PredictsWords):
    """What the twin of the pretraining model is: SIMLA with heads for words, patches, labels."""

    def build(self, config: Any) -> None:
        super().build(config)
        self.mim_head = nn.Linear(config.hidden_size, config.image_vocab_size)
        source = {"projection": config.projection_dim, "cls": config.hidden_size}
        self.concept_head = nn.Linear(source[config.concept_source], config.vocab_size)

    def patch_logits(
        self, pixel_values: Tensor, masked: Tensor, words: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Logits of every patch's visual token, ``(batch, n, image_vocab_size)``."""
        video = self.encode_video(pixel_values, masked)
        read = self.read_image(cast(Tensor, video.states), words, attention_mask)
        return cast(Tensor, self.mim_head(read[:, 1:]))

    def concept_logits(self, video: VideoOutput) -> Tensor:
        """Logits of every piece as a label of images, ``(batch, vocab_size)``."""
        projected = self.config.concept_source == "projection"
        source = video.embeds if projected else cast(Tensor, video.states)[:, 0]
        return cast(Tensor, self.concept_head(source)).float()


class SIMLAForPreTraining(SIMLAConcepts, SIMLAForRetrieval, DistilsWords):
    """SIMLA with a learned temperature and the heads of ITC, ITM, MLM, MIM and PSL.

    `tokenizer` makes the visual tokens, unless `forward` is given them: any module with `tokens`,
    by default an untrained `ImageTokenizer`; `use_dalle` puts DALL-E's in its place. Checkpoints of
    training hold it, weights for use not.

    `forward` takes two arguments more than ALBEF's, by name: ``masked_patches``, bool
    ``(batch, n)``, True where a patch is masked, by default in random blocks, and
    ``visual_token_ids``, int64 ``(batch, n)``, what the masked patches are to be, by default the
    tokenizer's.
    """

    teacher_class = SIMLAConcepts
    output_class = SIMLAPreTrainingOutput
    losses = ("vtc", "vtm", "mlm", "mim", "psl")
    training_only = (*SIMLAForRetrieval.training_only, "tokenizer.")

    def build(self, config: Any) -> None:
        super().build(config)
        self.tokenizer: Any = None
        if config.weights["mim"] and config.momentum is not None:
            found = ImageTokenizer(
                config.grid_size,
                config.image_vocab_size,
                width=config.tokenizer_width,
                depth=config.tokenizer_depth,
            )
            self.tokenizer = found.requires_grad_(False)

    def fit_frames(self, num_frames: int) -> None:
        """Let the tokenizer have the grid of the model's patches."""
        super().fit_frames(num_frames)
        if isinstance(self.tokenizer, ImageTokenizer):
            self.tokenizer.grid_size = self.config.grid_size

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether a loss may depend on some parameters only: those of a loss of weight 0."""
        return not all(self.config.weights.values())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if self.tokenizer is not None and any(module is x for x in self.tokenizer.modules()):
            start(module)
        else:
            super()._init_weights(module)

    def more_losses(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        video: VideoOutput,
        text: TextOutput,
        taught: tuple[VideoOutput, TextOutput],
        alpha: float,
        **given: Tensor | None,
    ) -> dict[str, Tensor]:
        """The losses of masked patches and of labels."""
        weight, losses, own = self.config.weights, {}, self.config.official
        if weight["mim"]:
            words = text.states, (text if own else taught[1]).states
            losses["mim"] = self.patch_loss(pixel_values, words, attention_mask, alpha, **given)
        if weight["psl"]:
            with torch.no_grad():
                keys = (video if own else taught[0]).states
                labels = self.labels(taught[1].states, input_ids, attention_mask, keys)
                soft = self.teacher.concept_logits(taught[0]).sigmoid()
            logits = self.concept_logits(video)
            hard = F.binary_cross_entropy_with_logits(logits, labels)
            losses["psl"] = (1 - alpha) * hard + alpha * F.binary_cross_entropy_with_logits(
                logits, soft
            )
        return losses

    def patch_loss(
        self,
        pixel_values: Tensor,
        words: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        alpha: float,
        masked_patches: Tensor | None = None,
        visual_token_ids: Tensor | None = None,
    ) -> Tensor:
        """Loss of the masked patches; ``words`` are those of the model and of its twin."""
        config, batch = self.config, len(pixel_values)
        if masked_patches is None:
            masked = block_masks(batch, config.grid_size, config.masked_patches)
            masked_patches = masked.to(pixel_values.device)
        if visual_token_ids is None:
            if self.tokenizer is None:
                raise ValueError(
                    f"{type(self).__name__}: visual_token_ids must be given without a tokenizer, "
                    "got None"
                )
            visual_token_ids = self.tokenizer.tokens(pixel_values)
        if visual_token_ids.shape != masked_patches.shape:
            raise ValueError(
                f"{type(self).__name__}: visual_token_ids must have shape "
                f"{tuple(masked_patches.shape)}, got {tuple(visual_token_ids.shape)}"
            )
        labels = visual_token_ids.masked_fill(~masked_patches, IGNORED)
        logits = self.patch_logits(pixel_values, masked_patches, words[0], attention_mask)
        teacher = None
        if alpha:
            with torch.no_grad():
                teacher = self.teacher.patch_logits(
                    pixel_values, masked_patches, words[1], attention_mask
                )
        losses = distilled_cross_entropies(logits, labels, teacher, alpha)
        return mean_of_labels(losses, labels)

    @torch.no_grad()
    def labels(
        self, words: Tensor, input_ids: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> Tensor:
        """The words of texts that the twin attends most, as labels of their images.

        Args:
            words: ``(batch, tokens, hidden_size)``, the twin's embeddings of the tokens.
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            video_states: ``(batch, 1 + n, hidden_size)``.

        Returns:
            ``(batch, vocab_size)``, 1 at labels, 0 elsewhere.
        """
        scores, allowed, count = self._ranking(words, input_ids, attention_mask, video_states)
        return keyword_targets(scores, input_ids, allowed, count, self.config.vocab_size)

    @torch.no_grad()
    def label_places(
        self, words: Tensor, input_ids: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Where the words of `labels` stand in their texts; arguments as of that.

        Returns:
            int64 ``(batch, k)``, the most attended first, and bool, whether each is a label.
        """
        scores, allowed, count = self._ranking(words, input_ids, attention_mask, video_states)
        places, chosen = best_places(scores, allowed, count)
        return places, chosen & (input_ids.gather(1, places) != input_ids[:, :1])

    def _ranking(
        self, words: Tensor, input_ids: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Scores of the words, which of them may be labels, and how many."""
        config = self.config
        reader = self if self.teacher is None else self.teacher
        attention = reader.attention_of_cls(words, attention_mask, video_states)
        allowed = attention_mask != 0
        for piece in config.keyword_excluded_ids:
            allowed = allowed & (input_ids != piece)
        if config.keyword_rule == "votes":
            return votes_of_heads(attention, config.keyword_votes), allowed, config.keywords
        allowed = allowed & (torch.arange(allowed.shape[1], device=allowed.device) > 0)
        return attention.mean(1), allowed, config.keyword_votes


def use_dalle(model: Any, source: str | Path | Mapping[str, Any]) -> None:
    """Let a model have DALL-E's encoder as its tokenizer, of the sizes that the weights show.

    Args:
        model: a `SIMLAForPreTraining` with a tokenizer; its configuration takes over the sizes.
        source: as of `load_dalle`.

    Raises:
        ValueError: the model has no tokenizer, or the source is no such encoder.
    """
    if getattr(model, "tokenizer", None) is None:
        raise ValueError(
            f"{type(model).__name__}: must have a tokenizer to take DALL-E's, as pretraining with"
            " the loss 'mim' has, got none"
        )
    tensors = read_tensors(source)
    config, (width, depth) = model.config, dalle_sizes(tensors)
    tokenizer = ImageTokenizer(config.grid_size, config.image_vocab_size, width=width, depth=depth)
    load_dalle(tokenizer, tensors)
    model.tokenizer = tokenizer.requires_grad_(False)
    config.tokenizer_width, config.tokenizer_depth = width, depth


class SIMLAAnswers(SIMLAModel, AnswersQuestions):
    """What the twin of the question-answering model is."""

    @property
    def decoder_start(self) -> int:
        """The decoder starts from the last layers of the encoder."""
        return max(self.config.num_fusion_layers - self.config.decoder_layers, 0)


class SIMLAForQuestionAnswering(SIMLAModel, DistilsAnswers):
    """SIMLA with an answer decoder instead of the heads that compare images and texts."""

    teacher_class = SIMLAAnswers
    decoder_start = SIMLAAnswers.decoder_start


class SIMLAClasses(SIMLAModel, Classifies):
    """What the twin of the entailment model is."""

    classes = ALBEFClasses.classes


class SIMLAForVisualEntailment(SIMLAModel, DistilsClasses):
    """What follows from an image: a text contradicts it, is neutral, or is entailed."""

    teacher_class = SIMLAClasses
    classes = ALBEFClasses.classes


class SIMLAPairs(SIMLAModel, ReadsTwoImages, Classifies):
    """What the twin of the reasoning model is."""

    classes = ALBEFPairs.classes


class SIMLAForVisualReasoning(SIMLAModel, ReadsTwoImages, DistilsClasses):
    """Whether a text is true of two images, `pixel_values` ``(batch, 2, 3, height, width)``."""

    teacher_class = SIMLAPairs
    classes = ALBEFPairs.classes

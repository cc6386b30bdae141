"""SCL's models with classes: answers to questions about clips, and statements about two images.

Source: SCL (CVPR 2023), after METER (CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svitt_ops.models.parts.clips import Merge, merge_clips
from svitt_ops.models.parts.layers import in_fp32
from svitt_ops.models.parts.losses import cross_entropy
from svitt_ops.models.parts.outputs import ClassificationOutput
from svitt_ops.models.scl.fusion import TwoLayerHead
from svitt_ops.models.scl.losses import answer_loss
from svitt_ops.models.scl.model import SCLModel, without

OF_PAIRS = without("match_head", "rank_head", "token_head", "video_projection", "text_projection")


class SCLForQuestionAnswering(SCLModel):
    """Which of `config.answers` is right of a clip, by the soft scores that people gave them."""

    projects = False
    _keys_to_ignore_on_load_unexpected = OF_PAIRS

    def build(self, config: Any) -> None:
        super().build(config)
        if config.answers is None:
            raise ValueError(f"{type(self).__name__}: config.answers must be a list, got None")
        width = self.pair_width(config)
        self.class_head = TwoLayerHead(width, width, len(config.answers))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        targets: Tensor | None = None,
        clip_numbers: Tensor | None = None,
    ) -> ClassificationOutput:
        """Answers to a batch of questions, and with targets their loss.

        Args:
            pixel_values: ``(clips, ...)`` as `encode_video` takes them.
            input_ids: ``(batch, tokens)``, the questions.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            targets: ``(batch, answers)``, scores from 0 to 1.
            clip_numbers: int64 ``(batch,)``, the clip that each question is about; by default they
                have one each, in order.
        """
        video = self.encode_video(pixel_values).states
        if clip_numbers is not None:
            video = video[clip_numbers]
        logits = self.answer_logits(input_ids, attention_mask, video)
        if targets is None:
            return ClassificationOutput(logits=logits)
        if targets.shape != logits.shape:
            raise ValueError(
                f"{type(self).__name__}: targets must have shape {tuple(logits.shape)}, "
                f"got {tuple(targets.shape)}"
            )
        loss = answer_loss(logits, targets)
        return ClassificationOutput(loss=loss, loss_class=loss, logits=logits)

    def answer_logits(
        self, input_ids: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> Tensor:
        """Logits of the answers to questions, fp32 ``(batch, answers)``; arguments as of `fuse`."""
        text = self.encode_text(input_ids, attention_mask).states
        pooled = self.fuse(text, attention_mask, video_states).pooled
        return in_fp32(self.class_head, pooled).float()

    def answer_scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        video_states: Tensor,
        *,
        merge: Merge = "logsumexp",
    ) -> Tensor:
        """What answers to questions about videos are ranked by, ``(batch, answers)``.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            video_states: ``(batch, clips, tokens, text_hidden_size)`` of `encode_video`.
            merge: how clips become one, by their logits.
        """
        clips = video_states.shape[1]
        ids, mask = (x.repeat_interleave(clips, 0) for x in (input_ids, attention_mask))
        logits = self.answer_logits(ids, mask, video_states.flatten(0, 1))
        return merge_clips(logits.unflatten(0, (-1, clips)), merge, 1)


class SCLForVisualReasoning(SCLModel):
    """Whether a text is true of two images, `pixel_values` ``(batch, 2, 3, height, width)``.

    Each image is fused with the text alone; tokens of the second have a type of their own, which
    starts as that of clips.
    """

    projects = False
    classes = ("false", "true")
    _keys_to_ignore_on_load_unexpected = OF_PAIRS

    def build(self, config: Any) -> None:
        super().build(config)
        width = self.pair_width(config)
        self.second_type = nn.Parameter(torch.zeros(1, config.text_hidden_size))
        self.class_head = TwoLayerHead(2 * width, width, len(self.classes))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.zeros_(self.second_type)

    @torch.no_grad()
    def start_missing(self, missing: Sequence[str]) -> list[str]:
        """Start the second image's type as the first one's, if that has weights."""
        left = list(missing)
        if "second_type" in left and "types.weight" not in left:
            self.second_type.copy_(self.types.weight[1:])
            left.remove("second_type")
        return super().start_missing(left)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
    ) -> ClassificationOutput:
        """Classes of a batch, and with labels their loss.

        Args:
            pixel_values: ``(batch, 2, 3, image_size, image_size)``.
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            labels: int64 ``(batch,)``, places in `classes`.
        """
        if pixel_values.dim() != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"{type(self).__name__}: pixel_values must have shape (batch, 2, 3, height, width),"
                f" got {tuple(pixel_values.shape)}"
            )
        text = self.encode_text(input_ids, attention_mask).states
        images = self.encode_video(pixel_values.flatten(0, 1)).states.unflatten(0, (-1, 2))
        pooled = [
            self.fuse(text, attention_mask, images[:, k], video_type=kind).pooled
            for k, kind in enumerate((None, self.second_type))
        ]
        states = torch.cat(pooled, 1)
        logits = in_fp32(self.class_head, states)
        if labels is None:
            return ClassificationOutput(logits=logits, states=states)
        if labels.shape != logits.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}: labels must have shape {tuple(logits.shape[:1])}, "
                f"got {tuple(labels.shape)}"
            )
        loss = cross_entropy(logits, labels)
        return ClassificationOutput(loss=loss, loss_class=loss, logits=logits, states=states)

"""Classes of a text about pictures, from the fusion layers' [CLS].

Source: ALBEF (NeurIPS 2021), section 4.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svitt_ops.models.parts.clips import clips_of_texts
from svitt_ops.models.parts.fused_towers import FusedTowers
from svitt_ops.models.parts.layers import in_fp32
from svitt_ops.models.parts.losses import distilled_cross_entropies
from svitt_ops.models.parts.momentum import HasTeacher
from svitt_ops.models.parts.outputs import ClassificationOutput


class ClassHead(nn.Module):
    """Two layers around a ReLU."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, classes)

    def forward(self, states: Tensor) -> Tensor:
        return cast(Tensor, self.out(F.relu(self.dense(states))))


class Classifies(FusedTowers):
    """A class head instead of the heads that compare pictures and texts."""

    projects = False
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of their labels."""
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 (as the base's)
        r"^(match_head|token_head|assignment_head|pooler_norm|decoder)\.",
        r"^(video|text)_projection\.",
        r"^temperature$",
    ]

    def build(self, config: Any) -> None:
        super().build(config)
        self.class_head = ClassHead(config.text_hidden_size, len(self.classes))

    def read(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        clip_numbers: Tensor | None = None,
    ) -> Tensor:
        """The text's [CLS] after it attended to what it is about, ``(batch, text_hidden_size)``."""
        video = self.encode_video(pixel_values).states
        if clip_numbers is not None:
            video = clips_of_texts(self, video, clip_numbers, len(input_ids))
        text = self.encode_text(input_ids, attention_mask).states
        return cast(Tensor, self.fuse(text, attention_mask, video).states[:, 0])

    def class_logits(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        clip_numbers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What `read` returns, and logits ``(batch, classes)`` of it."""
        states = self.read(pixel_values, input_ids, attention_mask, clip_numbers)
        return states, in_fp32(self.class_head, states)


class DistilsClasses(HasTeacher, Classifies):
    """The same with a twin of the whole model that has a share in the targets."""

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        clip_numbers: Tensor | None = None,
        *,
        alpha: float | None = None,
    ) -> ClassificationOutput:
        """Classes of a batch, and with labels their loss.

        Args:
            pixel_values: as `encode_video` of the model takes them; or, of a model that reads two
                images, ``(batch, 2, 3, image_size, image_size)``.
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            labels: int64 ``(batch,)``, places in `classes`.
            clip_numbers: int64 ``(batch,)``, which of the pixel values each text is about, or
                ``(batch, 2)`` of a model that reads two; by default each has its own, in order.
            alpha: share of the twin in the targets; by default the one of this step.
        """
        arguments = (pixel_values, input_ids, attention_mask, clip_numbers)
        states, logits = self.class_logits(*arguments)
        if labels is None:
            return ClassificationOutput(logits=logits, states=states)
        if labels.shape != logits.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}: labels must have shape {tuple(logits.shape[:1])}, "
                f"got {tuple(labels.shape)}"
            )
        share, teacher = self.share_of_teacher(alpha), None
        if share:
            with torch.no_grad():
                teacher = self.teacher.class_logits(*arguments)[1]
        loss = distilled_cross_entropies(logits, labels, teacher, share).mean()
        return ClassificationOutput(loss=loss, loss_class=loss, logits=logits, states=states)

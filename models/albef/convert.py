"""Checkpoints that ALBEF's authors released."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svitt_ops.models.albef.configuration import ALBEFConfig
from svitt_ops.models.albef.model import (
    ALBEFForPreTraining,
    ALBEFForQuestionAnswering,
    ALBEFForRetrieval,
    ALBEFForTextAssignment,
    ALBEFForVisualEntailment,
    ALBEFForVisualReasoning,
)
from svitt_ops.models.parts.released_images import IMAGE_CHECKPOINT, load_released_images

TASKS = {
    "pretraining": ALBEFForPreTraining,
    "retrieval": ALBEFForRetrieval,
    "question_answering": ALBEFForQuestionAnswering,
    "visual_reasoning": ALBEFForVisualReasoning,
    "visual_entailment": ALBEFForVisualEntailment,
    "text_assignment": ALBEFForTextAssignment,
}


def load_official(
    source: str | Path | Mapping[str, Any],
    config: ALBEFConfig | None = None,
    *,
    task: str = "pretraining",
    compat: str | None = None,
) -> Any:
    """A model with the weights of a released ALBEF checkpoint, for evaluation.

    A file is read without running anything that it contains. Its momentum twin and its queues are
    taken over; where it has none, the twin starts as a copy of the loaded weights. Positions of
    another resolution are interpolated to the configuration's. From a checkpoint of pretraining, an
    answer decoder starts from the fusion layers, and for two images these are doubled. Names that
    are unknown, or missing, are reported as a warning, and a loss whose head is missing gets
    weight 0.

    Args:
        source: file written by the authors' training code, or the tensors in it by name.
        config: of the model; the base model's by default.
        task: what the model is for: "pretraining", "retrieval", "question_answering",
            "visual_reasoning", "visual_entailment" or "text_assignment"; the checkpoint may be that
            of another task.
        compat: that of the configuration, if it is to be another one.

    Returns:
        The system's model for that task.

    Raises:
        ValueError: the source holds nothing that belongs to such a model, another field of the
            configuration is not that of the source, or a tensor is not finite.
    """
    config = ALBEFConfig() if config is None else config
    return load_released_images(source, config, TASKS, IMAGE_CHECKPOINT, task=task, compat=compat)

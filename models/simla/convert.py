"""Checkpoints that SIMLA's authors released."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svitt_ops.models.parts.released_images import (
    IMAGE_CHECKPOINT,
    load_released_images,
    with_teacher,
)
from svitt_ops.models.simla.configuration import SIMLAConfig
from svitt_ops.models.simla.model import (
    SIMLAForPreTraining,
    SIMLAForQuestionAnswering,
    SIMLAForRetrieval,
    SIMLAForVisualEntailment,
    SIMLAForVisualReasoning,
)

TASKS = {
    "pretraining": SIMLAForPreTraining,
    "retrieval": SIMLAForRetrieval,
    "question_answering": SIMLAForQuestionAnswering,
    "visual_reasoning": SIMLAForVisualReasoning,
    "visual_entailment": SIMLAForVisualEntailment,
}
HEADS = ((r"mim_head\.(.+)", r"mim_head.\1"), (r"concept_head\.(.+)", r"concept_head.\1"))
RULES = (*IMAGE_CHECKPOINT, *with_teacher(HEADS))


def load_official(
    source: str | Path | Mapping[str, Any],
    config: SIMLAConfig | None = None,
    *,
    task: str = "pretraining",
    compat: str | None = None,
) -> Any:
    """A model with the weights of a released SIMLA checkpoint, for evaluation.

    A file is read, and its twin, queues, positions, answer decoder and doubled layers are treated,
    as by `svitt_ops.models.albef.load_official`; an answer decoder starts from the last layers.

    Args:
        source: file written by the authors' training code, or the tensors in it by name.
        config: of the model; the base model's by default.
        task: what the model is for: "pretraining", "retrieval", "question_answering",
            "visual_reasoning" or "visual_entailment"; the checkpoint may be that of another task.
        compat: that of the configuration, if it is to be another one.

    Returns:
        The system's model for that task.

    Raises:
        ValueError: the source holds nothing that belongs to such a model, another field of the
            configuration is not that of the source, or a tensor is not finite.
    """
    config = SIMLAConfig() if config is None else config
    return load_released_images(source, config, TASKS, RULES, task=task, compat=compat)

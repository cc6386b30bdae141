"""Checkpoints that SViTT's authors released."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from svitt_ops.models.parts.released import OFFICIAL_CHECKPOINT, load_released
from svitt_ops.models.svitt.configuration import SViTTConfig
from svitt_ops.models.svitt.model import (
    SViTTForMultipleChoice,
    SViTTForPreTraining,
    SViTTForQuestionAnswering,
    SViTTForRetrieval,
)

TASKS = {
    "pretraining": SViTTForPreTraining,
    "retrieval": SViTTForRetrieval,
    "question_answering": SViTTForQuestionAnswering,
    "multiple_choice": SViTTForMultipleChoice,
}


def load_official(
    source: str | Path | Mapping[str, Any],
    config: SViTTConfig | None = None,
    *,
    task: str = "pretraining",
    compat: str | None = None,
) -> Any:
    """A model with the weights of a released SViTT checkpoint, for evaluation.

    A file is read without running anything that it contains. Its number of frames is inferred
    from its relative position bias and replaces that of the configuration; `expand_frames` leads
    to another one. Bias of another resolution is interpolated to the configuration's. Names that
    are unknown, or missing, are reported as a warning, and a loss whose head is missing gets weight
    0, so that nothing is ranked by a head of random weights. An answer decoder that is missing
    starts from the fusion layers. The authors' texts end without [SEP]: see `append_sep` of
    `svitt_ops.training.data.text`. A Singularity checkpoint without layers over time is read too,
    as an SViTT of one frame; `svitt_ops.models.singularity.load_official` makes a Singularity of
    it.

    Args:
        source: file written by the authors' training code, or the tensors in it by name.
        config: of the model; the base model's by default.
        task: what the model is for: "pretraining", "retrieval", "question_answering" or
            "multiple_choice"; the checkpoint may be that of another task.
        compat: that of the configuration, if it is to be another one.

    Returns:
        The system's model for that task.

    Raises:
        ValueError: the source holds nothing that belongs to such a model, another field of the
            configuration is not that of the source, a tensor is not finite, or the source is that
            of a model with layers over time, which is Singularity.
    """
    config = SViTTConfig() if config is None else config
    rules = OFFICIAL_CHECKPOINT
    return load_released(source, config, TASKS, rules, _fields, task=task, compat=compat)


def _fields(tensors: Mapping[str, Tensor], frames: int, name: object) -> dict[str, Any]:
    over_time = [key for key in tensors if re.match(r"temporal\w*\.", key)]
    if over_time:
        raise ValueError(
            f"load_official: {name} must be of a model without layers over time, got "
            f"{len(over_time)} tensors of such layers, {over_time[0]} and so on: it is a "
            "Singularity, see svitt_ops.models.singularity.load_official"
        )
    return {"num_frames": frames}

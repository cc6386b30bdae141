"""Checkpoints that Singularity's authors released."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from svitt_ops.models.parts.key_maps import BERT, Rules, below
from svitt_ops.models.parts.loading import check_fixed
from svitt_ops.models.parts.released import OFFICIAL_CHECKPOINT, load_released
from svitt_ops.models.singularity.configuration import SingularityConfig
from svitt_ops.models.singularity.model import (
    SingularityForMultipleChoice,
    SingularityForPreTraining,
    SingularityForQuestionAnswering,
    SingularityForRetrieval,
)

TASKS = {
    "pretraining": SingularityForPreTraining,
    "retrieval": SingularityForRetrieval,
    "question_answering": SingularityForQuestionAnswering,
    "multiple_choice": SingularityForMultipleChoice,
}
EMBEDDINGS = "temporal_embeddings"
OVER_TIME: Rules = tuple(
    (name, re.sub(r"^text\.", "temporal.", target))
    for name, target in BERT
    if target.startswith("text.layers.")
)
RULES: Rules = (
    *OFFICIAL_CHECKPOINT,
    (EMBEDDINGS, r"temporal.embeddings"),
    *below(r"temporal_vision_", OVER_TIME),  # "encoder.layer.0" and so on
)


def load_official(
    source: str | Path | Mapping[str, Any],
    config: SingularityConfig | None = None,
    *,
    task: str = "pretraining",
    compat: str | None = None,
) -> Any:
    """A model with the weights of a released Singularity checkpoint, for evaluation.

    A file is read without running anything that it contains. Layers over time, and then the number
    of frames, are those of the file and replace the configuration's; a file without such layers
    leaves them to the configuration, where they start from random weights. It has embeddings of
    frames all the same, of no use, which are reported. Bias of another resolution, heads and a
    decoder that are missing are treated as by `svitt_ops.models.svitt.load_official`, and the
    authors' texts end without [SEP] here too.

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
            configuration is not that of the source, a tensor is not finite, or the source's
            relative position bias is not of single frames.
    """
    wanted = SingularityConfig() if config is None else config

    def fields(tensors: Mapping[str, Tensor], frames: int, name: object) -> dict[str, Any]:
        if frames != 1:
            raise ValueError(
                f"load_official: {name} must have relative position bias of single frames, got "
                f"that of {frames}: it is no Singularity"
            )
        found = [re.match(r"temporal_vision_encoder\.layer\.(\d+)\.", key) for key in tensors]
        layers = max((int(match[1]) + 1 for match in found if match), default=0)
        if layers and wanted.temporal_layers:
            check_fixed("load_official", {"temporal_layers": layers}, wanted, name)
        layers = layers or wanted.temporal_layers
        if not layers or EMBEDDINGS not in tensors:
            return {"temporal_layers": layers}
        shape = tensors[EMBEDDINGS].shape
        if len(shape) != 4 or not shape[1]:
            raise ValueError(
                f"load_official: {EMBEDDINGS} of {name} must have shape (1, frames, 1, "
                f"hidden_size), got {tuple(shape)}"
            )
        return {"temporal_layers": layers, "num_frames": shape[1]}

    return load_released(source, wanted, TASKS, RULES, fields, task=task, compat=compat)

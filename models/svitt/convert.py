"""Checkpoints that SViTT's and Singularity's authors released."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svitt_ops.models.parts.conversion import bias_geometry, convert_into
from svitt_ops.models.parts.key_maps import (
    BEIT,
    BERT,
    BERT_DROPPED,
    DECODER,
    Rules,
    below,
    renamed,
    sizes,
)
from svitt_ops.models.parts.loading import check_fixed, check_share
from svitt_ops.models.parts.unpickling import read_tensors
from svitt_ops.models.svitt.configuration import SViTTConfig
from svitt_ops.models.svitt.model import SViTTForPreTraining, SViTTForRetrieval
from svitt_ops.models.svitt.multiple_choice import SViTTForMultipleChoice
from svitt_ops.models.svitt.question_answering import SViTTForQuestionAnswering

OFFICIAL_CHECKPOINT: Rules = (
    *below(r"vision_encoder\.", (*BEIT, (r".*relative_position_index", ""))),
    *below(r"text_encoder\.(?:bert\.)?", (*BERT, *BERT_DROPPED)),
    *below(r"text_decoder\.(?:bert\.)?", (*DECODER, *BERT_DROPPED)),
    (r"vision_layernorm\.(.+)", r"video_norm.\1"),
    (r"vision_proj\.(.+)", r"video_projection.\1"),
    (r"text_proj\.(.+)", r"text_projection.\1"),
    (r"itm_head\.(.+)", r"match_head.\1"),
    (r"temp", r"temperature"),
)
"""Names in the checkpoints that SViTT's and Singularity's authors released."""
TASKS = {
    "pretraining": SViTTForPreTraining,
    "retrieval": SViTTForRetrieval,
    "question_answering": SViTTForQuestionAnswering,
    "multiple_choice": SViTTForMultipleChoice,
}
HEADS = {"vtm": "match_head.", "mlm": "token_head."}
"""Losses, and the head without whose weights each has no meaning."""


def load_official(
    source: str | Path | Mapping[str, Any],
    config: SViTTConfig | None = None,
    *,
    task: str = "pretraining",
    compat: str | None = None,
) -> Any:
    """A model with the weights of a released SViTT or Singularity checkpoint, for evaluation.

    A file is read without running anything that it contains. Its number of frames is inferred
    from its relative position bias (a Singularity checkpoint has that of one frame) and replaces
    that of the configuration; `expand_frames` leads to another one. Bias of another resolution is
    interpolated to the configuration's. Names that are unknown, or missing, are reported as a
    warning, and a loss whose head is missing gets weight 0, so that nothing is ranked by a head of
    random weights. An answer decoder that is missing starts from the fusion layers. The authors'
    texts end without [SEP]: see `append_sep` of `svitt_ops.training.data.text`.

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
            of a model with layers over time (Singularity-temporal), which there is none of here.
    """
    who = "load_official"
    if task not in TASKS:
        raise ValueError(f"{who}: task must be one of {', '.join(TASKS)}, got {task!r}")
    kind = TASKS[task]
    tensors = read_tensors(source)
    name = "the mapping" if isinstance(source, Mapping) else source
    config = SViTTConfig() if config is None else config
    named = renamed(tensors, OFFICIAL_CHECKPOINT)
    table = next((value for key, value in named.items() if key.endswith("bias.table")), None)
    if table is None:
        raise ValueError(
            f"{who}: {name} must have a relative position bias table, got "
            f"{len(tensors)} other tensors: {', '.join(list(tensors)[:5])}, ..."
        )
    over_time = [key for key in tensors if re.match(r"temporal\w*\.", key)]
    if over_time:
        raise ValueError(
            f"{who}: {name} must be of a model without layers over time, got {len(over_time)} "
            f"tensors of such layers, {over_time[0]} and so on: without them it is another model"
        )
    shown = sizes(named)
    if kind is not SViTTForQuestionAnswering:
        shown.pop("decoder_layers", None)
    check_fixed(who, shown, config, name)
    frames, _ = bias_geometry(table, tensors, config.grid_size)
    changes: dict[str, Any] = {"num_frames": frames}
    if compat is not None:
        changes["compat"] = compat
    losses = getattr(kind, "losses", ())
    lost = [
        loss
        for loss, head in HEADS.items()
        if loss in losses and not any(key.startswith(head) for key in named)
    ]
    weights = config.weights | dict.fromkeys(lost, 0)
    if any(weights.values()):
        changes["loss_weights"] = weights
    model = kind(type(config)(**{**config.to_dict(), **changes}))
    found = convert_into(model, tensors, OFFICIAL_CHECKPOINT, frames=frames)
    check_share(who, len(found.loaded), len(found.missing), name)
    found.report(name)
    return model.eval()

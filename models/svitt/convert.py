"""Checkpoints that SViTT's and Singularity's authors released."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from svitt_ops.models.parts.conversion import bias_geometry, convert_into
from svitt_ops.models.parts.key_maps import BEIT, BERT, BERT_DROPPED, Rules, below, renamed, sizes
from svitt_ops.models.parts.loading import check_fixed, check_share
from svitt_ops.models.parts.unpickling import read_tensors
from svitt_ops.models.svitt.configuration import SViTTConfig
from svitt_ops.models.svitt.model import SViTTForPreTraining

OFFICIAL_CHECKPOINT: Rules = (
    *below(r"vision_encoder\.", (*BEIT, (r".*relative_position_index", ""))),
    *below(r"text_encoder\.(?:bert\.)?", (*BERT, *BERT_DROPPED)),
    (r"vision_layernorm\.(.+)", r"video_norm.\1"),
    (r"vision_proj\.(.+)", r"video_projection.\1"),
    (r"text_proj\.(.+)", r"text_projection.\1"),
    (r"itm_head\.(.+)", r"match_head.\1"),
    (r"temp", r"temperature"),
)
"""Names in the checkpoints that SViTT's and Singularity's authors released."""


def load_official(path: str | Path, config: SViTTConfig | None = None) -> SViTTForPreTraining:
    """A model with the weights of a released SViTT or Singularity checkpoint, for evaluation.

    The file is read without running anything that it contains. Its number of frames is inferred
    from its relative position bias (a Singularity checkpoint has that of one frame) and replaces
    that of the configuration; `expand_frames` leads to another one. Bias of another resolution is
    interpolated to the configuration's. Names that are unknown, or missing, are reported as a
    warning, and a loss whose head is missing gets weight 0, so that nothing is ranked by a head of
    random weights. The authors' texts end without [SEP]: see `append_sep` of
    `svitt_ops.training.data.text`.

    Args:
        path: file written by the authors' training code.
        config: of the model; the base model's by default.

    Raises:
        ValueError: the file holds nothing that belongs to such a model, another field of the
            configuration is not that of the file, a tensor is not finite, or the file is that of a
            model with layers over time (Singularity-temporal), which there is none of here.
    """
    who = "load_official"
    tensors = read_tensors(path)
    config = SViTTConfig() if config is None else config
    named = renamed(tensors, OFFICIAL_CHECKPOINT)
    table = next((value for name, value in named.items() if name.endswith("bias.table")), None)
    if table is None:
        raise ValueError(
            f"{who}: {path} must have a relative position bias table, got "
            f"{len(tensors)} other tensors: {', '.join(list(tensors)[:5])}, ..."
        )
    over_time = [name for name in tensors if re.match(r"temporal\w*\.", name)]
    if over_time:
        raise ValueError(
            f"{who}: {path} must be of a model without layers over time, got {len(over_time)} "
            f"tensors of such layers, {over_time[0]} and so on: without them it is another model"
        )
    check_fixed(who, sizes(named), config, path)
    frames, _ = bias_geometry(table, tensors, config.grid_size)
    lost = [
        loss
        for loss, head in (("vtm", "match_head."), ("mlm", "token_head."))
        if not any(name.startswith(head) for name in named)
    ]
    changes: dict[str, Any] = {"num_frames": frames}
    weights = config.weights | dict.fromkeys(lost, 0)
    if any(weights.values()):
        changes["loss_weights"] = weights
    model = SViTTForPreTraining(type(config)(**{**config.to_dict(), **changes}))
    found = convert_into(model, tensors, OFFICIAL_CHECKPOINT, frames=frames)
    check_share(who, len(found.loaded), len(found.missing), path)
    found.report(path)
    return model.eval()

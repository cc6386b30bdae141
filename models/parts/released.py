"""Checkpoints that SViTT's and Singularity's authors released: their names, and their reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from svitt_ops.models.parts.answers import AnswersQuestions
from svitt_ops.models.parts.configuration import TwoTowersConfig
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
"""Names in these checkpoints."""
HEADS = {"vtm": "match_head.", "mlm": "token_head."}
"""Losses, and the head without whose weights each has no meaning."""


Fields = Callable[[Mapping[str, Tensor], int, object], dict[str, Any]]
"""From the tensors of a file, by the authors' names, the frames of its relative position bias and
its name: fields of the configuration that are the file's, whatever was asked for."""


def load_released(
    source: str | Path | Mapping[str, Any],
    config: TwoTowersConfig,
    kinds: Mapping[str, type[Any]],
    rules: Rules,
    fields: Fields,
    *,
    task: str,
    compat: str | None,
) -> Any:
    """A system's model for a task with the weights of a released checkpoint, for evaluation.

    Args:
        source: file written by the authors' training code, or the tensors in it by name.
        config: of the model, but for what the file says.
        kinds: the system's models, by task.
        rules: from the authors' names to ours.
        fields: of the configuration that the file says.
        task: a key of ``kinds``; the checkpoint may be that of another one.
        compat: that of the configuration, if it is to be another one.

    Raises:
        ValueError: the source holds nothing that belongs to such a model, another field of the
            configuration is not that of the source, or a tensor is not finite.
    """
    who = "load_official"
    if task not in kinds:
        raise ValueError(f"{who}: task must be one of {', '.join(kinds)}, got {task!r}")
    kind = kinds[task]
    tensors = read_tensors(source)
    name = "the mapping" if isinstance(source, Mapping) else source
    named = renamed(tensors, rules)
    table = next((value for key, value in named.items() if key.endswith("bias.table")), None)
    if table is None:
        raise ValueError(
            f"{who}: {name} must have a relative position bias table, got "
            f"{len(tensors)} other tensors: {', '.join(list(tensors)[:5])}, ..."
        )
    frames, _ = bias_geometry(table, tensors, config.grid_size)
    changes = fields(tensors, frames, name)
    return load_into_kind(
        kind, config, tensors, rules, changes, name=name, compat=compat, frames=frames
    )


def load_into_kind(
    kind: type[Any],
    config: TwoTowersConfig,
    tensors: Mapping[str, Tensor],
    rules: Rules,
    changes: dict[str, Any],
    *,
    name: object,
    compat: str | None,
    frames: int | None = None,
) -> Any:
    """A model of a kind with weights under the authors' names, for evaluation.

    Args:
        kind: class of the model.
        config: of the model, but for ``changes``.
        tensors: by the authors' names.
        rules: from these names to ours.
        changes: fields of the configuration that the file says.
        name: of the file.
        compat: that of the configuration, if it is to be another one.
        frames: of the relative position bias among ``tensors``.
    """
    who, named = "load_official", renamed(tensors, rules)
    shown = sizes(named)
    if not issubclass(kind, AnswersQuestions):
        shown.pop("decoder_layers", None)
    check_fixed(who, shown, config, name)
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
    found = convert_into(model, tensors, rules, frames=frames)
    check_share(who, len(found.loaded), len(found.missing), name)
    found.report(name)
    return model.eval()

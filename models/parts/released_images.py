"""Checkpoints that the authors of ALBEF and SIMLA released: their names, and their reading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from svitt_ops.models.parts.configuration import TwoTowersConfig
from svitt_ops.models.parts.key_maps import (
    BERT,
    BERT_DROPPED,
    DECODER,
    VIT,
    Rules,
    below,
    split_projections,
)
from svitt_ops.models.parts.momentum import HasTeacher
from svitt_ops.models.parts.paired_images import ReadsTwoImages
from svitt_ops.models.parts.released import load_into_kind
from svitt_ops.models.parts.resolution import resize_places
from svitt_ops.models.parts.unpickling import read_tensors

SECOND: Rules = tuple(
    (
        name.replace(r"(?:encoder\.layer|layers)", "second"),
        target.replace("text.layers", "fusion.second"),
    )
    for name, target in BERT
    if target.startswith("text.layers.")
)
_OWN: Rules = (
    *below(r"visual_encoder\.", VIT),
    *below(r"text_encoder\.(?:bert\.)?", (*BERT, *BERT_DROPPED, *SECOND)),
    *below(r"text_decoder\.(?:bert\.)?", (*DECODER, *BERT_DROPPED)),
    (r"vision_proj\.(.+)", r"video_projection.\1"),
    (r"text_proj\.(.+)", r"text_projection.\1"),
    (r"cls_head\.0\.(.+)", r"class_head.dense.\1"),
    (r"cls_head\.2\.(.+)", r"class_head.out.\1"),
)
"""Names of what the momentum twin has too."""


def with_teacher(rules: Rules) -> Rules:
    """The rules, and those for the twin's names, whose first part ends in "_m"."""
    twin = tuple(
        (re.sub(r"^(\w+)", r"\1_m", name, count=1), f"teacher.{target}" if target else "")
        for name, target in rules
    )
    return (*rules, *twin)


IMAGE_CHECKPOINT: Rules = (
    *with_teacher(_OWN),
    (r"itm_head\.(.+)", r"match_head.\1"),
    (r"ta_head\.(.+)", r"assignment_head.\1"),
    (r"temp", r"temperature"),
    (r"image_queue", r"queue.video"),
    (r"text_queue", r"queue.text"),
    (r"idx_queue", r"queue.ids"),
    (r"queue_ptr", r"queue.next"),
)
"""Names in these checkpoints, after `_unpack`."""
_LAYER = r"(text_encoder(?:_m)?\.(?:bert\.)?)encoder\.layer\.(\d+)\.(.+)"


def load_released_images(
    source: str | Path | Mapping[str, Any],
    config: Any,
    kinds: Mapping[str, type[Any]],
    rules: Rules,
    *,
    task: str,
    compat: str | None,
) -> Any:
    """A system's model for a task with the weights of a released checkpoint, for evaluation.

    Args:
        source: file written by the authors' training code, or the tensors in it by name.
        config: of the model, but for what the file says: how long its queues are.
        kinds: the system's models, by task.
        rules: from the authors' names to ours.
        task: a key of ``kinds``; the checkpoint may be that of another one.
        compat: that of the configuration, if it is to be another one.

    Raises:
        ValueError: the source holds nothing that belongs to such a model, another field of the
            configuration is not that of the source, or a tensor is not finite.
    """
    who = "load_official"
    if task not in kinds:
        raise ValueError(f"{who}: task must be one of {', '.join(kinds)}, got {task!r}")
    kind, tensors = kinds[task], read_tensors(source)
    name = "the mapping" if isinstance(source, Mapping) else source
    places = "visual_encoder.pos_embed"
    if places not in tensors or tensors[places].dim() != 3:
        got = tuple(tensors[places].shape) if places in tensors else "none"
        raise ValueError(f"{who}: {name} must have {places} of shape (1, n, dim), got {got}")
    tensors = _unpack(tensors, config.grid_size)
    changes: dict[str, Any] = {}
    queue = tensors.get("image_queue")
    if queue is not None and issubclass(kind, HasTeacher):
        changes["queue_size"] = len(queue)
    if not issubclass(kind, HasTeacher) or config.momentum is None:
        tensors = {key: x for key, x in tensors.items() if not _only_trains(key)}
    if issubclass(kind, ReadsTwoImages):
        tensors = _in_pairs(tensors, config)
    return load_into_kind(kind, config, tensors, rules, changes, name=name, compat=compat)


def _only_trains(name: str) -> bool:
    return name.partition(".")[0].endswith(("_m", "_queue", "queue_ptr"))


def _unpack(tensors: Mapping[str, Tensor], grid_size: int) -> dict[str, Tensor]:
    """The tensors with projections one by one, positions of this grid, and queues by rows."""
    found = {}
    for name, value in split_projections(tensors).items():
        tower, _, last = name.rpartition(".")
        if last == "pos_embed":
            found[f"{tower}.cls_position"] = value[:, :1]
            found[f"{tower}.patch_positions"] = resize_places(value[:, 1:], grid_size)
        elif name in ("image_queue", "text_queue"):
            found[name] = value.T
        else:
            found[name] = value.flatten() if name == "idx_queue" else value
    return found


def _in_pairs(tensors: Mapping[str, Tensor], config: TwoTowersConfig) -> dict[str, Tensor]:
    """Doubled layers as the first and the second of each pair.

    A checkpoint over one image has as many layers as the configuration, and stays as it is.
    """
    start, count = config.fusion_layer + config.unpaired_layers, config.text_num_hidden_layers
    matches = {name: re.fullmatch(_LAYER, name) for name in tensors}
    if max((int(m[2]) + 1 for m in matches.values() if m), default=0) <= count:
        return dict(tensors)
    found = {}
    for name, value in tensors.items():
        match = matches[name]
        if not match or int(match[2]) < start:
            found[name] = value
            continue
        pair, second = divmod(int(match[2]) - start, 2)
        if not second:
            found[f"{match[1]}encoder.layer.{start + pair}.{match[3]}"] = value
        elif not re.match(r"crossattention\.self\.(key|value)\.", match[3]):  # the first one's
            found[f"{match[1]}second.{pair}.{match[3]}"] = value
    return found

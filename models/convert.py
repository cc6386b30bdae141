"""Weights of other projects: released SViTT and Singularity checkpoints, BEiT and BERT.

Everything is a mapping of names (`KeyMap`), and whatever has no counterpart is reported by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svitt_ops.models.configuration import SViTTConfig
from svitt_ops.models.expansion import frames_of_bias_table, resize_bias_table
from svitt_ops.models.svitt import SViTTForPreTraining, SViTTModel
from svitt_ops.models.unpickling import read_tensors

log = logging.getLogger(__name__)

Rules = Sequence[tuple[str, str]]
_LAYER = r"(?:encoder\.layer|layers)\.(\d+)\."
_TABLE = r"relative_position_bias\.relative_position_bias_table"

BEIT: Rules = (
    (r"embeddings\.cls_token", r"video.cls_token"),
    (r"embeddings\.patch_embeddings\.projection\.(.+)", r"video.patches.\1"),
    (_LAYER + r"layernorm_(before|after)\.(.+)", r"video.layers.\1.norm_\2.\3"),
    (
        _LAYER + r"attention\.attention\.(query|key|value)\.(.+)",
        r"video.layers.\1.attention.\2.\3",
    ),
    (_LAYER + r"attention\.q_proj\.(.+)", r"video.layers.\1.attention.query.\2"),
    (_LAYER + r"attention\.k_proj\.(.+)", r"video.layers.\1.attention.key.\2"),
    (_LAYER + r"attention\.v_proj\.(.+)", r"video.layers.\1.attention.value.\2"),
    (
        _LAYER + r"attention\.(?:output\.dense|o_proj)\.(.+)",
        r"video.layers.\1.attention.out.\2",
    ),
    (
        _LAYER + r"(?:attention\.attention\.)?" + _TABLE,
        r"video.layers.\1.attention.bias.table",
    ),
    (_LAYER + r"lambda_1", r"video.layers.\1.add_attention.scale"),
    (_LAYER + r"lambda_2", r"video.layers.\1.add_mlp.scale"),
    (_LAYER + r"(?:intermediate\.dense|mlp\.fc1)\.(.+)", r"video.layers.\1.mlp.up.\2"),
    (_LAYER + r"(?:output\.dense|mlp\.fc2)\.(.+)", r"video.layers.\1.mlp.down.\2"),
    (r"pooler\.layernorm\.(.+)", r"pooler_norm.\1"),
)
"""BEiT's names, those of transformers before and since its version 5; "" drops a name."""
BEIT_DROPPED: Rules = (
    (r".*relative_position_index", ""),
    (r"embeddings\.mask_token", ""),
    (r"(?:classifier|lm_head|layernorm)\..+", ""),
)

BERT: Rules = (
    (r"embeddings\.(word|position|token_type)_embeddings\.weight", r"text.embeddings.\1.weight"),
    (r"embeddings\.LayerNorm\.(.+)", r"text.embeddings.norm.\1"),
    (_LAYER + r"attention\.self\.(\w+)\.(.+)", r"text.layers.\1.attention.\2.\3"),
    (_LAYER + r"attention\.output\.dense\.(.+)", r"text.layers.\1.attention.out.\2"),
    (_LAYER + r"attention\.output\.LayerNorm\.(.+)", r"text.layers.\1.attention_norm.\2"),
    (_LAYER + r"crossattention\.self\.(\w+)\.(.+)", r"text.layers.\1.cross_attention.\2.\3"),
    (_LAYER + r"crossattention\.output\.dense\.(.+)", r"text.layers.\1.cross_attention.out.\2"),
    (_LAYER + r"crossattention\.output\.LayerNorm\.(.+)", r"text.layers.\1.cross_norm.\2"),
    (_LAYER + r"intermediate\.dense\.(.+)", r"text.layers.\1.mlp.up.\2"),
    (_LAYER + r"output\.dense\.(.+)", r"text.layers.\1.mlp.down.\2"),
    (_LAYER + r"output\.LayerNorm\.(.+)", r"text.layers.\1.mlp_norm.\2"),
    (r"cls\.predictions\.transform\.dense\.(.+)", r"token_head.dense.\1"),
    (r"cls\.predictions\.transform\.LayerNorm\.(.+)", r"token_head.norm.\1"),
    (r"cls\.predictions\.bias", r"token_head.bias"),
)
"""BERT's names; layers from the first fusion layer on become the fusion encoder's."""
BERT_DROPPED: Rules = (
    (r"embeddings\.(?:position|token_type)_ids", ""),
    (r"pooler\..+", ""),
    (r"cls\.seq_relationship\..+", ""),
    (
        r"cls\.predictions\.decoder\.(?:weight|bias)",
        "",
    ),  # tied, and the same as cls.predictions.bias
)


def _below(prefix: str, rules: Rules) -> Rules:
    return tuple((prefix + pattern, target) for pattern, target in rules)


OFFICIAL_CHECKPOINT: Rules = (
    *_below(r"vision_encoder\.", (*BEIT, (r".*relative_position_index", ""))),
    *_below(r"text_encoder\.(?:bert\.)?", (*BERT, *BERT_DROPPED)),
    (r"vision_layernorm\.(.+)", r"video_norm.\1"),
    (r"vision_proj\.(.+)", r"video_projection.\1"),
    (r"text_proj\.(.+)", r"text_projection.\1"),
    (r"itm_head\.(.+)", r"match_head.\1"),
    (r"temp", r"temperature"),
)
"""Names in the checkpoints that SViTT's and Singularity's authors released."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What became of a checkpoint's tensors; every name is in one of the lists.

    Attributes:
        loaded: of the checkpoint, and now in the model.
        dropped: of the checkpoint, without need here: buffers, and the tied decoder.
        unknown: of the checkpoint, without a counterpart here.
        missing: of the model, without a tensor in the checkpoint; they keep their values.
        num_frames: frames of the checkpoint's relative position bias; None if it has none.
    """

    loaded: tuple[str, ...]
    dropped: tuple[str, ...]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]
    num_frames: int | None

    def report(self, source: object) -> None:
        """Log a warning that names what is unknown or missing."""
        for what, names in (("no counterpart for", self.unknown), ("nothing for", self.missing)):
            if names:
                log.warning("%s has %s: %s", source, what, ", ".join(names))


def load_official(path: str | Path, config: SViTTConfig | None = None) -> SViTTForPreTraining:
    """A model with the weights of a released SViTT or Singularity checkpoint, for evaluation.

    The file is read without running anything that it contains. Its number of frames is inferred
    from its relative position bias (a Singularity checkpoint has that of one frame) and replaces
    that of the configuration; `expand_frames` leads to another one. Names that are unknown, or
    missing, are reported as a warning.

    Args:
        path: file written by the authors' training code.
        config: of the model; the base model's by default.

    Raises:
        ValueError: the file holds nothing that belongs to such a model, or other shapes.
    """
    tensors = read_tensors(path)
    config = SViTTConfig() if config is None else config
    frames = _frames_of(tensors, OFFICIAL_CHECKPOINT, config)
    if frames is None:
        raise ValueError(
            f"load_official: {path} must have a relative position bias table, got "
            f"{len(tensors)} other tensors: {', '.join(list(tensors)[:5])}, ..."
        )
    model = SViTTForPreTraining(type(config)(**{**config.to_dict(), "num_frames": frames}))
    convert_into(model, tensors, OFFICIAL_CHECKPOINT).report(path)
    return model.eval()


def load_beit(model: SViTTModel, source: str | Path | nn.Module) -> Conversion:
    """Take over a BEiT's weights as the video tower's, its bias inflated to the tower's frames.

    Args:
        model: changed in place.
        source: a transformers' BEiT model, or the folder that holds one.
    """
    if not isinstance(source, nn.Module):
        from transformers import BeitModel

        source = BeitModel.from_pretrained(source, local_files_only=True)
    prefixed = _below(r"(?:beit\.)?", (*BEIT, *BEIT_DROPPED))
    found = convert_into(
        model, _per_layer_bias(source, model), prefixed, parts=("video.", "pooler_")
    )
    found.report("BEiT")
    return found


def load_bert(model: SViTTModel, source: str | Path | nn.Module) -> Conversion:
    """Take over a BERT's weights as those of the text tower, the fusion layers and the MLM head.

    What a BERT has not, attention over the video, keeps its values.

    Args:
        model: changed in place.
        source: a transformers' BERT model, or the folder that holds one.
    """
    if isinstance(source, nn.Module):
        tensors = source.state_dict()
    else:
        from transformers import BertForPreTraining

        read: Any = BertForPreTraining.from_pretrained(
            source, local_files_only=True, output_loading_info=True
        )
        bert, absent = read[0], read[1]["missing_keys"]
        tensors = {name: value for name, value in bert.state_dict().items() if name not in absent}
    prefixed = _below(r"(?:bert\.)?", (*BERT, *BERT_DROPPED))
    found = convert_into(model, tensors, prefixed, parts=("text.", "fusion.", "token_head."))
    expected = tuple(name for name in found.missing if "cross_" not in name)
    Conversion(**{**vars(found), "missing": expected}).report("BERT")
    return found


@torch.no_grad()
def convert_into(
    model: SViTTModel, tensors: Mapping[str, Tensor], rules: Rules, parts: Sequence[str] = ("",)
) -> Conversion:
    """Copy tensors to where rules lead their names.

    Args:
        model: changed in place. Relative position bias is resized to its number of frames.
        tensors: by name.
        rules: patterns of whole names and what they become; "" drops a name.
        parts: beginnings of the model's names that are expected in ``tensors``.

    Raises:
        ValueError: a tensor has another shape than the model's, or two have one target.
    """
    state = model.state_dict()
    loaded: dict[str, str] = {}
    dropped, unknown = [], []
    frames = _frames_of(tensors, rules, model.config)
    for name, value in tensors.items():
        target = _target(name, rules, model.config)
        if target == "":
            dropped.append(name)
            continue
        if target is None or target not in state:
            unknown.append(name)
            continue
        if target in loaded:
            raise ValueError(
                f"convert: {name} must be the only one for {target}, got {loaded[target]}"
            )
        if target.endswith("bias.table"):
            value = resize_bias_table(value, model.config.grid_size, model.config.num_frames)
        shape = state[target].shape
        if target == "temperature":  # a scalar elsewhere
            shape, value = torch.Size(), value.squeeze()
        if value.shape != shape:
            raise ValueError(
                f"convert: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}"
            )
        state[target].copy_(value)
        loaded[target] = name
    expected = (name for name in state if name.startswith(tuple(parts)))
    return Conversion(
        loaded=tuple(loaded.values()),
        dropped=tuple(dropped),
        unknown=tuple(unknown),
        missing=tuple(name for name in expected if name not in loaded),
        num_frames=frames,
    )


def _target(name: str, rules: Rules, config: SViTTConfig) -> str | None:
    """The model's name for another project's name; "" if it is dropped, None if unknown."""
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        target = match.expand(replacement)
        layer = re.match(r"text\.layers\.(\d+)(\..+)", target)
        if layer and int(layer[1]) >= config.fusion_layer:
            return f"fusion.layers.{int(layer[1]) - config.fusion_layer}{layer[2]}"
        return target
    return None


def _frames_of(tensors: Mapping[str, Tensor], rules: Rules, config: SViTTConfig) -> int | None:
    """Frames of the first bias table among the tensors."""
    for name, value in tensors.items():
        if (_target(name, rules, config) or "").endswith("bias.table"):
            return frames_of_bias_table(value.shape[0], config.grid_size)
    return None


def _per_layer_bias(source: nn.Module, model: SViTTModel) -> dict[str, Tensor]:
    """A BEiT's tensors; a bias that its layers share is given to each of them."""
    tensors = {}
    for name, value in source.state_dict().items():
        shared = r"(?:beit\.)?(?:encoder\.relative_position_bias|shared_position_bias)\."
        if re.fullmatch(shared + "relative_position_bias_table", name):
            for layer in range(model.config.num_hidden_layers):
                own = "relative_position_bias.relative_position_bias_table"
                tensors[f"layers.{layer}.{own}"] = value
        else:
            tensors[name] = value
    return tensors

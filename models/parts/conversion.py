"""Weights of other projects: released SViTT and Singularity checkpoints, BEiT and BERT.

Names are mapped by `models/parts/key_maps.py`, and whatever has no counterpart is reported by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from svitt_ops.models.parts.configuration import LOSSES, SViTTConfig
from svitt_ops.models.parts.expansion import bias_table_grids, resize_bias_table
from svitt_ops.models.parts.key_maps import (
    BEIT,
    BEIT_DROPPED,
    BERT,
    BERT_DROPPED,
    OFFICIAL_CHECKPOINT,
    Rules,
    below,
    placed,
    rename,
    renamed,
    sizes,
)
from svitt_ops.models.parts.loading import (
    check_finite,
    check_fixed,
    check_share,
    first_line,
    of_safetensors,
    say_left_out,
    say_missing,
)
from svitt_ops.models.parts.unpickling import read_tensors

if TYPE_CHECKING:
    from svitt_ops.models.svitt.model import SViTTForPreTraining, SViTTModel

log = logging.getLogger(__name__)

RELEASED = {
    "beit": "microsoft/beit-base-patch16-224-pt22k-ft22k",
    "bert": "google-bert/bert-base-uncased",
}
"""What the paper starts from, by type of model."""


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
        """Warn of what is unknown, and of what is missing and what that means."""
        say_left_out(source, self.unknown)
        say_missing(source, self.missing)


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
    from svitt_ops.models.svitt.model import SViTTForPreTraining

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
    frames, _ = _geometry(table, tensors, config.grid_size)
    lost = [
        loss
        for loss, head in (("vtm", "match_head."), ("mlm", "token_head."))
        if not any(name.startswith(head) for name in named)
    ]
    weights = {name: config.loss_weights.get(name, 1) for name in LOSSES}
    changes: dict[str, Any] = {"num_frames": frames}
    if any(weights[name] for name in LOSSES if name not in lost):
        changes["loss_weights"] = weights | dict.fromkeys(lost, 0)
    model = SViTTForPreTraining(type(config)(**{**config.to_dict(), **changes}))
    found = convert_into(model, tensors, OFFICIAL_CHECKPOINT, frames=frames)
    check_share(who, len(found.loaded), len(found.missing), path)
    found.report(path)
    return model.eval()


def load_beit(model: SViTTModel, source: str | Path | nn.Module) -> Conversion:
    """Take over a BEiT's weights as the video tower's, its bias inflated to the tower's frames.

    Bias of another resolution is interpolated to the model's.

    Args:
        model: changed in place.
        source: a transformers' BEiT model, or the folder that holds one.

    Raises:
        ValueError: the folder holds no BEiT, or one of other sizes than the model.
    """
    from transformers import BeitModel

    tensors, heads = _read_transformers(BeitModel, source, "load_beit")
    tensors = _per_layer_bias(tensors, model)
    rules = below(r"(?:beit\.)?", (*BEIT, *BEIT_DROPPED))
    shown = sizes(renamed(tensors, rules)) | {"num_attention_heads": heads}
    check_fixed("load_beit", shown, model.config, _name(source))
    found = convert_into(model, tensors, rules, parts=("video.", "pooler_"), frames=1)
    check_share("load_beit", len(found.loaded), len(found.missing), _name(source))
    found.report("BEiT")
    return found


def load_bert(model: SViTTModel, source: str | Path | nn.Module) -> Conversion:
    """Take over a BERT's weights as those of the text tower, the fusion layers and the MLM head.

    What a BERT has not, attention over the video, keeps its values.

    Args:
        model: changed in place.
        source: a transformers' BERT model, or the folder that holds one.

    Raises:
        ValueError: the folder holds no BERT, or one of other sizes than the model.
    """
    from transformers import BertForPreTraining

    tensors, heads = _read_transformers(BertForPreTraining, source, "load_bert")
    rules = below(r"(?:bert\.)?", (*BERT, *BERT_DROPPED))
    shown = sizes(renamed(tensors, rules)) | {"text_num_attention_heads": heads}
    check_fixed("load_bert", shown, model.config, _name(source))
    found = convert_into(model, tensors, rules, parts=("text.", "fusion.", "token_head."))
    expected = tuple(name for name in found.missing if "cross_" not in name)
    told = replace(found, missing=expected)
    check_share("load_bert", len(told.loaded), len(told.missing), _name(source))
    told.report("BERT")
    return found


@torch.no_grad()
def convert_into(
    model: SViTTModel,
    tensors: Mapping[str, Tensor],
    rules: Rules,
    parts: Sequence[str] = ("",),
    *,
    frames: int | None = None,
) -> Conversion:
    """Copy tensors to where rules lead their names.

    Args:
        model: changed in place. Relative position bias is resized to its frames and its grid.
        tensors: by name.
        rules: patterns of whole names and what they become; "" drops a name.
        parts: beginnings of the model's names that are expected in ``tensors``.
        frames: of the relative position bias among ``tensors``; inferred from its rows by default.

    Raises:
        ValueError: a tensor has another shape than the model's or is not finite, or two have one
            target.
    """
    state, config = model.state_dict(), model.config
    loaded: dict[str, str] = {}
    dropped, unknown = [], []
    source: tuple[int, int] | None = None
    for name, value in tensors.items():
        target = placed(rename(name, rules), config)
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
            source = _geometry(value, tensors, config.grid_size, frames)
            grid = source[1]
            value = resize_bias_table(value, config.grid_size, config.num_frames, source_grid=grid)
        shape = state[target].shape
        if target == "temperature":  # a scalar elsewhere
            shape, value = torch.Size(), value.squeeze()
        if value.shape != shape:
            raise ValueError(
                f"convert: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}"
            )
        check_finite("convert", [(name, value)])
        state[target].copy_(value)
        loaded[target] = name
    if source and source[1] != config.grid_size:
        log.warning(
            "relative position bias is interpolated from %d to %d pixels a side",
            source[1] * config.patch_size,
            config.image_size,
        )
    expected = (name for name in state if name.startswith(tuple(parts)))
    return Conversion(
        loaded=tuple(loaded.values()),
        dropped=tuple(dropped),
        unknown=tuple(unknown),
        missing=tuple(name for name in expected if name not in loaded),
        num_frames=source and source[0],
    )


def _geometry(
    table: Tensor, tensors: Mapping[str, Tensor], grid_size: int, frames: int | None = None
) -> tuple[int, int]:
    """Frames, and patches along a side, that a bias table is for.

    Its rows alone do not tell: 729 are one frame of 14 x 14 patches, or 41 of 2 x 2. The released
    files hold an index beside it, with a row for every patch. Without one, the model's own grid is
    meant where it fits, else the largest that does.
    """
    found = bias_table_grids(table.shape[0]) if table.dim() == 2 else []
    index = next((v for k, v in tensors.items() if k.endswith("relative_position_index")), None)
    if frames is not None:
        found = [(t, g) for t, g in found if t == frames]
    elif index is not None:
        found = [(t, g) for t, g in found if t * g * g + 1 == len(index)] or found
    own = [(t, g) for t, g in found if g == grid_size]
    if not found:
        raise ValueError(
            f"convert: a relative position bias table must be (rows, heads) of "
            f"{frames or 'some'} frames of square pictures, got {tuple(table.shape)}"
        )
    return (own or found)[0]


def _read_transformers(
    kind: Any, source: str | Path | nn.Module, who: str
) -> tuple[dict[str, Tensor], int]:
    """Weights and attention heads of a transformers' model, or of the folder of one."""
    if isinstance(source, nn.Module):
        return source.state_dict(), cast(Any, source).config.num_attention_heads
    wanted = kind.config_class.model_type
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source, local_files_only=True)
        if not raw:
            raise OSError("there is no config.json")
        if raw.get("model_type") != wanted:
            raise ValueError(
                f"{who}: source must be the folder of a model of type {wanted!r}, "
                f"got {raw.get('model_type')!r} in {source}"
            )
        found, info = kind.from_pretrained(source, local_files_only=True, output_loading_info=True)
    except Exception as error:
        if not (isinstance(error, OSError | RuntimeError) or of_safetensors(error)):
            raise
        advice = "" if Path(source).exists() else f"; get one by: hf download {RELEASED[wanted]}"
        raise ValueError(
            f"{who}: source must be the folder of a {wanted} model, with config.json and "
            f"model.safetensors, or the name of a downloaded one, got {str(source)!r} "
            f"({first_line(error)}){advice}"
        ) from error
    tensors = found.state_dict()
    absent = info["missing_keys"]  # they hold random values
    kept = {name: value for name, value in tensors.items() if name not in absent}
    return kept, found.config.num_attention_heads


def _name(source: object) -> object:
    return type(source).__name__ if isinstance(source, nn.Module) else source


def _per_layer_bias(tensors: Mapping[str, Tensor], model: SViTTModel) -> dict[str, Tensor]:
    """A BEiT's tensors; a bias that its layers share is given to each of them."""
    found = {}
    for name, value in tensors.items():
        shared = r"(?:beit\.)?(?:encoder\.relative_position_bias|shared_position_bias)\."
        if re.fullmatch(shared + "relative_position_bias_table", name):
            for layer in range(model.config.num_hidden_layers):
                own = "relative_position_bias.relative_position_bias_table"
                found[f"layers.{layer}.{own}"] = value
        else:
            found[name] = value
    return found

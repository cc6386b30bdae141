"""Weights of other projects, in a model of two towers: copied by name, and those of BEiT and BERT.

Whatever has no counterpart is reported by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from svitt_ops.models.parts.expansion import bias_table_grids, resize_bias_table
from svitt_ops.models.parts.key_maps import (
    BEIT,
    BEIT_DROPPED,
    BERT,
    BERT_DROPPED,
    VIT,
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
from svitt_ops.models.parts.resolution import resize_places
from svitt_ops.models.parts.two_towers import TwoTowers

log = logging.getLogger(__name__)

RELEASED = {
    "beit": "microsoft/beit-base-patch16-224-pt22k-ft22k",
    "bert": "google-bert/bert-base-uncased",
    "clip_vision_model": "openai/clip-vit-base-patch16",
    "roberta": "FacebookAI/roberta-base",
    "vit": "facebook/deit-base-patch16-224",
    "resnet": "microsoft/resnet-50",
}
"""What the papers start from, by type of model."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What became of a checkpoint's tensors; every name is in one of the lists.

    Attributes:
        loaded: of the checkpoint, and now in the model.
        dropped: of the checkpoint, without need here: buffers, and the tied decoder.
        unknown: of the checkpoint, without a counterpart here.
        missing: of the model, without a tensor in the checkpoint; they keep their values, but for
            an answer decoder, which starts from the fusion layers.
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


def load_beit(model: TwoTowers, source: str | Path | nn.Module) -> Conversion:
    """Take over a BEiT's weights as the video tower's, its bias inflated to the tower's frames.

    Bias of another resolution is interpolated to the model's.

    Args:
        model: changed in place.
        source: a transformers' BEiT model, or the folder that holds one.

    Raises:
        ValueError: the folder holds no BEiT, or one of other sizes than the model.
    """
    from transformers import BeitModel

    tensors, heads = read_transformers(BeitModel, source, "load_beit")
    tensors = _per_layer_bias(tensors, model)
    rules = below(r"(?:beit\.)?", (*BEIT, *BEIT_DROPPED))
    shown = sizes(renamed(tensors, rules)) | {"num_attention_heads": heads}
    check_fixed("load_beit", shown, model.config, name_of(source))
    found = convert_into(model, tensors, rules, parts=("video.", "pooler_"), frames=1)
    check_share("load_beit", len(found.loaded), len(found.missing), name_of(source))
    found.report("BEiT")
    return found


def load_vit(model: TwoTowers, source: str | Path | nn.Module) -> Conversion:
    """Take over the weights of a ViT or DeiT as those of an image tower with absolute positions.

    Positions of another resolution are interpolated to the model's. A mask token keeps its values.

    Args:
        model: changed in place; its tower has absolute positions, and one frame.
        source: a transformers' ViT model, which DeiT without distillation is, or the folder of one.

    Raises:
        ValueError: the folder holds no ViT, or one of other sizes than the model.
    """
    from transformers import ViTModel

    tensors, heads = read_transformers(ViTModel, source, "load_vit")
    found = {name.removeprefix("vit."): value for name, value in tensors.items()}
    places = found.pop("embeddings.position_embeddings")
    found["cls_position"] = places[:, :1]
    found["patch_positions"] = resize_places(places[:, 1:], model.config.grid_size)
    own = ("cls_position", "patch_positions")
    rules: Rules = (
        *(rule for rule in VIT if rule[0] in own),
        (r"layernorm\.(.+)", r"video_norm.\1"),
        (r"pooler\..+", ""),
        *BEIT,
        *BEIT_DROPPED,
    )
    shown = sizes(renamed(found, rules)) | {"num_attention_heads": heads}
    check_fixed("load_vit", shown, model.config, name_of(source))
    loaded = convert_into(model, found, rules, parts=("video.", "video_norm."))
    told = replace(loaded, missing=tuple(x for x in loaded.missing if x != "video.mask_token"))
    check_share("load_vit", len(told.loaded), len(told.missing), name_of(source))
    told.report("ViT")
    return told


def load_bert(model: TwoTowers, source: str | Path | nn.Module) -> Conversion:
    """Take over a BERT's weights as those of the text tower, the fusion layers and the MLM head.

    What a BERT has not, attention over the video, keeps its values. An answer decoder starts from
    the fusion layers.

    Args:
        model: changed in place.
        source: a transformers' BERT model, or the folder that holds one.

    Raises:
        ValueError: the folder holds no BERT, or one of other sizes than the model.
    """
    from transformers import BertForPreTraining

    tensors, heads = read_transformers(BertForPreTraining, source, "load_bert")
    rules = below(r"(?:bert\.)?", (*BERT, *BERT_DROPPED))
    shown = sizes(renamed(tensors, rules)) | {"text_num_attention_heads": heads}
    check_fixed("load_bert", shown, model.config, name_of(source))
    found = convert_into(
        model, tensors, rules, parts=("text.", "fusion.", "token_head.", "decoder.")
    )
    expected = tuple(name for name in found.missing if "cross_" not in name)
    told = replace(found, missing=expected)
    check_share("load_bert", len(told.loaded), len(told.missing), name_of(source))
    told.report("BERT")
    return found


@torch.no_grad()
def convert_into(
    model: TwoTowers,
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
            source = bias_geometry(value, tensors, config.grid_size, frames)
            grid = source[1]
            value = resize_bias_table(
                value, config.grid_size, config.tower_frames, source_grid=grid
            )
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
    missing = model.start_missing([name for name in state if name not in loaded])
    return Conversion(
        loaded=tuple(loaded.values()),
        dropped=tuple(dropped),
        unknown=tuple(unknown),
        missing=tuple(name for name in missing if name.startswith(tuple(parts))),
        num_frames=source and source[0],
    )


def bias_geometry(
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


def read_transformers(
    kind: Any, source: str | Path | nn.Module, who: str, *, whole: str | None = None
) -> tuple[dict[str, Tensor], int]:
    """Weights and attention heads, if any, of a transformers' model, or of the folder of one.

    Args:
        kind: class of the model.
        source: the model, or the folder.
        who: asks, in messages.
        whole: type of models of which this one is a part, in whose folders it is found too.
    """
    if isinstance(source, nn.Module):
        return source.state_dict(), getattr(source.config, "num_attention_heads", 0)
    wanted = kind.config_class.model_type
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source, local_files_only=True)
        if not raw:
            raise OSError("there is no config.json")
        if raw.get("model_type") not in (wanted, whole or wanted):
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
    return kept, getattr(found.config, "num_attention_heads", 0)


def name_of(source: object) -> object:
    """A source of weights, as messages have it."""
    return type(source).__name__ if isinstance(source, nn.Module) else source


def _per_layer_bias(tensors: Mapping[str, Tensor], model: TwoTowers) -> dict[str, Tensor]:
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

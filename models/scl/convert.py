"""Weights of others: what SCL's authors released, CLIP's image tower, and RoBERTa."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from svitt_ops.models.parts.conversion import (
    Conversion,
    convert_into,
    name_of,
    read_transformers,
)
from svitt_ops.models.parts.key_maps import BERT, BERT_DROPPED, Rules, below, renamed, sizes
from svitt_ops.models.parts.loading import check_fixed, check_share
from svitt_ops.models.parts.released import load_into_kind
from svitt_ops.models.parts.resolution import resize_places
from svitt_ops.models.parts.unpickling import read_tensors
from svitt_ops.models.scl.classification import SCLForQuestionAnswering, SCLForVisualReasoning
from svitt_ops.models.scl.configuration import SCLConfig
from svitt_ops.models.scl.model import SCLForPreTraining, SCLForRetrieval, SCLModel

TASKS: dict[str, type[Any]] = {
    "pretraining": SCLForPreTraining,
    "retrieval": SCLForRetrieval,
    "question_answering": SCLForQuestionAnswering,
    "visual_reasoning": SCLForVisualReasoning,
}
"""Models by what they are for."""
_BLOCK = r"transformer\.resblocks\.(\d+)\."
OPENAI: Rules = (
    (r"conv1\.weight", "video.patches.weight"),
    (r"class_embedding", "video.cls_token"),
    (r"cls_position", "video.cls_position"),
    (r"patch_positions", "video.patch_positions"),
    (r"temporal_embed", "video.frame_positions"),
    (r"ln_pre\.(.+)", r"video.norm.\1"),
    (r"ln_post\.(.+)", r"video_norm.\1"),
    (_BLOCK + r"ln_1\.(.+)", r"video.layers.\1.norm_before.\2"),
    (_BLOCK + r"ln_2\.(.+)", r"video.layers.\1.norm_after.\2"),
    (_BLOCK + r"attn\.(query|key|value)\.(.+)", r"video.layers.\1.attention.\2.\3"),
    (_BLOCK + r"attn\.out_proj\.(.+)", r"video.layers.\1.attention.out.\2"),
    (_BLOCK + r"mlp\.c_fc\.(.+)", r"video.layers.\1.mlp.up.\2"),
    (_BLOCK + r"mlp\.c_proj\.(.+)", r"video.layers.\1.mlp.down.\2"),
    (r"(?:proj|visual_mask_token)", ""),
)
"""OpenAI's names of CLIP's image tower, after `unpack`; "" drops a name."""
CLIP: Rules = (
    (r"embeddings\.patch_embedding\.weight", "conv1.weight"),
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"pre_layrnorm\.(.+)", r"ln_pre.\1"),  # as it is spelled there
    (r"post_layernorm\.(.+)", r"ln_post.\1"),
    (r"encoder\.layers\.(\d+)\.layer_norm(\d)\.(.+)", r"transformer.resblocks.\1.ln_\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(.+)", r"transformer.resblocks.\1.attn.query.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.k_proj\.(.+)", r"transformer.resblocks.\1.attn.key.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.v_proj\.(.+)", r"transformer.resblocks.\1.attn.value.\2"),
    (
        r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(.+)",
        r"transformer.resblocks.\1.attn.out_proj.\2",
    ),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.(.+)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.(.+)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
)
"""Transformers' names of the same, as OpenAI has them."""
VIDEO_STREAM: Rules = tuple(
    (
        name.replace(r"(?:encoder\.layer|layers)", r"cross_modal_image_layers"),
        target.replace("text.layers", "fusion.video_layers"),
    )
    for name, target in BERT
    if target.startswith("text.layers.")
)
CLASSIFIERS = {"question_answering": "vqa_classifier", "visual_reasoning": "nlvr2_classifier"}
"""The authors' names of the class heads of tasks."""
RULES: Rules = (
    *below(r"vision_transformer\.visual\.", OPENAI),
    (r"vision_transformer\.(?!visual\.).+", ""),  # a decoder of pixels, and CLIP's texts
    *below(r"text_transformer\.", (*BERT, *BERT_DROPPED)),
    *VIDEO_STREAM,
    (r"cross_modal_text_transform\.(.+)", r"fusion.text_transform.\1"),
    (r"cross_modal_image_transform\.(.+)", r"fusion.video_transform.\1"),
    (r"cross_modal_text_pooler\.dense\.(.+)", r"fusion.text_pooler.\1"),
    (r"cross_modal_image_pooler\.dense\.(.+)", r"fusion.video_pooler.\1"),
    (r"token_types", "types.weight"),
    (r"second_type", "second_type"),
    (r"cl_temp", "temperature"),
    (r"itm_score\.fc\.(.+)", r"match_head.\1"),
    (r"rank_output\.(.+)", r"rank_head.\1"),
    (r"mlm_score\.transform\.dense\.(.+)", r"token_head.dense.\1"),
    (r"mlm_score\.transform\.LayerNorm\.(.+)", r"token_head.norm.\1"),
    (r"mlm_score\.decoder\.(.+)", r"token_head.decoder.\1"),
    (r"mlm_score\.bias", "token_head.decoder.bias"),
)
"""Names of what models for several tasks have, after `unpack`."""
POSITION = "embeddings.position_embeddings.weight"
RESERVED = 2
"""Rows of RoBERTa's table of positions that no token but padding has; texts begin behind them."""


def load_official(
    source: str | Path | Mapping[str, Any],
    config: SCLConfig | None = None,
    *,
    task: str = "pretraining",
    compat: str | None = None,
) -> Any:
    """A model with the weights of a released SCL checkpoint, for evaluation.

    A file is read without running anything that it contains. Positions of another resolution are
    interpolated to the configuration's. From a checkpoint of pretraining, the rank head of
    retrieval starts from the match head, and the type of a second image from that of images. Names
    that are unknown, or missing, are reported as a warning, and a loss whose head is missing gets
    weight 0.

    Args:
        source: file written by the authors' training code, or the tensors in it by name.
        config: of the model; the base model's by default. For question answering it lists the
            answers, in the order of the file's classes.
        task: what the model is for: "pretraining", "retrieval", "question_answering" or
            "visual_reasoning"; the checkpoint may be that of another task.
        compat: that of the configuration, if it is to be another one.

    Returns:
        The system's model for that task.

    Raises:
        ValueError: the source holds nothing that belongs to such a model, another field of the
            configuration is not that of the source, or a tensor is not finite.
    """
    who = "load_official"
    config = SCLConfig() if config is None else config
    if task not in TASKS:
        raise ValueError(f"{who}: task must be one of {', '.join(TASKS)}, got {task!r}")
    tensors = read_tensors(source)
    name = "the mapping" if isinstance(source, Mapping) else source
    places = "vision_transformer.visual.positional_embedding"
    if places not in tensors:
        raise ValueError(f"{who}: {name} must have {places}, got {len(tensors)} other tensors")
    return load_into_kind(
        TASKS[task], config, unpack(tensors, config), rules_of(task), {}, name=name, compat=compat
    )


def rules_of(task: str) -> Rules:
    """Names in these checkpoints, after `unpack`, and where they lead to in a task's model."""
    heads = {"vision_proj": "video_projection", "language_proj": "text_projection"}
    if task in CLASSIFIERS:
        heads[CLASSIFIERS[task]] = "class_head"
    return (
        *RULES,
        *(
            (rf"{name}\.{place}\.(.+)", rf"{target}.{part}.\1")
            for name, target in heads.items()
            for place, part in ((0, "dense"), (1, "norm"), (3, "out"))
        ),
    )


def load_clip(model: SCLModel, source: str | Path | nn.Module | Mapping[str, Tensor]) -> Conversion:
    """Take over the weights of CLIP's image tower, without its last blocks if the model has fewer.

    Positions of another resolution are interpolated to the model's.

    Args:
        model: changed in place.
        source: a transformers' CLIP vision model, the folder that holds a CLIP, or tensors under
            OpenAI's names, ``visual....``.

    Raises:
        ValueError: the folder holds no CLIP, or one of other sizes or fewer blocks than the model.
    """
    who, config = "load_clip", model.config
    shown: dict[str, int] = {}
    if isinstance(source, Mapping):
        found = {k.removeprefix("visual."): x for k, x in source.items() if k.startswith("visual.")}
        told: object = "the mapping"
    else:
        from transformers import CLIPVisionModel

        tensors, heads = read_transformers(CLIPVisionModel, source, who, whole="clip")
        found = renamed(
            {name.removeprefix("vision_model."): value for name, value in tensors.items()}, CLIP
        )
        shown["num_attention_heads"], told = heads, name_of(source)
    if "positional_embedding" not in found:
        raise ValueError(
            f"{who}: {told} must hold CLIP's image tower, got {len(found)} of its tensors"
        )
    found = _of_tower(found, config)
    blocks = {int(m[1]) for name in found if (m := re.match(_BLOCK, name))}
    spare = sorted(k for k in blocks if k >= config.num_hidden_layers)
    rules: Rules = (*((rf"transformer\.resblocks\.{k}\..+", "") for k in spare), *OPENAI)
    check_fixed(who, sizes(renamed(found, rules)) | shown, config, told)
    loaded = convert_into(model, found, rules, parts=("video.", "video_norm."))
    missing = tuple(x for x in loaded.missing if x != "video.frame_positions")
    loaded = replace(loaded, missing=missing)
    check_share(who, len(loaded.loaded), len(loaded.missing), told)
    loaded.report("CLIP")
    return loaded


def load_roberta(model: SCLModel, source: str | Path | nn.Module) -> Conversion:
    """Take over a RoBERTa's weights as those of the text tower.

    The fusion streams keep their values.

    Args:
        model: changed in place.
        source: a transformers' RoBERTa model, or the folder that holds one.

    Raises:
        ValueError: the folder holds no RoBERTa, or one of other sizes than the model.
    """
    from transformers import RobertaModel

    who = "load_roberta"
    tensors, heads = read_transformers(RobertaModel, source, who)
    found = {name.removeprefix("roberta."): value for name, value in tensors.items()}
    if POSITION not in found:
        raise ValueError(
            f"{who}: {name_of(source)} must hold a RoBERTa, got {len(found)} tensors without "
            f"{POSITION}"
        )
    found[POSITION] = _rows(POSITION, found[POSITION])[RESERVED:]
    rules: Rules = (*BERT, *BERT_DROPPED, (r"lm_head\..+", ""))
    shown = sizes(renamed(found, rules)) | {"text_num_attention_heads": heads}
    shown["fusion_layer"] = shown.pop("text_num_hidden_layers", 0)
    check_fixed(who, shown, model.config, name_of(source))
    loaded = convert_into(model, found, rules, parts=("text.",))
    check_share(who, len(loaded.loaded), len(loaded.missing), name_of(source))
    loaded.report("RoBERTa")
    return loaded


def unpack(tensors: Mapping[str, Tensor], config: SCLConfig) -> dict[str, Tensor]:
    """The authors' tensors in the model's shapes, under names that `rules_of` has."""
    found = {}
    for name, value in _of_tower(tensors, config).items():
        if layer := re.match(r"cross_modal_text_layers\.(\d+)\.(.+)", name):
            number = config.fusion_layer + int(layer[1])
            found[f"text_transformer.encoder.layer.{number}.{layer[2]}"] = value
        elif name == f"text_transformer.{POSITION}":
            found[name] = _rows(name, value)[RESERVED:]
        elif name == "token_type_embeddings.weight":
            found["token_types"] = _rows(name, value)[:2]
            if len(value) > 2:
                found["second_type"] = value[2:3]
        else:
            found[name] = value
    return found


def _of_tower(tensors: Mapping[str, Tensor], config: SCLConfig) -> dict[str, Tensor]:
    """The tensors with projections one by one, and [CLS] and positions in the tower's shapes."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        before, dot, last = name.rpartition(".")
        start = before + dot
        if match := re.fullmatch(r"in_proj_(weight|bias)", last):
            if not value.dim() or not len(value) or len(value) % 3:
                raise ValueError(
                    f"convert: {name} must have rows of queries, keys and values, got "
                    f"{tuple(value.shape)}"
                )
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            found |= {f"{start}{part}.{match[1]}": x.contiguous() for part, x in parts}
        elif last == "positional_embedding":
            value = _rows(name, value)
            found[f"{start}cls_position"] = value[None, :1]
            found[f"{start}patch_positions"] = resize_places(value[None, 1:], config.grid_size)
        elif last == "class_embedding":
            found[name] = value.view(1, 1, -1)
        else:
            found[name] = value.squeeze(0) if last == "temporal_embed" else value
    return found


def _rows(name: str, table: Tensor) -> Tensor:
    """A table of embeddings as it is; a ValueError if it is none."""
    if table.dim() != 2:
        raise ValueError(f"convert: {name} must have shape (rows, dim), got {tuple(table.shape)}")
    return table

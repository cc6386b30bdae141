"""Other projects' names of weights and what they are here; what sizes the weights show.

Names are mapped by lists of patterns (`Rules`): the first that matches a whole name counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from svitt_ops.models.parts.configuration import TwoTowersConfig

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
DECODER: Rules = tuple((name, re.sub(r"^text\.", "decoder.", target)) for name, target in BERT)
"""The same names in an answer decoder."""
BERT_DROPPED: Rules = (
    (r"embeddings\.(?:position|token_type)_ids", ""),
    (r"pooler\..+", ""),
    (r"cls\.seq_relationship\..+", ""),
    (
        r"cls\.predictions\.decoder\.(?:weight|bias)",
        "",
    ),  # tied, and the same as cls.predictions.bias
)
_BLOCK = r"blocks\.(\d+)\."

VIT: Rules = (
    (r"cls_token", r"video.cls_token"),
    (r"cls_position", r"video.cls_position"),
    (r"patch_positions", r"video.patch_positions"),
    (r"mask_token", r"video.mask_token"),
    (r"patch_embed\.proj\.(.+)", r"video.patches.\1"),
    (_BLOCK + r"norm1\.(.+)", r"video.layers.\1.norm_before.\2"),
    (_BLOCK + r"norm2\.(.+)", r"video.layers.\1.norm_after.\2"),
    (_BLOCK + r"attn\.(query|key|value)\.(.+)", r"video.layers.\1.attention.\2.\3"),
    (_BLOCK + r"attn\.proj\.(.+)", r"video.layers.\1.attention.out.\2"),
    (_BLOCK + r"mlp\.fc1\.(.+)", r"video.layers.\1.mlp.up.\2"),
    (_BLOCK + r"mlp\.fc2\.(.+)", r"video.layers.\1.mlp.down.\2"),
    (r"norm\.(.+)", r"video_norm.\1"),
)
"""timm's names of a ViT, after `split_projections`."""


def split_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with every packed projection (`qkv`) as those of query, key and value."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if ".qkv." in name:
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            found |= {name.replace("qkv", part): x.contiguous() for part, x in parts}
        else:
            found[name] = value
    return found


def below(prefix: str, rules: Rules) -> Rules:
    """The rules for names that a prefix, itself a pattern, stands before."""
    return tuple((prefix + pattern, target) for pattern, target in rules)


SIZES = (
    ("patch_size", "video.patches.weight", -1),
    ("hidden_size", "video.patches.weight", 0),
    ("num_attention_heads", "video.layers.0.attention.bias.table", 1),
    ("intermediate_size", "video.layers.0.mlp.up.weight", 0),
    ("vocab_size", "text.embeddings.word.weight", 0),
    ("text_hidden_size", "text.embeddings.word.weight", 1),
    ("text_intermediate_size", "text.layers.0.mlp.up.weight", 0),
    ("max_position_embeddings", "text.embeddings.position.weight", 0),
    ("type_vocab_size", "text.embeddings.token_type.weight", 0),
    ("projection_dim", "text_projection.weight", 0),
    ("projection_dim", "text_projection.out.weight", 0),
)
"""Where weights show a field of the configuration: in a dimension of which of them."""


def rename(name: str, rules: Rules) -> str | None:
    """What rules make of a name; "" if it is dropped, None if it is unknown."""
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(replacement)
    return None


def placed(target: str | None, config: TwoTowersConfig) -> str | None:
    """The model's name; text layers from the first fusion layer on are the fusion encoder's."""
    layer = re.match(r"(teacher\.)?text\.layers\.(\d+)(\..+)", target or "")
    if layer and int(layer[2]) >= config.fusion_layer:
        number = int(layer[2]) - config.fusion_layer
        return f"{layer[1] or ''}fusion.layers.{number}{layer[3]}"
    return target


def renamed(tensors: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """The tensors that rules have a name for, by it."""
    return {new: value for name, value in tensors.items() if (new := rename(name, rules))}


def sizes(named: Mapping[str, Tensor]) -> dict[str, int]:
    """Fields of the configuration that weights show, by their names here."""
    found = {
        field: named[name].shape[dim]
        for field, name, dim in SIZES
        if name in named and named[name].dim() > max(dim, 0)
    }
    for field, pattern, choose in (
        ("num_hidden_layers", r"video\.layers\.(\d+)\..+", lambda layers: max(layers) + 1),
        ("text_num_hidden_layers", r"text\.layers\.(\d+)\..+", lambda layers: max(layers) + 1),
        ("fusion_layer", r"text\.layers\.(\d+)\.cross_.+", min),
        ("decoder_layers", r"decoder\.layers\.(\d+)\..+", lambda layers: max(layers) + 1),
    ):
        layers = [int(match[1]) for name in named if (match := re.fullmatch(pattern, name))]
        if layers:
            found[field] = choose(layers)
    return found

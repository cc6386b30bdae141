"""The smallest SViTT that has everything."""

from typing import Any

SVITT: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "num_frames": 2,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "block_size": 2,
    "prune_layers": [],
    "multimodal_prune_layers": [],
    "vocab_size": 60,
    "text_hidden_size": 16,
    "text_num_hidden_layers": 2,
    "fusion_layer": 1,
    "text_num_attention_heads": 2,
    "text_intermediate_size": 32,
    "projection_dim": 8,
}

"""Sparse video-text transformers: definitions and losses over `svitt_ops`."""

from svitt_ops.models import convert, old_weights
from svitt_ops.models.configuration import FrozenConfig, SViTTConfig
from svitt_ops.models.expansion import change_image_size, expand_frames
from svitt_ops.models.frozen import FrozenForRetrieval
from svitt_ops.models.outputs import (
    FusionOutput,
    SViTTPreTrainingOutput,
    TextOutput,
    VideoOutput,
)
from svitt_ops.models.sparsity import EdgeCount, SparsityRow, edge_count, sparsity_table
from svitt_ops.models.svitt import SViTTForPreTraining, SViTTModel
from svitt_ops.models.token_order import token_order

old_weights.register()

__all__ = [
    "EdgeCount",
    "FrozenConfig",
    "FrozenForRetrieval",
    "FusionOutput",
    "SViTTConfig",
    "SViTTForPreTraining",
    "SViTTModel",
    "SViTTPreTrainingOutput",
    "SparsityRow",
    "TextOutput",
    "VideoOutput",
    "change_image_size",
    "convert",
    "edge_count",
    "expand_frames",
    "sparsity_table",
    "token_order",
]

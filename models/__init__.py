"""Sparse video-text transformers: definitions and losses over `svitt_ops`."""

from svitt_ops.models import convert
from svitt_ops.models.frozen.configuration import FrozenConfig
from svitt_ops.models.frozen.model import FrozenForRetrieval
from svitt_ops.models.parts.expansion import change_image_size, expand_frames
from svitt_ops.models.parts.outputs import FusionOutput, TextOutput, VideoOutput
from svitt_ops.models.parts.outputs import PreTrainingOutput as SViTTPreTrainingOutput
from svitt_ops.models.parts.token_order import token_order
from svitt_ops.models.svitt.configuration import SViTTConfig
from svitt_ops.models.svitt.model import SViTTForPreTraining, SViTTModel
from svitt_ops.models.svitt.sparsity import EdgeCount, SparsityRow, edge_count, sparsity_table

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

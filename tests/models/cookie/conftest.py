"""A small COOKIE."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from svitt_ops.models import COOKIEConfig

SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "cnn_depths": [1, 2],
    "cnn_sizes": [16, 32],
    "cnn_stem": 8,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "projection_dim": 32,
    "text_hidden_size": 16,
    "text_num_attention_heads": 2,
    "text_num_hidden_layers": 2,
    "fusion_layer": 2,
    "text_intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 20,
    "hash_bits": 16,
    "hash_classes": 12,
}
Make = Callable[..., COOKIEConfig]


@pytest.fixture
def make() -> Make:
    """`make(**changes)`: a small configuration."""
    return lambda **changes: COOKIEConfig(**{**SMALL, **changes})


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Four pairs, and two views of each."""
    torch.manual_seed(0)
    ids = torch.randint(1, 50, (4, 3, 7))
    mask = torch.ones_like(ids)
    mask[1, :, 5:] = 0
    pixels = torch.randn(4, 3, 3, 32, 32)
    return {
        "pixel_values": pixels[:, 0],
        "input_ids": ids[:, 0],
        "attention_mask": mask[:, 0],
        "pair_ids": torch.arange(4),
        "view_pixel_values": pixels[:, 1:],
        "view_input_ids": ids[:, 1:],
        "view_attention_mask": mask[:, 1:],
    }

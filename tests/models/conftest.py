"""A small model, and batches for it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parent))

from svitt_ops.models import SViTTConfig

TINY: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 4,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "drop_path_rate": 0.0,
    "bias_init_std": 0.5,
    "block_size": 8,
    "num_random": 2,
    "prune_layers": [0, 1],
    "multimodal_keep_rate": 0.5,
    "multimodal_prune_layers": [0],
    "vocab_size": 50,
    "text_hidden_size": 24,
    "text_num_hidden_layers": 4,
    "fusion_layer": 2,
    "text_num_attention_heads": 3,
    "text_intermediate_size": 40,
    "max_position_embeddings": 16,
    "projection_dim": 12,
}
MakeConfig = Callable[..., SViTTConfig]


@pytest.fixture
def make_config() -> MakeConfig:
    """The small configuration, with changes."""
    return lambda **changes: SViTTConfig(**{**TINY, **changes})


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three pairs of a clip and a text; the texts are of 6, 4 and 5 tokens."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:], mask[2, 5:] = 0, 0
    ids = torch.randint(1, 50, (3, 6), generator=generator) * mask
    labels = torch.full((3, 6), -100)
    labels[:, 2] = ids[:, 2]
    masked = ids.clone()
    masked[:, 2] = 3
    return {
        "pixel_values": torch.randn(3, 4, 3, 32, 32, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "pair_ids": torch.arange(3),
        "mlm_input_ids": masked,
        "mlm_labels": labels,
    }


@pytest.fixture
def pairs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same pairs with a picture, the first frame, instead of a clip."""
    return {**batch, "pixel_values": batch["pixel_values"][:, 0]}

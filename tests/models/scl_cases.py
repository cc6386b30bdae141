"""Arrays and weights of SCL's authors' code, and models with these weights."""

import json
from functools import cache
from typing import Any

import numpy as np
import torch
from golden_cases import FOLDER
from torch import Tensor

from svitt_ops.models.parts.key_maps import placed, rename
from svitt_ops.models.scl.configuration import SCLConfig
from svitt_ops.models.scl.convert import load_official, rules_of, unpack

TOLERANCE = 1e-4
GRADIENTS = 1e-3
MASK = 50264
"""RoBERTa's id of its mask; the small table has its row at the end."""
WEIGHTS = ("vision", "text", "fusion_text", "fusion_image", "heads")
FIELDS: dict[str, Any] = {
    "image_size": 24,
    "patch_size": 6,
    "image_mean": [0.5] * 3,  # the cases hold what the tower gets
    "image_std": [0.5] * 3,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 97,
    "text_hidden_size": 32,
    "text_num_hidden_layers": 4,
    "fusion_layer": 2,
    "text_num_attention_heads": 2,
    "text_intermediate_size": 64,
    "fusion_intermediate_size": 128,
    "max_position_embeddings": 12,
}


@cache
def arrays(name: str) -> dict[str, Tensor]:
    """What a file holds."""
    with np.load(FOLDER / "scl" / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@cache
def description() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "scl" / "case.json").read_text())
    return found


def state(*, clips: bool = False) -> dict[str, Tensor]:
    """Weights by the authors' names, of images or of clips."""
    parts = [f"weights_{part}" for part in WEIGHTS]
    parts += ["weights_vision_video_extra"] if clips else []
    return {name: value for part in parts for name, value in arrays(part).items()}


def model(task: str = "pretraining", *, clips: bool = False, **changes: Any) -> Any:
    """Loaded as the authors' file is; of one, or of three frames."""
    fields = FIELDS | ({"num_frames": 3} if clips else {}) | changes
    return load_official({"state_dict": state(clips=clips)}, SCLConfig(**fields), task=task)


def texts(name: str = "text_ids", case: str = "text") -> Tensor:
    """Token ids of a case, the mask's among those of the small table."""
    ids = arrays(case)[name]
    return torch.where(ids == MASK, FIELDS["vocab_size"] - 1, ids)


def close(found: Tensor, wanted: Tensor, what: str = "", tolerance: float = TOLERANCE) -> None:
    assert found.shape == wanted.shape, what
    assert (found.detach() - wanted).abs().max() <= tolerance * wanted.abs().max(), what


def gradients_close(found: Any, case: str, prefix: str = "grad/", task: str = "pretraining") -> int:
    """Compare the gradients that a case has, by the authors' names; returns how many."""
    count = 0
    for key, wanted in arrays(case).items():
        if not key.startswith(prefix):
            continue
        for name, part in unpack({key.removeprefix(prefix): wanted}, found.config).items():
            target = placed(rename(name, rules_of(task)), found.config)
            if target not in found.state_dict():
                continue
            grad = found.get_parameter(target).grad
            grad = torch.zeros_like(part) if grad is None else grad
            assert grad.numel() == part.numel(), key
            worst = (grad.view_as(part) - part).abs().max()
            assert worst <= GRADIENTS * wanted.abs().max(), (key, name)
            count += 1
    return count

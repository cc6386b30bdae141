"""Inputs, weights and results of the authors' own code, and models with these weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import svitt_ops as so
from svitt_ops.models import SViTTConfig
from svitt_ops.models.parts.key_maps import placed, rename
from svitt_ops.models.parts import pairs
from svitt_ops.models.svitt import load_official
from svitt_ops.models.parts.released import OFFICIAL_CHECKPOINT

FOLDER = Path(__file__).parents[1] / "golden"
OFFICIAL = "svitt-official"


class Case:
    """Arrays as tensors, weights by the authors' names, and the description."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = {key: torch.from_numpy(file[key]) for key in file}
        self.meta: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def state(self) -> dict[str, Tensor]:
        flat, tensors = self.arrays["state"], {}
        for name, (offset, shape) in self.meta["state"].items():
            value = flat[offset : offset + int(np.prod(shape))].reshape(shape)
            tensors[name] = value.long() if name in self.meta["state_int64"] else value
        return tensors

    def config(self, **changes: Any) -> SViTTConfig:
        given = self.meta["config"]
        vision, text, sparse = given["vision"], given["text"], given.get("sparse")
        values = {
            "image_size": given["image_size"],
            "patch_size": given["patch_size"],
            "num_frames": given["num_frames"],
            "hidden_size": vision["width"],
            "num_attention_heads": vision["heads"],
            "num_hidden_layers": vision["layers"],
            "intermediate_size": vision["intermediate"],
            "drop_path_rate": 0.0,
            "text_hidden_size": text["width"],
            "text_num_attention_heads": text["heads"],
            "text_num_hidden_layers": text["layers"],
            "fusion_layer": text["fusion_layer"],
            "text_intermediate_size": text["intermediate"],
            "vocab_size": text["vocab"],
            "max_position_embeddings": text["max_positions"],
            "projection_dim": given["embed_dim"],
            "multimodal_keep_rate": 1.0,
            "multimodal_prune_layers": [],
        }
        if sparse:
            values |= {name: sparse[name] for name in ("block_size", "num_local", "num_random")}
            values |= {name: sparse[name] for name in ("keep_rate", "prune_layers")}
        else:
            values |= {"edge_sparsity": False, "keep_rate": 1.0, "prune_layers": []}
        return SViTTConfig(**{**values, **changes})

    def model(self, task: str = "pretraining", **changes: Any) -> Any:
        """Loaded as the authors' file is, with the case's patterns if it has any."""
        found = load_official({"model": self.state()}, self.config(**changes), task=task)
        if "choice/blocks/0" in self.arrays:
            hand_over_patterns(found, self)
        return found

    def close(self, found: Tensor, key: str, tolerance: float = 2e-5) -> None:
        wanted = self[key].to(found.dtype)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), key

    def gradients_close(self, found: Any, prefix: str = "grad/", tolerance: float = 1e-4) -> int:
        """Compare the gradients that the case has, by the authors' names; returns how many."""
        count = 0
        for key in self.arrays:
            name = key.removeprefix(prefix)
            target = placed(rename(name, OFFICIAL_CHECKPOINT), found.config)
            if key.startswith(prefix) and target:
                grad = found.get_parameter(target).grad
                self.close(grad[0] if target == "temperature" else grad, key, tolerance)
                count += 1
        return count


def hand_over_patterns(found: Any, case: Case) -> None:
    """Make the video tower take the case's blocks."""
    tower, layer = found.video, [0]

    def layout(count: int, device: Any, generator: Any) -> so.BlockLayout:
        mask = case[f"choice/blocks/{layer[0] % len(tower.layers)}"].bool()
        layer[0] += 1
        size = found.config.block_size
        whole = mask.shape[0] * size
        tokens = whole if found.config.compat else count
        return so.BlockLayout.from_mask(mask, num_tokens=tokens, block_size=size)

    tower._layout = layout


def hand_over_negatives(patch: pytest.MonkeyPatch, case: Case, *names: str) -> None:
    """Make the matching loss take the case's wrong clips and texts."""
    wrong = tuple(case[f"choice/{name}"] for name in names)
    patch.setattr(pairs, "draw_negatives", lambda *_, **__: wrong)


def inputs(case: Case, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Arguments of a model: which array each is."""
    return {name: case[key] for name, key in names.items()}

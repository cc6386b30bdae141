"""Trained models from the folders that runs leave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from svitt_ops.models.systems import load_system, system_names, system_of
from svitt_ops.training.data.text import load_tokenizer
from svitt_ops.training.engine.checkpoints import model_folder
from svitt_ops.training.engine.settings import RunSettings, run_settings


def load_trained(path: str | Path, head: str | None = None) -> tuple[Any, Any, Path]:
    """Model and tokenizer of a run's folder, or of a folder with weights.

    Args:
        path: of the folder; its config.json says which system's the model is.
        head: what for, a key of `System.models`; default: what it was stored as.

    Raises:
        ValueError: there is no such model, or the weights lack a part of it.
    """
    quiet_transformers()
    folder = model_folder(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("model_type", "svitt")
    name = system_of(stored)
    models = load_system(name).models if name else {}
    if (head or "pretraining") not in models:
        head = head or "pretraining"
        have = [name for name in system_names() if head in load_system(name).models]
        raise ValueError(
            f"model: must be for {head}, of a system of {', '.join(have)}, got a {stored} model"
        )
    kinds = {kind.__name__: kind for kind in models.values()}
    (own, *_) = config.get("architectures") or [""]
    kind = models[head] if head else kinds.get(own, models["pretraining"])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    missing = [name for name in model.state_dict() if name in info["missing_keys"]]
    if head and missing:
        raise ValueError(
            f"model: must be trained for {head}, {folder} has nothing for {len(missing)} of its"
            f" tensors: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return model, load_tokenizer(str(folder)), folder


def quiet_transformers() -> None:
    """Without its bars for loading, and what it says of them."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_for_use(
    path: str | Path,
    *,
    head: str | None = None,
    frames: int | None = None,
    text_length: int | None = None,
    resize: str | None = None,
) -> tuple[Any, Any, RunSettings, Path]:
    """A trained model for clips of so many frames, its tokenizer, how it reads, and its folder.

    Args:
        path: folder of a run or of a model.
        head: what for, a key of `System.models`; default: what it was stored as.
        frames: of a clip; another number than the model's expands it. Default: the model's.
        text_length: tokens; default: what training chose.
        resize: of frames, as in `to_pixel_values`; default: what training chose.
    """
    from svitt_ops.models.parts.expansion import expand_frames
    from svitt_ops.training.data.collate import check_text_length

    model, tokenizer, folder = load_trained(path, head)
    settings = run_settings(folder)
    longest = model.config.max_position_embeddings
    if text_length is None:
        text_length = min(settings.text_length, longest)
    check_text_length(text_length, tokenizer, longest, "--text-length")
    settings = replace(settings, text_length=text_length, resize=resize or settings.resize)
    if settings.resize == "official":
        settings = replace(settings, short_side=None)
    if frames is not None and frames != model.config.num_frames:
        expand_frames(model, frames)
    return model, tokenizer, settings, folder

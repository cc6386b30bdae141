"""Data, recipes, engine, evaluation and figures: what `svitt pretrain` and `svitt demo` run."""

from importlib import import_module
from typing import Any

_PLACES = {
    "ClipSpec": "data.datasets",
    "Embedder": "embeddings.embedding",
    "Embeddings": "embeddings.store",
    "Entry": "data.annotations",
    "PairDataset": "data.datasets",
    "UnusableVideoError": "data.video",
    "embed": "embeddings.embedding",
    "list_media": "embeddings.listing",
    "load_recipe": "engine.recipes",
    "pretrain": "engine.run",
    "read_annotations": "data.annotations",
    "read_frames": "data.video",
    "save_tokenizer": "data.text",
    "search": "embeddings.query",
    "train_tokenizer": "data.text",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"svitt_ops.training.{_PLACES[name]}"), name)

"""What a system of models tells training about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from svitt_ops.models.parts.configuration import VideoConfig


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights of another project that a part of a model can start from."""

    released: str
    """Name of those that the paper starts from."""
    load: Callable[[Any, Any], object]
    """Takes over the weights of a folder: `load(model, folder)`."""
    types: tuple[str, ...] = ()
    """Types of model, besides that of its key, whose folders hold such weights."""
    is_file: bool = False
    """Whether it is a file, of a part that weights for use lack; it is read besides these."""
    takes_files: bool = False
    """Whether a file may stand in the place of the folder."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A system: `svitt_ops.models.<system>.SYSTEM`, found by `svitt_ops.models.systems`."""

    config: type[VideoConfig]
    """Configuration of all its models."""
    base: type[Any] | None = None
    """What transformers' `AutoModel` makes of the configuration; None: it is not registered."""
    models: Mapping[str, type[Any]]
    """Classes of models by what they are for: "pretraining", "retrieval", ..."""
    load_official: Callable[..., Any] | None = None
    """Reads a file of the authors' code: `load_official(source, config, task=...)`, the task a key
    of `models`; None: there is no such."""
    official_sep: bool = False
    """Whether the texts of such a file's model ended with [SEP]."""
    sources: Mapping[str, Source] = field(default_factory=dict)
    """By kind of model, as in the recipe's `init`: "beit", "bert", "dalle"."""

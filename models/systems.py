"""Systems by name: each is a package beside this file that holds a `SYSTEM`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from transformers import AutoConfig, AutoModel, AutoProcessor

from svitt_ops import models
from svitt_ops.models.parts.system import System


def system_names() -> list[str]:
    """The names of all systems."""
    found = iter_modules(models.__path__)
    return [module.name for module in found if module.ispkg and module.name != "parts"]


def load_system(name: str) -> System:
    """A system by the name of its package.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in system_names():
        raise ValueError(f"system must be one of {', '.join(system_names())}, got {name!r}")
    system: System = import_module(f"svitt_ops.models.{name}").SYSTEM
    return system


def system_of(model_type: str) -> str | None:
    """The name of the system whose configuration has this `model_type`; None: no system's."""
    for name in system_names():
        if load_system(name).config.model_type == model_type:
            return name
    return None


def register() -> None:
    """Let `AutoConfig`, `AutoModel` and `AutoProcessor` of transformers know all systems."""
    for system in map(load_system, system_names()):
        if system.base is not None:
            AutoConfig.register(system.config.model_type, system.config, exist_ok=True)
            AutoModel.register(system.config, system.base, exist_ok=True)
            AutoProcessor.register(system.config, VideoTextProcessor, exist_ok=True)


class VideoTextProcessor:
    """Stands for the processor of this name, which reads files, until one is asked for."""

    @staticmethod
    def from_pretrained(*given: Any, **more: Any) -> Any:
        """What `svitt_ops.training.data.processor.VideoTextProcessor.from_pretrained` returns."""
        module = import_module("svitt_ops.training.data.processor")
        return module.VideoTextProcessor.from_pretrained(*given, **more)

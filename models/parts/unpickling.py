"""Reading the tensors of a foreign checkpoint without running anything that it names.

A pickle is a program: it names functions and has them called. Here a name is looked up in a short
list of what tensors are made of; every other name stands for `Inert`, which takes any arguments,
any state and any items, and does nothing. So a checkpoint that carries the configuration objects
of its project, or an attack, reads as its tensors among inert objects.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, _utils

CONTAINERS = ("model", "state_dict")
"""Entries of a checkpoint that may hold its weights."""


class Inert:
    """Stands for an object that a checkpoint wanted; does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return self

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...


class _Guarded:
    """A function that may be called, and that a pickle cannot set attributes of."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, _: Any) -> None: ...


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): _Guarded(torch.Size),
    ("torch._utils", "_rebuild_tensor"): _Guarded(_utils._rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Guarded(_utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _Guarded(_utils._rebuild_parameter),
}


class _Unpickler(pickle._Unpickler):
    """The unpickler written in Python: the one in C takes whatever memory a stream asks it for."""

    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get((module, name), Inert)


def _load(file: Any, **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


_PICKLE: Any = SimpleNamespace(
    __name__="svitt_ops.models.parts.unpickling",
    Unpickler=_Unpickler,
    load=_load,
    UnpicklingError=pickle.UnpicklingError,
)
"""What `torch.load` needs of a pickle module."""


def read_tensors(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a file written by `torch.save`, by name; runs nothing that the file names.

    The weights are looked for in the file's mapping, in its entry "model" or "state_dict". The
    prefix "module." that DDP adds is taken off.

    Args:
        source: the file, or what a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or holds no tensors.
    """
    if isinstance(source, Mapping):
        return _tensors(source, "the mapping")
    return _tensors(_content(Path(source)), source)


def _content(path: Path) -> Any:
    """What a file holds, with inert objects in it."""
    if not path.is_file():
        raise FileNotFoundError(f"read_tensors: path must be a file, got {path}")
    try:
        _refuse_archives(path)
        return torch.load(path, map_location="cpu", pickle_module=_PICKLE, weights_only=False)
    except _Refused:
        raise
    except Exception as error:
        # A damaged or hostile file may raise anything.
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"read_tensors: {path} cannot be read as a checkpoint: {why}") from error


def _tensors(content: Any, source: object) -> dict[str, Tensor]:
    """The tensors in what a file holds."""
    for name in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise ValueError(
            f"read_tensors: {source} must hold a mapping, got {type(content).__name__}"
        )
    tensors = {
        name.removeprefix("module."): value.detach()
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise ValueError(f"read_tensors: {source} must hold tensors by name, got none")
    for name, value in tensors.items():
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise ValueError(
                f"read_tensors: {name} in {source} must be as large as what the file holds of it, "
                f"got shape {tuple(value.shape)}"
            )
    return tensors


class _Refused(ValueError):
    """A file that was understood, and is not taken."""


def _refuse_archives(path: Path) -> None:
    """Refuse what torch.load must not see of a zip archive.

    It would hand a TorchScript archive to its interpreter, which runs it, and take whatever memory
    a small file unpacks to. torch.save does not compress.
    """
    try:
        names = torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError:  # no zip archive: the format before torch 1.6
        return
    if "constants.pkl" in names:
        raise _Refused(f"read_tensors: {path} must hold weights, got a TorchScript program")
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > path.stat().st_size:
        raise _Refused(
            f"read_tensors: {path} must be written by torch.save, which does not compress, got "
            f"{unpacked} bytes packed into {path.stat().st_size}"
        )

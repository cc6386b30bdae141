"""What a call of an op would launch on a GPU, found without one.

The op runs on the CPU with the benchmark's own tensors, and layouts, but its Triton launchers serve
it, and what they would launch is written down instead: kernel, grid, arguments, options. PyTorch's
own kernels between them are counted too.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from bench.predict import older
from svitt_ops import _library, _validation
from svitt_ops.kernels import compile_check


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel on its way to the GPU."""

    name: str
    """With the module of a Triton kernel, or `torch.` before it."""
    grid: tuple[int, ...] = (1,)
    named: dict[str, Any] = field(default_factory=dict)
    """Arguments and constants of a Triton kernel."""
    tensors: tuple[torch.Tensor, ...] = ()
    """What it reads and writes."""
    source: Any = None
    """To compile; nothing of PyTorch's own."""
    options: dict[str, int] = field(default_factory=dict)

    @property
    def programs(self) -> int:
        """Of the grid."""
        return math.prod(self.grid)


class _Torch(TorchDispatchMode):
    """Writes down what is no view and no allocation."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        view = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        if name.startswith("aten::") and not view and "empty" not in name and "detach" not in name:
            made = re.match(r"aten::(new_|zeros|ones|full|rand)", name)
            used = result if made else (args, kwargs, result)
            tensors = [x for x in tree_leaves(used) if torch.is_tensor(x)]
            if any(x.numel() for x in tensors):
                self.launches.append(Launch(name=f"torch.{name[6:]}", tensors=tuple(tensors)))
        return result


@contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """Within, ops on CPU tensors launch nothing; the list has what they would launch."""
    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {x: kwargs.pop(x) for x in compile_check.OPTIONS if x in kwargs}
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = tuple(x for x in named.values() if torch.is_tensor(x))
        launches.append(
            Launch(
                name=f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}",
                grid=tuple(grid),
                named=named,
                tensors=tensors,
                source=compile_check.specialise(self, args, kwargs),
                options=options,
            )
        )

    with (
        compile_check.recorded_launches(arch),
        mock.patch.object(JITFunction, "run", record),
        # On a GPU nobody waits to look at values.
        mock.patch.object(_validation, "readable", lambda *_: False),
        torch.library._scoped_library(_library.NAMESPACE, "IMPL") as library,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, (_, module) in _library.implementations.items():
            library.impl(name, _launcher(name, module, launches), "CPU", allow_override=True)
        with _Torch(launches):
            yield launches


def _launcher(name: str, module: str, launches: list[Launch]) -> Callable[..., Any]:
    """The launcher of an op, whose own PyTorch calls are written down as well.

    Where it names its arguments, an older launcher misses those that it had not yet.
    """
    schema = getattr(getattr(torch.ops, _library.NAMESPACE), name).default._schema
    names = [x.name for x in schema.arguments]

    def launch(*args: Any) -> Any:
        function = getattr(older.module(module), name)
        known = inspect.signature(function).parameters
        given = [v for k, v in zip(names, args, strict=True) if k in known]
        with _Torch(launches):
            return function(*(given if "args" not in known else args))

    return launch

"""Watches what interpreted Triton kernels do to memory; no GPU, no sanitizer is needed.

Every tensor of a launch is copied into an allocation of its own, far from every other, and each
address that a kernel loads from, stores to or updates must be one of a tensor's elements: not
before, behind or, where it is strided, between them, even if what was read is not used. What a
program stores no other program of the launch may load, or store but with the same bits, and what
atomics update only atomics may touch. Programs are run one after another, so races between the
threads of one are not seen.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

MARGIN = 1 << 20  # bytes before and behind a tensor; never touched, so they cost nothing
NOBODY, MANY, ATOMIC = -1, -2, -3
ACCESSES: dict[str, tuple[str, Callable[..., tuple[Any, ...]]]] = {
    "create_masked_load": ("loads", lambda pointers, mask, *_: (pointers, mask)),
    "create_masked_store": ("stores", lambda pointers, value, mask, *_: (pointers, mask, value)),
    "create_atomic_rmw": ("updates", lambda kind, pointers, value, mask, *_: (pointers, mask)),
    "create_atomic_cas": ("updates", lambda pointers, *_: (pointers,)),
}
"""How the interpreter's builder touches memory; where the pointers, the mask and the values are."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Watched:
    """A copy of a tensor inside of margins, and which program touched each of its elements."""

    def __init__(self, name: str, original: Tensor) -> None:
        self.name, self.original, self.size = name, original, original.element_size()
        steps = zip(original.shape, original.stride(), strict=True)
        span = 1 + sum((n - 1) * step for n, step in steps) if original.numel() else 0
        self.first = first = (MARGIN + original.data_ptr() % 64) // self.size
        self.memory = original.new_empty(first + span + MARGIN // self.size)
        self.start = self.memory.data_ptr() + first * self.size
        self.copy = self.memory.as_strided(original.shape, original.stride(), first)
        _once(self.copy).copy_(_once(original))
        owned = torch.zeros(span, dtype=torch.bool)
        _once(owned.as_strided(original.shape, original.stride())).fill_(True)
        self.owned = owned.numpy()
        self.bits = self.memory.view(BITS[self.size]).numpy()
        self.writer, self.reader = np.full(span, NOBODY), np.full(span, NOBODY)

    def touch(self, how: str, offsets: Any, width: int, program: int, values: Any) -> None:
        """Notes an access of `width` bytes at each offset; raises what is wrong with it."""
        if ((self.start + offsets) % width).any():
            raise IndexError(f"{how} {width} bytes of {self.name}, which are not aligned")
        ends = [0] if width <= self.size else [0, width - 1]
        for places in [(offsets + end) // self.size for end in ends]:
            inside = (places >= 0) & (places < len(self.owned))
            inside[inside] = self.owned[places[inside]]
            if not inside.all():
                place, shape = places[~inside][0], tuple(self.original.shape)
                raise IndexError(f"{how} {place} elements from the start of {self.name} {shape}")
            self._note(how, places, program, values if width == self.size else None)

    def _note(self, how: str, places: Any, program: int, values: Any) -> None:
        writer, reader = self.writer[places], self.reader[places]
        me = ATOMIC if how == "updates" else program
        raced = (writer != NOBODY) & (writer != me)
        if values is not None and raced.any():
            differ = values.view(self.bits.dtype) != self.bits[self.first + places]
            raced &= differ | (writer == ATOMIC)
        if how != "loads":
            raced |= (reader != NOBODY) & (reader != program)
        if raced.any():
            place = places[raced][0]
            raise RuntimeError(f"{how} element {place} of {self.name}, as another program does")
        if how == "loads":
            self.reader[places] = np.where((reader == NOBODY) | (reader == me), me, MANY)
        else:
            self.writer[places] = me

    def give_back(self) -> None:
        if (self.writer != NOBODY).any():
            _once(self.original).copy_(_once(self.copy))


def _once(x: Tensor) -> Tensor:
    """Each element of an expanded tensor once."""
    for axis, step in enumerate(x.stride()):
        if step == 0 and x.shape[axis]:
            x = x.narrow(axis, 0, 1)
    return x


class _Launch:
    """The tensors of one launch."""

    def __init__(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kernel, self.watched = kernel.fn.__name__, {}
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for name, x in named.items():
            if isinstance(x, Tensor):
                alike = (x.data_ptr(), x.dtype, x.shape, x.stride())
                self.watched.setdefault(alike, _Watched(name, x.detach()))
                named[name] = self.watched[alike].copy
        self.arguments = named
        self.tensors = sorted(self.watched.values(), key=lambda x: x.memory.data_ptr())
        self.starts = np.array([x.memory.data_ptr() for x in self.tensors])

    def touch(self, how: str, pointers: Any, mask: Any = None, values: Any = None) -> None:
        given = np.array(True) if mask is None else mask.data.astype(bool)
        chosen = np.broadcast_to(given, pointers.data.shape)
        addresses = pointers.data[chosen].astype(np.int64)
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        numbers = np.searchsorted(self.starts, addresses, side="right") - 1
        x, y, z = interpreter.interpreter_builder.grid_idx
        program = (x << 40) + (y << 20) + z
        stored = None if values is None else np.broadcast_to(values.data, chosen.shape)[chosen]
        for number in np.unique(numbers):
            tensor, here = self.tensors[number], numbers == number
            bits = None if stored is None else stored[here]
            try:
                tensor.touch(how, addresses[here] - tensor.start, width, program, bits)
            except (IndexError, RuntimeError) as error:
                raise type(error)(f"{self.kernel} ({x}, {y}, {z}) {error}") from None


@contextmanager
def watched_memory() -> Iterator[None]:
    """Within, an interpreted kernel that touches what is not its own raises InterpreterError."""
    if interpreter.InterpretedFunction.run.__module__ == __name__:
        yield  # watched already
        return
    launches: list[_Launch] = []
    builder = interpreter.InterpreterBuilder
    run_before = interpreter.InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(launch := _Launch(self, args, kwargs))
        try:
            run_before(self, grid=grid, warmup=warmup, **launch.arguments)
        finally:
            launches.pop()
        for tensor in launch.tensors:
            tensor.give_back()

    def watching(name: str, how: str, parts: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        before = getattr(builder, name)

        def access(self: Any, *args: Any) -> Any:
            launches[-1].touch(how, *parts(*args))
            return before(self, *args)

        return access

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(interpreter.InterpretedFunction, "run", run))
        for name, seen in ACCESSES.items():
            patches.enter_context(mock.patch.object(builder, name, watching(name, *seen)))
        yield

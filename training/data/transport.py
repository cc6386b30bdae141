"""Batches that travel between processes as one buffer, and the processes that send them."""

from __future__ import annotations

import signal
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, a multiple of every dtype's: so each tensor can be viewed in the buffer
Place = tuple[int, torch.dtype, torch.Size]  # first byte, dtype, shape


class Batch(dict[str, Any]):
    """What a loader's worker hands over: tensors, lists of tensors, and anything else.

    A tensor on its way to another process costs a file descriptor at both ends, of which a process
    may have 1,024 on a desktop and 256 elsewhere. So pickling copies all tensors into one buffer;
    the receiver gets a plain dict with views of it.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        rest = dict(self)
        places: dict[str, Place | list[Place]] = {}
        pieces = [torch.empty(0, dtype=torch.uint8)]
        size = 0

        def place(tensor: Tensor) -> Place:
            nonlocal size
            data = tensor.reshape(-1).view(torch.uint8)
            gap = -len(data) % ALIGNMENT
            pieces.extend((data, data.new_empty(gap)))
            start, size = size, size + len(data) + gap
            return start, tensor.dtype, tensor.shape

        for name, value in self.items():
            if isinstance(value, Tensor):
                places[name], rest[name] = place(value), None
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                places[name], rest[name] = [place(tensor) for tensor in value], None
        return _unpack, (rest, torch.cat(pieces), places)

    def __copy__(self) -> Batch:
        return Batch(self)


def _unpack(
    batch: dict[str, Any], buffer: Tensor, places: dict[str, Place | list[Place]]
) -> dict[str, Any]:
    def view(place: Place) -> Tensor:
        start, dtype, shape = place
        return buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    for name, place in places.items():
        batch[name] = [view(p) for p in place] if isinstance(place, list) else view(place)
    return batch


def leave_interrupts_to_parent(worker: int) -> None:
    """What a worker does at its start: a terminal's Ctrl-C reaches it too, and would end it within
    a library's callback, or with a queue's lock in its hand. Its parent ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

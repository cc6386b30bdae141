"""Random numbers that graphs can draw: of a seed, and of sizes that are only known when it runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svitt_ops import _library
from svitt_ops._ops import ops


class SeededGenerator:
    """The numbers of ``torch.Generator().manual_seed(seed)``, for graphs, which cannot hold one."""

    device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        self.seed, self.drawn = seed, 0

    def rand(self, shape: tuple[int, ...]) -> Tensor:
        """The next fp32 numbers of `torch.rand`."""
        count = math.prod(shape)
        numbers: Tensor = ops.seeded_rand(self.seed, self.drawn, count)
        self.drawn += count
        return numbers.view(shape)


def seeded(seed: int) -> torch.Generator | SeededGenerator:
    """A generator of a seed's numbers, from the start, for where it is called: a graph or not."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return SeededGenerator(seed)  # the same numbers, and to `torch.vmap` no random operation
    return torch.Generator().manual_seed(seed)


def _seeded_rand(seed: int, start: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(start + count, generator=generator, device="cpu", dtype=torch.float32)
    return numbers[start:].clone()


_library.define_random(
    "seeded_rand(int seed, SymInt start, SymInt count) -> Tensor",
    run=_seeded_rand,
    fake=lambda seed, start, count: torch.empty(count, device="cpu", dtype=torch.float32),
)


def rand(
    shape: tuple[int, ...],
    generator: torch.Generator | SeededGenerator | None,
    device: torch.device | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`torch.rand` on ``device``, drawn where the generator is."""
    if generator is None:  # torch traces no symbolic sizes where generator=None is written out
        return torch.rand(shape, device=device, dtype=dtype)
    if isinstance(generator, SeededGenerator):
        drawn = generator.rand(shape)
    else:
        drawn = torch.rand(shape, generator=generator, device=generator.device, dtype=dtype)
    return drawn if device is None else drawn.to(device)

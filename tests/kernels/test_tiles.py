"""Which tiles an architecture takes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from svitt_ops.kernels.tiles import attention_tile, contrast_tile, cross_tile

HALF = torch.bfloat16


@pytest.mark.parametrize("arch", [86, 89, 120, 121])
def test_consumer_cards_take_tiles_of_sm_80(arch: int) -> None:
    """Which `compile_check` holds to their shared memory; those of sm_90 would not launch."""
    tiles = [attention_tile("forward", 64, 56, 1, HALF, False, x) for x in (arch, 80, 90)]
    assert tiles[0] == tiles[1] != tiles[2]
    tiles = [cross_tile("grad_key", 100, 256, HALF, x) for x in (arch, 80, 90)]
    assert tiles[0] == tiles[1] != tiles[2]
    tiles = [contrast_tile("forward", 256, 4096, HALF, x) for x in (arch, 80, 90)]
    assert tiles[0] == tiles[1] != tiles[2]

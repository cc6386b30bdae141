"""The learning rate over the steps: linear warm-up, then a cosine with a floor, or steps."""

from __future__ import annotations

import math
from collections.abc import Sequence


def learning_rate_factor(step: int, *, total: int, warmup: int, floor: float) -> float:
    """Share of the peak learning rate at a step, as Singularity and SViTT have it.

    max(floor, step / warmup) while warming up, then max(floor, (1 + cos(pi p)) / 2) with p from 0
    to 1 over the other steps. The cosine is clipped at the floor, not rescaled to end there.
    """
    if step < warmup:
        return max(floor, step / warmup)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return max(floor, 0.5 * (1 + math.cos(math.pi * progress)))


def stepped_factor(
    step: int, *, total: int, warmup: int, decay: float, decay_at: Sequence[float]
) -> float:
    """Share of the peak learning rate at a step: ``decay`` once more at each share of the run.

    While warming up, it is step / warmup of that.
    """
    passed = sum(step >= share * total for share in decay_at)
    return decay**passed * (step / warmup if step < warmup else 1.0)

"""The learning rate over the steps: linear warm-up, then a decay, both clipped at a floor."""

from __future__ import annotations

import math


def learning_rate_factor(
    step: int, *, total: int, warmup: int, floor: float, decay: str = "cosine"
) -> float:
    """Share of the peak learning rate at a step.

    max(floor, step / warmup) while warming up, then, with p from 0 to 1 over the other steps,
    max(floor, (1 + cos(pi p)) / 2) as Singularity and SViTT have it, or "linear" max(floor, 1 - p)
    as SCL does. What decays is clipped at the floor, not rescaled to end there.
    """
    if step < warmup:
        return max(floor, step / warmup)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if decay == "linear":
        return max(floor, 1 - progress)
    return max(floor, 0.5 * (1 + math.cos(math.pi * progress)))

"""Which parameters share a learning rate and a weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from svitt_ops.nn import RelativePositionBias3D
from svitt_ops.training.engine.recipes import Optimizer


def parameter_groups(model: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """Groups for AdamW; vectors and scalars (biases, norms, scales, the temperature) do not decay.

    Raises:
        ValueError: a key of `lr_scales` is the beginning of no parameter's name.
    """
    tables = {m.table for m in model.modules() if isinstance(m, RelativePositionBias3D)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for key in settings.lr_scales:
        if not any(name.startswith(key) for name, _ in named):
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name, _ in named))
            raise ValueError(
                f"recipe: optimizer.lr_scales: keys must begin names of parameters ({parts}),"
                f" got {key!r}"
            )

    def part(name: str) -> str:
        """The key that counts; "" where none does."""
        return max(filter(name.startswith, settings.lr_scales), key=len, default="")

    groups: list[dict[str, Any]] = []
    for key in ("", *settings.lr_scales):
        own = [p for name, p in named if part(name) == key and p not in tables]
        rate = {"lr": settings.lr * settings.lr_scales[key]} if key else {}
        groups += [
            {"params": [p for p in own if p.ndim > 1], **rate},
            {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0, **rate},
        ]
    biases = [p for _, p in named if p in tables]
    groups.insert(2, {"params": biases, "lr": settings.lr * settings.bias_lr_scale})
    return groups

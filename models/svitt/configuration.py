"""The configuration of SViTT."""

from __future__ import annotations

from svitt_ops.models.parts.configuration import TwoTowersConfig


class SViTTConfig(TwoTowersConfig):
    """SViTT: a sparse video tower, a text tower and fusion layers over both.

    Source: SViTT (CVPR 2023); the defaults are the base model's, at 4 frames.
    """

    model_type = "svitt"

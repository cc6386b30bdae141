"""The configuration of Singularity."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from svitt_ops.models.parts.configuration import TwoTowersConfig

OFFICIAL = "singularity-official"
"""Value of `compat` that reproduces what the authors' released code does."""
DENSE = {"edge_sparsity": False, "keep_rate": 1, "multimodal_keep_rate": 1}
"""Fields of sparsity, and their only value."""


class SingularityConfig(TwoTowersConfig):
    """Singularity: a dense image tower over every frame alone, a text tower, and fusion layers.

    Layers over time are optional; they are the text tower's in size.

    Source: Singularity (ACL 2023); the defaults are the single-frame base model's.
    """

    model_type = "singularity"
    compats: ClassVar[tuple[str | None, ...]] = (None, OFFICIAL)

    num_frames: int = 1
    """Frames of a clip."""
    temporal_layers: int = 0
    """Layers in which each place of the picture attends over the frames; 0 is no order of time."""
    pool_over_time: bool = False
    """Whether a frame's vector is its [CLS] after these layers, not its pooled patches before."""
    edge_sparsity: bool = False
    """Fixed: attention is dense."""
    keep_rate: float = 1.0
    """Fixed: no patch is pruned."""
    prune_layers: list[int] = field(default_factory=list)
    """Of no effect."""
    multimodal_keep_rate: float = 1.0
    """Fixed: no patch is pruned."""
    multimodal_prune_layers: list[int] = field(default_factory=list)
    """Of no effect."""
    compat: str | None = None
    """None, or "singularity-official": ranking of answers and the negatives of the contrastive loss
    as the authors' released code has them, see `parts/official.py`."""

    @property
    def tower_frames(self) -> int:
        """One: frames meet in the layers over time and in the fusion layers only."""
        return 1

    @property
    def own_fixed(self) -> list[str]:
        """Layers over time are new to the second stage; then they are as many as they are."""
        return ["temporal_layers"] if self.temporal_layers else []

    def check(self) -> None:
        """Raise a ValueError that names the first field whose value cannot be."""
        super().check()
        for name, value in DENSE.items():
            if getattr(self, name) != value:
                self._refuse(name, f"{value}: Singularity is dense", getattr(self, name))
        self._check_counts("temporal_layers", least=0)
        self._check_one_of("pool_over_time", (True, False))
        if self.temporal_layers and self.text_hidden_size != self.hidden_size:
            wanted = f"hidden_size ({self.hidden_size}) with temporal_layers"
            self._refuse("text_hidden_size", wanted, self.text_hidden_size)
        if self.pool_over_time and not self.temporal_layers:
            self._refuse("pool_over_time", "False without temporal_layers", True)

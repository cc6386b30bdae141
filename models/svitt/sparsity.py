"""How sparse a model is: edges, tokens and multiplications, counted without running it.

The paper's Table A1: an edge is a (query, key) pair of an attention. A patch has an edge to each
patch of its blocks and one to [CLS]; [CLS] itself is not counted as a query, neither here nor in
the dense count, whose patches have an edge to each patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from svitt_ops import keep_count
from svitt_ops.models.parts.configuration import TwoTowersConfig, VideoConfig
from svitt_ops.models.svitt.configuration import SViTTConfig

CURRICULUM = {4: 0.7, 8: 0.6, 16: 0.5}
"""Frames and keep rates of the paper's three stages of pretraining."""
TEXT_LENGTH = 32


@dataclass(frozen=True, kw_only=True)
class EdgeCount:
    """Edges of one clip and its text, and what they were if all attention were dense."""

    video: int
    multimodal: int
    dense_video: int
    dense_multimodal: int

    @property
    def total(self) -> int:
        """Edges of both."""
        return self.video + self.multimodal

    @property
    def dense(self) -> int:
        """Edges of both, were they dense."""
        return self.dense_video + self.dense_multimodal

    @property
    def sparsity(self) -> float:
        """Share of the dense edges that is saved, S."""
        return 1 - self.total / self.dense


@dataclass(frozen=True, kw_only=True)
class SparsityRow:
    """A line of the paper's Table A1, and the multiplications of the video tower."""

    num_frames: int
    keep_rate: float
    tokens: tuple[int, ...]
    """Patches before and after each pruning."""
    multimodal_tokens: tuple[int, ...]
    """The same of the fusion layers."""
    edges: EdgeCount
    macs: int
    dense_macs: int


def edge_count(config: TwoTowersConfig, *, text_length: int = TEXT_LENGTH) -> EdgeCount:
    """Count the edges of a model.

    Args:
        config: of the model.
        text_length: tokens of the text.
    """
    layers = config.kept_tokens()[:-1]
    fused = fusion_tokens(config)
    patches = config.num_patches
    return EdgeCount(
        video=sum(count * keys_per_patch(config, count) for count in layers),
        multimodal=text_length * sum(fused),
        dense_video=len(layers) * patches**2,
        dense_multimodal=len(fused) * text_length * patches,
    )


def sparsity_table(
    config: TwoTowersConfig | None = None,
    *,
    frames: Sequence[int] = tuple(CURRICULUM),
    text_length: int = TEXT_LENGTH,
) -> list[SparsityRow]:
    """The paper's Table A1, or the same of another model.

    Args:
        config: of the model, whose frames are replaced. Without one, the full-size model with the
            paper's keep rate for each number of frames, and that of the nearest stage for others.
        frames: frames of each row.
        text_length: tokens of the text.
    """
    rows = []
    for count in frames:
        if config is None:
            nearest = min(CURRICULUM, key=lambda stage: abs(stage - count))
            own = SViTTConfig(num_frames=count, keep_rate=CURRICULUM[nearest])
        else:
            own = type(config)(**{**config.to_dict(), "num_frames": count})
        rows.append(
            SparsityRow(
                num_frames=count,
                keep_rate=own.keep_rate,
                tokens=_stages(own.kept_tokens()),
                multimodal_tokens=_stages(fusion_tokens(own)),
                edges=edge_count(own, text_length=text_length),
                macs=video_macs(own),
                dense_macs=video_macs(own, dense=True),
            )
        )
    return rows


def fusion_tokens(config: TwoTowersConfig) -> list[int]:
    """Patches that each fusion layer attends over."""
    counts, count = [], config.kept_tokens()[-1]
    for layer in range(config.num_fusion_layers):
        counts.append(count)
        if config.prunes_multimodally and layer in config.multimodal_prune_layers:
            count = keep_count(config.multimodal_keep_rate, count)
    return counts


def keys_per_patch(config: VideoConfig, num_patches: int) -> int:
    """Keys that a patch attends among so many patches; with edge sparsity [CLS] is one of them."""
    if not config.edge_sparsity:
        return min(num_patches, config.tower_frames * config.grid_size**2)
    blocks = config.num_local + config.num_random
    return min(blocks * config.block_size, num_patches) + 1


def video_macs(config: VideoConfig, *, dense: bool = False) -> int:
    """Multiply-accumulates of the video tower's layers for one clip, [CLS] not counted.

    Each layer projects four times and has a feed-forward of two matrices per token, and a product
    with keys and one with values per edge.

    Args:
        config: of the model.
        dense: as if neither edges nor nodes were dropped.
    """
    width = config.hidden_size
    per_token = 4 * width**2 + 2 * width * config.intermediate_size
    macs = 0
    for count in config.kept_tokens()[:-1]:
        count = config.num_patches if dense else count
        keys = count if dense else keys_per_patch(config, count)
        macs += count * (per_token + 2 * width * keys)
    return macs


def _stages(counts: Sequence[int]) -> tuple[int, ...]:
    """The counts without repetitions."""
    return tuple(dict.fromkeys(counts))

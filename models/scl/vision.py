"""The image tower: CLIP's, and its form for clips, which costs what its frames cost one by one.

Every frame has its [CLS], and stands in the sequence behind it: ``(frames, 1 + patches)``. A [CLS]
attends over all frames, a patch over its own frame and that frame's [CLS].

Source: SCL (CVPR 2023), section 3.4; CLIP (ICML 2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import svitt_ops as so
from svitt_ops.models.parts.video import TowerOutput, VideoLayer, VideoTower
from svitt_ops.models.scl.configuration import SCLConfig
from svitt_ops.nn import BlockSparseSelfAttention


def frame_attention(query: Tensor, key: Tensor, value: Tensor, frame: so.BlockLayout) -> Tensor:
    """Attention of [CLS] tokens over all frames, and of patches over their own frame.

    Frames become samples of a batch, without a copy; then the rows of [CLS] are replaced by those
    over the whole sequence. No mask is formed.

    Args:
        query: ``(batch, heads, frames * frame.seq_len, head_dim)``, every frame's [CLS] first.
        key: like ``query``.
        value: like ``query``.
        frame: layout of one frame, whose global token is [CLS].

    Returns:
        Like ``query``.

    Complexity:
        ``frames (1 + p) (1 + p) + frames frames (1 + p)`` edges for p patches of a frame, where
        dense attention has ``(frames (1 + p))^2``.
    """
    size = frame.seq_len
    frames, over = divmod(query.shape[2], size)
    if over or not frames:
        raise ValueError(
            f"frame_attention: query must have tokens of frames, a multiple of {size}, got "
            f"{query.shape[2]}"
        )
    if frames == 1:
        return so.block_sparse_attention(query, key, value, frame)

    def apart(x: Tensor) -> Tensor:
        return x.unflatten(2, (frames, size)).transpose(1, 2).flatten(0, 1)

    own = so.block_sparse_attention(apart(query), apart(key), apart(value), frame)
    seen = so.cross_attention(query[:, :, ::size], key, value)  # (batch, heads, frames, head_dim)
    patches = own.unflatten(0, (-1, frames)).transpose(2, 3)[:, :, 1:]
    merged = torch.cat([seen.transpose(1, 2)[:, :, None], patches], 2)
    return merged.flatten(1, 2).transpose(1, 2)


class FrameAttention(BlockSparseSelfAttention):
    """Projections around `frame_attention`; the layout is that of one frame."""

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: so.BlockLayout, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        return frame_attention(query, key, value, layout), None


class FrameLayer(VideoLayer):
    """A layer of CLIP's, over frames."""

    attention_class = FrameAttention

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        """CLIP's approximation of GELU."""
        return x * torch.sigmoid(1.702 * x)


class FrameTower(VideoTower):
    """CLIP's image tower over the frames of clips, without its last norm.

    Args:
        config: its `num_frames` says whether there are positions of frames.
    """

    layer_class = FrameLayer
    patch_bias = False
    config: SCLConfig

    def __init__(self, config: SCLConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.frame_positions: nn.Parameter | None = None
        self.fit_frames(config.num_frames)

    @torch.no_grad()
    def fit_frames(self, num_frames: int) -> None:
        """Come to be of clips of so many frames, or of images.

        Positions of frames start at 0, and one frame alone keeps what it had.
        """
        config, places = self.config, self.patch_positions
        assert places is not None and self.cls_position is not None
        if num_frames > config.max_frames:
            raise ValueError(
                f"FrameTower: num_frames must be at most max_frames ({config.max_frames}), "
                f"got {num_frames}"
            )
        if num_frames > 1 and self.frame_positions is None:
            zeros = places.new_zeros(config.max_frames, config.hidden_size)
            self.frame_positions = nn.Parameter(zeros, requires_grad=places.requires_grad)
        elif num_frames == 1 and self.frame_positions is not None:
            places += self.frame_positions[0]
            self.cls_position += self.frame_positions[0]
            self.frame_positions = None

    def forward(self, pixel_values: Tensor, kept: Tensor | None = None) -> TowerOutput:
        """Encode clips.

        Args:
            pixel_values: ``(batch, frames, 3, image_size, image_size)``.
            kept: int64 ``(batch, k)``, numbers of the patches of a frame that are read, those of
                all frames of a clip; by default all are.

        Returns:
            Tokens ``(batch, frames (1 + k), hidden_size)``, each frame's [CLS] before its patches.
        """
        config, size = self.config, self.config.image_size
        if pixel_values.dim() != 5 or pixel_values.shape[2:] != (3, size, size):
            raise ValueError(
                f"FrameTower: pixel_values must have shape (batch, frames, 3, {size}, {size}), "
                f"got {tuple(pixel_values.shape)}"
            )
        batch, frames = pixel_values.shape[:2]
        if not 1 <= frames <= config.num_frames:
            raise ValueError(
                f"FrameTower: pixel_values must have 1 to {config.num_frames} frames, got {frames}"
            )
        assert self.patch_positions is not None and self.cls_position is not None
        patches: Tensor = self.patches(pixel_values)
        patches = (patches + self.patch_positions).unflatten(0, (batch, frames))
        if kept is not None:
            if kept.dim() != 2 or len(kept) != batch or kept.dtype != torch.int64:
                raise ValueError(
                    f"FrameTower: kept must be int64 of shape ({batch}, k), got {kept.dtype} of "
                    f"{tuple(kept.shape)}"
                )
            chosen = kept[:, None, :, None].expand(-1, frames, -1, patches.shape[-1])
            patches = patches.gather(2, chosen)
        cls = (self.cls_token + self.cls_position)[None].expand(batch, frames, -1, -1)
        tokens = torch.cat([cls, patches.to(cls.dtype)], 2)
        if self.frame_positions is not None:
            tokens = tokens + self.frame_positions[:frames, None]
        tokens = self.norm(tokens.flatten(1, 2))
        layout = self._layout(patches.shape[2], tokens.device, None)
        for layer in self.layers:
            tokens, _ = layer(tokens, layout, None, False)
        numbers = self.order.expand(batch, -1) if kept is None else kept
        return TowerOutput(tokens, numbers, ())

"""The video tower: a ViT over all patches of some frames at once, with edge and node sparsity."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import svitt_ops as so
from svitt_ops.models.parts.configuration import VideoConfig
from svitt_ops.models.parts.layers import FeedForward, Residual, eval_generator, random_scores
from svitt_ops.models.parts.official import PaddedSelfAttention, padded
from svitt_ops.models.parts.token_order import token_order
from svitt_ops.nn import BlockSparseSelfAttention, RelativePositionBias3D
from svitt_ops.randomness import SeededGenerator

DENSE_BLOCK = 56
"""Block size of dense attention, for which it has no meaning: the one the kernels are best at."""


@dataclass(frozen=True)
class TowerOutput:
    """Tokens that the tower leaves.

    Attributes:
        tokens: ``(batch, 1 + n, hidden_size)``, [CLS] and the n patches that survive.
        indices: int64 ``(batch, n)``, numbers of these patches in (frame, row, column) order.
        indices_per_stage: the same after each pruning.
    """

    tokens: Tensor
    indices: Tensor
    indices_per_stage: tuple[Tensor, ...]


class VideoLayer(GradientCheckpointingLayer):
    """A pre-norm layer: block-sparse attention and feed-forward, each scaled and added.

    Args:
        config: of the tower.
        drop_rate: stochastic depth of this layer.
    """

    attention_class: ClassVar[type[BlockSparseSelfAttention]] = BlockSparseSelfAttention

    def __init__(self, config: VideoConfig, drop_rate: float) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        bias = None
        if config.position == "relative":
            grid = (config.tower_frames, config.grid_size, config.grid_size)
            heads, std = config.num_attention_heads, config.bias_init_std
            bias = RelativePositionBias3D(grid, heads, std=std)
        official = config.official and config.edge_sparsity
        kind = PaddedSelfAttention if official else self.attention_class
        self.norm_before = nn.LayerNorm(dim, eps)
        self.attention = kind(dim, config.num_attention_heads, key_bias=config.key_bias, bias=bias)
        self.add_attention = Residual(dim, config.layer_scale_init_value, drop_rate)
        self.norm_after = nn.LayerNorm(dim, eps)
        self.mlp = FeedForward(dim, config.intermediate_size, self.activation)
        self.add_mlp = Residual(dim, config.layer_scale_init_value, drop_rate)

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        """Of the feed-forward."""
        return F.gelu(x)

    def forward(
        self, tokens: Tensor, layout: so.BlockLayout, codes: Tensor | None, with_saliency: bool
    ) -> tuple[Tensor, Tensor | None]:
        found = self.attention(
            self.norm_before(tokens), layout, codes=codes, return_saliency=with_saliency
        )
        attended, saliency = found if with_saliency else (found, None)
        tokens = self.add_attention(tokens, attended)
        return self.add_mlp(tokens, self.mlp(self.norm_after(tokens))), saliency


class PatchProjection(nn.Conv2d):
    """The convolution of patches, as one product, which CPUs have faster kernels for.

    Args:
        dim: of a patch's token.
        size: of a patch, in pixels.
        bias: whether there is one.
    """

    def __init__(self, dim: int, size: int, bias: bool) -> None:
        super().__init__(3, dim, size, size, bias=bias)

    def forward(self, frames: Tensor) -> Tensor:
        """From frames ``(..., 3, h, w)`` to ``(frames, n, dim)``, patches in order of rows."""
        size = self.kernel_size[0]
        rows = frames.flatten(0, -4).unflatten(-2, (-1, size)).unflatten(-1, (-1, size))
        rows = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (frames, n, 3 size size)
        return F.linear(rows, self.weight.flatten(1), self.bias)


class VideoTower(nn.Module):
    """Patches of all frames in one sequence behind [CLS], through sparse layers.

    Edge sparsity: every layer and every call draws its blocks from torch's generator; outside
    training from a generator seeded with `eval_pattern_seed`, so that a clip has one encoding.
    Node sparsity: after the layers in `prune_layers`, the patches that [CLS] attends least leave.

    Args:
        config: read here; `num_frames` is changed by `expand_frames` only.
    """

    layer_class: ClassVar[type[VideoLayer]] = VideoLayer
    patch_bias: ClassVar[bool] = True
    """Whether the projection of patches has a bias."""
    order: Tensor
    codes: Tensor

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.patches = PatchProjection(dim, config.patch_size, self.patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token: nn.Parameter | None = None
        if config.masks_patches:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.cls_position: nn.Parameter | None = None
        self.patch_positions: nn.Parameter | None = None
        if config.position == "absolute":
            self.cls_position = nn.Parameter(torch.zeros(1, 1, dim))
            shape = (config.tower_frames, config.grid_size**2, dim)
            self.patch_positions = nn.Parameter(torch.zeros(shape))
        last = max(config.num_hidden_layers - 1, 1)
        rates = (config.drop_path_rate * i / last for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(self.layer_class(config, rate) for rate in rates)
        self.reset_positions()

    def reset_positions(self, device: torch.device | None = None) -> None:
        """Fill the order of the patches and their codes for `config.tower_frames` frames."""
        order, codes = self._positions(self.config.tower_frames)
        self.register_buffer("order", order.to(device), persistent=False)
        self.register_buffer("codes", codes.to(device), persistent=False)

    def forward(self, pixel_values: Tensor, masked: Tensor | None = None) -> TowerOutput:
        """Encode clips.

        Args:
            pixel_values: ``(batch, frames, 3, image_size, image_size)``.
            masked: bool ``(batch, patches)``, True where the mask token takes a patch's place; only
                for a tower that has one.
        """
        config = self.config
        tokens, order, codes = self._embed(pixel_values, masked)
        table_codes = codes if config.position == "relative" else None
        indices = order.expand(tokens.shape[0], -1)
        generator = None if self.training else eval_generator(config)
        stages = []
        for number, layer in enumerate(self.layers):
            prunes = number in config.prune_layers and config.keep_rate < 1
            by_saliency = prunes and config.prune_by == "saliency"
            # Drawn outside the layer: a checkpointed layer runs twice, on one layout.
            layout = self._layout(indices.shape[1], tokens.device, generator)
            tokens, scores = layer(tokens, layout, table_codes, by_saliency)
            if prunes:
                if scores is None:
                    scores = random_scores(indices, generator)
                kept = so.prune_tokens(
                    tokens, scores, keep_rate=config.keep_rate, position_codes=table_codes
                )
                tokens, table_codes = kept.tokens, kept.position_codes
                indices = indices.gather(1, kept.indices)
                stages.append(indices)
        return TowerOutput(tokens, indices, tuple(stages))

    def _embed(
        self, pixel_values: Tensor, masked: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens in order behind [CLS], the order, and the codes of the patches."""
        config, size = self.config, self.config.image_size
        if pixel_values.dim() != 5 or pixel_values.shape[2:] != (3, size, size):
            raise ValueError(
                f"VideoTower: pixel_values must have shape (batch, frames, 3, {size}, {size}), "
                f"got {tuple(pixel_values.shape)}"
            )
        batch, frames = pixel_values.shape[:2]
        if not 1 <= frames <= config.tower_frames:
            raise ValueError(
                f"VideoTower: pixel_values must have 1 to {config.tower_frames} frames, "
                f"got {frames}"
            )
        order, codes = self.order, self.codes
        if frames < config.tower_frames:  # the first frames of the table
            order, codes = (x.to(order.device) for x in self._positions(frames))
        patches = self.patches(pixel_values).reshape(batch, order.shape[0], -1)
        if masked is not None:
            patches = self._masked(patches, masked)
        cls: Tensor = self.cls_token
        if self.patch_positions is not None and self.cls_position is not None:
            patches = patches + self.patch_positions[:frames].flatten(0, 1)
            cls = cls + self.cls_position
        if config.token_order != "standard":
            patches = patches[:, order]
        # Under autocast the stream stays fp32; what is computed from it is not.
        tokens = torch.cat([cls.expand(batch, -1, -1), patches.to(cls.dtype)], 1)
        return tokens, order, codes

    def _masked(self, patches: Tensor, masked: Tensor) -> Tensor:
        """Patches ``(batch, n, dim)`` with the mask token in some places."""
        if self.mask_token is None:
            raise ValueError("VideoTower: masked must be None: the tower has no mask token")
        if masked.shape != patches.shape[:2] or masked.dtype != torch.bool:
            raise ValueError(
                f"VideoTower: masked must be bool of shape {tuple(patches.shape[:2])}, "
                f"got {masked.dtype} of {tuple(masked.shape)}"
            )
        return torch.where(masked[..., None], self.mask_token.to(patches.dtype), patches)

    def _positions(self, frames: int) -> tuple[Tensor, Tensor]:
        grid = (frames, self.config.grid_size, self.config.grid_size)
        device = torch.device("cpu")  # also where the default device is "meta"
        with nullcontext() if torch.compiler.is_compiling() else device:
            order = token_order(self.config.token_order, grid, compat=self.config.compat)
            return order, so.position_codes(grid, device=device)[order]

    def _layout(
        self,
        num_tokens: int,
        device: torch.device,
        generator: torch.Generator | SeededGenerator | None,
    ) -> so.BlockLayout:
        config = self.config
        if not config.edge_sparsity:
            blocks = -(-num_tokens // DENSE_BLOCK)
            every = torch.ones(blocks, blocks, dtype=torch.bool, device=device)
            return so.BlockLayout.from_mask(every, num_tokens=num_tokens, block_size=DENSE_BLOCK)
        if config.official:
            num_tokens = padded(num_tokens, config.block_size)
        return so.BlockLayout.local_random(
            num_tokens,
            block_size=config.block_size,
            num_local=config.num_local,
            num_random=config.num_random,
            generator=generator,
            device=device,
        )

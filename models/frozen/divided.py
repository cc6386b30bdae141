"""Attention over time, then over space, as the original model has it: what SViTT takes out again.

Source: Frozen in time (ICCV 2021), section 3.1 and the released code.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

import svitt_ops as so
from svitt_ops.models.frozen.configuration import FrozenConfig
from svitt_ops.models.parts.video import VideoLayer
from svitt_ops.nn import BlockSparseSelfAttention


class DividedSelfAttention(BlockSparseSelfAttention):
    """Patches attend along one axis and to [CLS], which attends to everything.

    Args:
        config: of the model; its grid says which patches are of one frame.
        over: "time", the patches at one place of all frames, or "space", those of one frame.
    """

    def __init__(self, config: FrozenConfig, over: Literal["time", "space"]) -> None:
        super().__init__(config.hidden_size, config.num_attention_heads)
        self.config, self.over = config, over

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: so.BlockLayout, **options: Any
    ) -> tuple[Tensor, None]:
        cls = so.cross_attention(query[:, :, :1], key, value)
        batch, places = query.shape[0], self.config.grid_size**2

        def grouped(x: Tensor, *, with_cls: bool) -> Tensor:
            """``(batch * groups, heads, tokens, head_dim)``."""
            patches = x[:, :, 1:].unflatten(2, (-1, places))
            group, along = (3, 2) if self.over == "time" else (2, 3)
            patches = patches.permute(0, group, 1, along, 4)
            if with_cls:
                first = x[:, None, :, :1].expand(-1, patches.shape[1], -1, -1, -1)
                patches = torch.cat([first, patches], 3)
            return patches.flatten(0, 1)

        found = so.cross_attention(
            grouped(query, with_cls=False),
            grouped(key, with_cls=True),
            grouped(value, with_cls=True),
        )
        found = found.unflatten(0, (batch, -1)).transpose(1, 2)
        if self.over == "time":
            found = found.transpose(2, 3)
        return torch.cat([cls, found.flatten(2, 3)], 2), None


class DividedLayer(VideoLayer):
    """A layer with attention over time before that over space, which adds to the stream alone:
    what time finds is seen by space, and not kept.

    Args:
        config: of the model.
        drop_rate: stochastic depth of this layer.
    """

    def __init__(self, config: FrozenConfig, drop_rate: float) -> None:
        super().__init__(config, drop_rate)
        self.norm_time = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention_over_time = DividedSelfAttention(config, "time")
        self.attention = DividedSelfAttention(config, "space")

    def forward(
        self, tokens: Tensor, layout: so.BlockLayout, codes: Tensor | None, with_saliency: bool
    ) -> tuple[Tensor, None]:
        timed = tokens + self.attention_over_time(self.norm_time(tokens), layout)
        tokens = self.add_attention(tokens, self.attention(self.norm_before(timed), layout))
        return self.add_mlp(tokens, self.mlp(self.norm_after(tokens))), None

    @torch.no_grad()
    def start_time_at_zero(self) -> None:
        """As the original: no query, key or value, and an output of the values' sum.

        Then queries and keys have no gradient either, and stay what they are.
        """
        over_time = self.attention_over_time
        for layer in (over_time.query, over_time.key, over_time.value):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.ones_(over_time.out.weight)
        nn.init.zeros_(over_time.out.bias)

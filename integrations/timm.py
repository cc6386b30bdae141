"""timm's Vision Transformers on the ops: a class for their ``attn_layer``.

    timm.create_model("vit_base_patch16_224", attn_layer=Attention)              # dense
    timm.create_model("vit_base_patch16_224", attn_layer=Attention.sparse())     # sparse

Weights have the names and shapes of timm's own attention. timm itself is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import svitt_ops as so
from svitt_ops.nn import merge_heads
from svitt_ops.randomness import seeded

DENSE: dict[str, Any] = {"block_size": 128, "num_local": 2**31, "num_random": 0, "num_global": 0}
"""Every block attends every one; the block size, without a meaning here, is the kernels' best."""


class Attention(nn.Module):
    """Multi-head self-attention with the interface of ``timm.layers.Attention``.

    Args:
        dim: width of the tokens.
        num_heads: heads; must divide ``dim``.
        qkv_bias: whether the joint input projection has a bias.
        qk_norm: whether queries and keys are normalized, by ``norm_layer(head_dim)``.
        scale_norm: whether the merged heads are, by ``norm_layer(dim)``.
        proj_bias: whether the output projection has a bias.
        attn_drop: dropout of attention weights; must be 0.
        proj_drop: dropout after the output projection.
        norm_layer: makes a norm of a width; needed for ``qk_norm`` and ``scale_norm``.
    """

    pattern: ClassVar[dict[str, Any]] = DENSE
    """Arguments of `BlockLayout.local_random`."""
    seed: ClassVar[int] = 0
    made: ClassVar[int] = 0

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Attention: num_heads must divide dim {dim}, got {num_heads}")
        if attn_drop:
            raise ValueError(f"Attention: attn_drop must be 0, got {attn_drop}")
        if norm_layer is None and (qk_norm or scale_norm):
            raise ValueError("Attention: norm_layer must be given for qk_norm and scale_norm")
        make: Any = norm_layer
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.number, type(self).made = self.made, self.made + 1
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **place)
        self.q_norm = make(head_dim, **place) if qk_norm else nn.Identity()
        self.k_norm = make(head_dim, **place) if qk_norm else nn.Identity()
        self.norm = make(dim, **place) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **place)
        self.proj_drop = nn.Dropout(proj_drop)
        self.layout: so.BlockLayout | None = None
        """Of the last forward pass without a mask."""

    @classmethod
    def sparse(
        cls,
        *,
        block_size: int = 56,
        num_local: int = 1,
        num_random: int = 3,
        num_global: int = 1,
        seed: int = 0,
    ) -> type[Attention]:
        """A class whose attention is block-sparse; make one for each model.

        Args:
            block_size: tokens per block, 1 to 256.
            num_local: blocks in the local window.
            num_random: random blocks per query block, drawn anew on each forward pass in training.
            num_global: tokens at the start that attend all and are attended by all: the model's
                ``num_prefix_tokens``.
            seed: of the layouts in evaluation, where the layers differ in the order that they were
                made in.

        Source:
            SViTT (CVPR 2023), section 3.2.
        """
        pattern: dict[str, Any] = {
            "block_size": block_size,
            "num_local": num_local,
            "num_random": num_random,
            "num_global": num_global,
        }
        so.BlockLayout.local_random(1, **pattern)  # checks them
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"Attention.sparse: seed must be an int of at least 0, got {seed!r}")
        return type("SparseAttention", (cls,), {"pattern": pattern, "seed": seed, "made": 0})

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend.

        Args:
            x: ``(batch, tokens, dim)``.
            attn_mask: bool ``(batch, 1, 1, tokens)``, a padding mask, True where a key is attended;
                None in a sparse class.
            is_causal: must be False.

        Returns:
            Like ``x``.
        """
        if is_causal:
            raise ValueError("Attention: is_causal must be False, got True")
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        if attn_mask is not None:
            ignored = self._ignored(x, attn_mask)
            out = so.cross_attention(query, key, value, key_padding_mask=ignored)
        else:
            out = so.block_sparse_attention(query, key, value, self._layout(x))
        found: Tensor = self.proj_drop(self.proj(self.norm(merge_heads(out))))
        return found

    def _layout(self, x: Tensor) -> so.BlockLayout:
        generator = None if self.training else seeded(self.seed * 1000 + self.number)
        self.layout = so.BlockLayout.local_random(
            x.shape[1] - self.pattern["num_global"],
            generator=generator,
            device=x.device,
            **self.pattern,
        )
        return self.layout

    def _ignored(self, x: Tensor, mask: Tensor) -> Tensor:
        """Bool ``(batch, tokens)``, True where a key is not attended."""
        if self.pattern is not DENSE:
            raise ValueError("Attention: attn_mask must be None in a sparse class, got one")
        shape = (x.shape[0], 1, 1, x.shape[1])
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(
                f"Attention: attn_mask must be bool {shape}, a padding mask, got {mask.dtype} of "
                f"{tuple(mask.shape)}"
            )
        return mask[:, 0, 0].logical_not()

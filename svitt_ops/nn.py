"""Small modules over the ops; they add projections, tables and nothing else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from svitt_ops import _validation
from svitt_ops.block_sparse_attention import block_sparse_attention, position_codes
from svitt_ops.cross_attention import cross_attention
from svitt_ops.layout import BlockLayout
from svitt_ops.reference.cross_attention import Saliency
from svitt_ops.token_pruning import PrunedTokens, prune_tokens

__all__ = ["BlockSparseSelfAttention", "CrossAttention", "RelativePositionBias3D", "TokenPruning"]


class RelativePositionBias3D(nn.Module):
    """BEiT's relative position bias over a (frames, rows, columns) grid: a table and its codes.

    The table has ``(2 T - 1) (2 H - 1) (2 W - 1)`` rows for the offsets and ``2 g + g g`` for g
    global tokens, one column a head. The bias of every pair is never formed: pass ``table`` and
    ``codes`` to `block_sparse_attention`.

    Args:
        grid: T frames, H rows, W columns of tokens.
        num_heads: columns of the table.
        num_global: global tokens before the grid's.
        std: of the normal noise that fills the table; 0 fills it with zeros. An offset's is the sum
            of what is drawn for its frames, its rows and its columns: drawn for itself, noise would
            average out over space, and a head would begin with no direction in time.
    """

    codes: Tensor

    def __init__(
        self,
        grid: tuple[int, int, int],
        num_heads: int,
        *,
        num_global: int = 1,
        std: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "RelativePositionBias3D"
        frames, height, width = grid = _validation.check_grid(op, "grid", grid)
        num_heads = _validation.check_count(op, "num_heads", num_heads, least=1)
        num_global = _validation.check_count(op, "num_global", num_global)
        std = _validation.check_float(op, "std", std)
        if not 0 <= std < math.inf:
            raise ValueError(f"{op}: std must be at least 0 and finite, got {std}")
        device = _validation.check_device(op, device)
        _validation.check_dtype(op, dtype)
        self.grid, self.num_heads, self.num_global, self.std = grid, num_heads, num_global, std
        rows = (2 * frames - 1) * (2 * height - 1) * (2 * width - 1)
        rows += 2 * num_global + num_global**2
        self.table = nn.Parameter(torch.empty(rows, num_heads, device=device, dtype=dtype))
        self.register_buffer("codes", position_codes(grid, device=device), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the table."""
        nn.init.normal_(self.table, std=self.std)
        sizes = [2 * size - 1 for size in self.grid]
        offsets = self.table[: math.prod(sizes)].unflatten(0, sizes).zero_()
        for axis in range(3):
            shape = [size if k == axis else 1 for k, size in enumerate(sizes)]
            noise = torch.randn(*shape, self.num_heads, device=offsets.device)
            offsets += noise * (self.std / math.sqrt(3))

    def extra_repr(self) -> str:
        return f"grid={self.grid}, num_heads={self.num_heads}, num_global={self.num_global}"


class BlockSparseSelfAttention(nn.Module):
    """Multi-head self-attention over the blocks of a layout: projections around the op.

    Args:
        dim: width of the tokens.
        num_heads: heads; must divide ``dim``.
        qkv_bias: whether the three input projections have a bias.
        key_bias: whether the keys' has one too; BEiT's has none.
        bias: relative position bias of this layer, or None.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        key_bias: bool = True,
        bias: RelativePositionBias3D | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "BlockSparseSelfAttention"
        dim, self.num_heads = _check_heads(op, dim, num_heads)
        qkv_bias = _validation.check_flag(op, "qkv_bias", qkv_bias)
        key_bias = _validation.check_flag(op, "key_bias", key_bias)
        device = _validation.check_device(op, device)
        _validation.check_dtype(op, dtype)
        if bias is not None and not isinstance(bias, RelativePositionBias3D):
            raise TypeError(
                f"{op}: bias must be a RelativePositionBias3D or None, got {type(bias).__name__}"
            )
        self.query = nn.Linear(dim, dim, qkv_bias, device, dtype)
        self.key = nn.Linear(dim, dim, qkv_bias and key_bias, device, dtype)
        self.value = nn.Linear(dim, dim, qkv_bias, device, dtype)
        self.out = nn.Linear(dim, dim, True, device, dtype)
        self.bias = bias

    @overload
    def forward(
        self, tokens: Tensor, layout: BlockLayout, *, codes: Tensor | None = ...,
        key_lengths: Tensor | None = ..., return_saliency: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, tokens: Tensor, layout: BlockLayout, *, codes: Tensor | None = ...,
        key_lengths: Tensor | None = ..., return_saliency: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    @overload
    def forward(
        self, tokens: Tensor, layout: BlockLayout, *, codes: Tensor | None = ...,
        key_lengths: Tensor | None = ..., return_saliency: bool,
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip

    def forward(
        self,
        tokens: Tensor,
        layout: BlockLayout,
        *,
        codes: Tensor | None = None,
        key_lengths: Tensor | None = None,
        return_saliency: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            tokens: ``(batch, layout.seq_len, dim)``, globals first.
            layout: who attends whom.
            codes: position codes of the tokens, ``(num_tokens,)`` or ``(batch, num_tokens)``, where
                they are not the grid's own: after pruning, or in another order.
            key_lengths: int32 ``(batch,)``, tokens per sample that exist.
            return_saliency: also return the attention of the first global token.

        Returns:
            ``(batch, layout.seq_len, dim)``; with ``return_saliency`` also the saliency, fp32
            ``(batch, num_tokens)``.
        """
        _check_tokens("BlockSparseSelfAttention", "tokens", tokens, self.query.in_features)
        (tokens,) = _validation.autocast(tokens)  # once for all projections
        query, key, value = (
            split_heads(project(tokens), self.num_heads)
            for project in (self.query, self.key, self.value)
        )
        table = None
        if self.bias is not None:
            table = self.bias.table
            codes = self.bias.codes if codes is None else codes
        out, saliency = self._attend(
            query,
            key,
            value,
            layout,
            bias_table=table,
            position_codes=codes,
            key_lengths=key_lengths,
            return_saliency=return_saliency,
        )
        merged: Tensor = self.out(merge_heads(out))
        return merged if saliency is None else (merged, saliency)

    if TYPE_CHECKING:
        __call__ = forward

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output and saliency of the heads, the latter None unless asked for."""
        found = block_sparse_attention(query, key, value, layout, **options)
        return found if isinstance(found, tuple) else (found, None)


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence over another: projections around the op.

    Args:
        dim: width of the queries and of the result.
        num_heads: heads; must divide ``dim``.
        context_dim: width of the keys' and values' source; ``dim`` by default.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "CrossAttention"
        dim, self.num_heads = _check_heads(op, dim, num_heads)
        bias = _validation.check_flag(op, "bias", bias)
        device = _validation.check_device(op, device)
        _validation.check_dtype(op, dtype)
        source = dim
        if context_dim is not None:
            source = _validation.check_count(op, "context_dim", context_dim, least=1)
        self.query = nn.Linear(dim, dim, bias, device, dtype)
        self.key = nn.Linear(source, dim, bias, device, dtype)
        self.value = nn.Linear(source, dim, bias, device, dtype)
        self.out = nn.Linear(dim, dim, bias, device, dtype)

    @overload
    def forward(
        self, tokens: Tensor, context: Tensor, *, context_rows: Tensor | None = ...,
        key_padding_mask: Tensor | None = ..., return_saliency: None = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, tokens: Tensor, context: Tensor, *, context_rows: Tensor | None = ...,
        key_padding_mask: Tensor | None = ..., return_saliency: Saliency,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    @overload
    def forward(
        self, tokens: Tensor, context: Tensor, *, context_rows: Tensor | None = ...,
        key_padding_mask: Tensor | None = ..., return_saliency: Saliency | None,
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        *,
        context_rows: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        return_saliency: Saliency | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            tokens: queries, ``(batch, queries, dim)``.
            context: keys and values, ``(contexts, keys, context_dim)``.
            context_rows: int64 ``(batch,)``, the context of each row, projected once for all that
                share it; by default each has its own.
            key_padding_mask: bool ``(batch, keys)``, True = ignore.
            return_saliency: None, "cls" or "mean", see `svitt_ops.cross_attention`.

        Returns:
            ``(batch, queries, dim)``; with ``return_saliency`` also fp32 ``(batch, keys)``.
        """
        _check_tokens("CrossAttention", "tokens", tokens, self.query.in_features)
        _check_tokens("CrossAttention", "context", context, self.key.in_features)
        (source,) = _validation.autocast(context)  # once for all projections
        tokens = source if tokens is context else tokens
        key, value = self.key(source), self.value(source)
        if context_rows is not None:
            shape, device = (tokens.shape[0],), tokens.device
            _validation.check_exact(
                "CrossAttention", "context_rows", context_rows, (torch.int64,), (shape,), device
            )
            key, value = (x.index_select(0, context_rows) for x in (key, value))
        query, key, value = (
            split_heads(x, self.num_heads) for x in (self.query(tokens), key, value)
        )
        found = cross_attention(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            return_saliency=return_saliency,
        )
        if isinstance(found, tuple):
            return self.out(merge_heads(found[0])), found[1]
        merged: Tensor = self.out(merge_heads(found))
        return merged

    if TYPE_CHECKING:
        __call__ = forward


class TokenPruning(nn.Module):
    """Keeps a share of the tokens, the most salient ones, in their order.

    Args:
        keep_rate: share of the tokens that stay, more than 0 and at most 1; globals always stay.
        num_global: global tokens at the beginning.
    """

    def __init__(self, keep_rate: float, *, num_global: int = 1) -> None:
        super().__init__()
        keep_rate = _validation.check_float("TokenPruning", "keep_rate", keep_rate, "a number")
        if not 0 < keep_rate <= 1:
            raise ValueError(f"TokenPruning: keep_rate must be in (0, 1], got {keep_rate}")
        self.keep_rate = keep_rate
        self.num_global = _validation.check_count("TokenPruning", "num_global", num_global)

    def forward(
        self, tokens: Tensor, scores: Tensor, *, position_codes: Tensor | None = None
    ) -> PrunedTokens:
        """Prune ``(batch, num_global + n, dim)`` by scores ``(batch, n)``; see `prune_tokens`."""
        return prune_tokens(
            tokens,
            scores,
            keep_rate=self.keep_rate,
            num_global=self.num_global,
            position_codes=position_codes,
        )

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, num_global={self.num_global}"


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``(batch, tokens, dim)`` as ``(batch, heads, tokens, head_dim)``, a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """The inverse of `split_heads`; free for what the ops return."""
    return x.transpose(1, 2).flatten(2)


def _check_heads(module: str, dim: Any, num_heads: Any) -> tuple[int, int]:
    dim = _validation.check_count(module, "dim", dim, least=1)
    num_heads = _validation.check_int(module, "num_heads", num_heads)
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{module}: num_heads must divide dim {dim}, got {num_heads}")
    return dim, num_heads


def _check_tokens(module: str, name: str, x: Any, dim: int) -> None:
    """What a projection of ``dim`` inputs takes: ``(batch, tokens, dim)``."""
    _validation.check_dense(module, name, x)
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(
            f"{module}: {name} must have shape (batch, tokens, {dim}), got {tuple(x.shape)}"
        )

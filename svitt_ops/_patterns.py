"""Known attention patterns as layouts: windows, tiles, strided frames, and FlexAttention's masks.

`BlockLayout` inherits these constructors. A pattern of tokens becomes one of blocks by taking every
block that holds an attended pair, unless its constructor says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svitt_ops._validation import check_count, check_device, check_grid, check_sizes

if TYPE_CHECKING:
    from svitt_ops.layout import BlockLayout

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Patterns:
    """Constructors of `BlockLayout` by what the pattern is called."""

    @classmethod
    def neighborhood(
        cls: Any,
        grid: tuple[int, int, int],
        window: tuple[int, int, int],
        *,
        block_size: int = 56,
        num_global: int = 1,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """Local windows over frames, rows and columns, as of neighborhood attention.

        Along an axis of size L a token at i sees the ``window`` tokens from
        ``min(max(i - window // 2, 0), L - window)`` on: as many at a border as inside. A query
        block attends every block that holds a token which one of its tokens sees, so the layout
        covers the token-wise pattern and is wider by what rounding to blocks adds.

        Args:
            grid: T frames, H rows, W columns of tokens, in (t, h, w) order.
            window: frames, rows and columns of the window, at most those of the grid.
            block_size: tokens per block, 1 to 256.
            num_global: global tokens before the grid's.
            device: where the layout lives.

        Returns:
            A layout of ``T * H * W`` tokens without leading dimensions.

        Complexity:
            ``T * H * W`` times the window's frames and rows.

        Source:
            Neighborhood Attention Transformer (CVPR 2023), section 3.1.
        """
        op = "BlockLayout.neighborhood"
        grid, window = check_grid(op, "grid", grid), check_grid(op, "window", window)
        if any(w > size for w, size in zip(window, grid, strict=True)):
            raise ValueError(f"{op}: window must be at most the grid {grid}, got {window}")
        sizes = check_sizes(op, math.prod(grid), block_size, num_global)
        return _layout(cls, op, _blocks_of_runs(*_runs(grid, window), *sizes[:2]), sizes, device)

    @classmethod
    def sliding_window(
        cls: Any,
        num_tokens: int,
        window: int,
        *,
        block_size: int = 56,
        num_global: int = 0,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """A band: the blocks with a pair of tokens at most ``window`` apart.

        Args:
            num_tokens: tokens that are not global.
            window: largest ``|i - j|`` of an attended pair, 0 or more.
            block_size: tokens per block, 1 to 256.
            num_global: global tokens.
            device: where the layout lives.

        Returns:
            A layout without leading dimensions, which covers the token-wise band.

        Source:
            Longformer (2020), section 3.1.
        """
        op = "BlockLayout.sliding_window"
        num_tokens, block_size, _ = sizes = check_sizes(op, num_tokens, block_size, num_global)
        window = check_count(op, "window", window)
        numbers = torch.arange(-(-num_tokens // block_size))
        between = (numbers[:, None] - numbers).abs()
        nearest = (between - 1) * block_size + 1  # of the tokens of two blocks, for distinct ones
        return _layout(cls, op, (between == 0) | (nearest <= window), sizes, device)

    @classmethod
    def sliding_tile(
        cls: Any,
        grid: tuple[int, int, int],
        tile: tuple[int, int, int],
        window: tuple[int, int, int],
        *,
        num_global: int = 0,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """Windows of whole tiles, exact: a tile of tokens is a block.

        The tokens have to come tile by tile: ``x.unflatten(1, (T // t, t, H // h, h, W // w, w))``
        of ``x (batch, T * H * W, ...)``, permuted to ``(0, 1, 3, 5, 2, 4, 6, ...)`` and flattened.

        Args:
            grid: T frames, H rows, W columns of tokens.
            tile: t, h and w of a tile; must divide the grid, with at most 256 tokens.
            window: tiles along each axis that a tile attends, itself in the middle; as of
                `neighborhood`, over tiles.
            num_global: global tokens before the grid's.
            device: where the layout lives.

        Returns:
            A layout of blocks of ``t * h * w`` tokens, without leading dimensions.

        Source:
            Fast Video Generation with Sliding Tile Attention (ICML 2025), section 3.
        """
        op = "BlockLayout.sliding_tile"
        grid, tile = check_grid(op, "grid", grid), check_grid(op, "tile", tile)
        if any(size % t for t, size in zip(tile, grid, strict=True)):
            raise ValueError(f"{op}: tile must divide the grid {grid}, got {tile}")
        frames, rows, columns = (size // t for t, size in zip(tile, grid, strict=True))
        tiles, window = (frames, rows, columns), check_grid(op, "window", window)
        if any(w > size for w, size in zip(window, tiles, strict=True)):
            raise ValueError(f"{op}: window must be at most the {tiles} tiles, got {window}")
        sizes = check_sizes(op, math.prod(grid), math.prod(tile), num_global)
        mask = _blocks_of_runs(*_runs(tiles, window), math.prod(tiles), 1)
        return _layout(cls, op, mask, sizes, device)

    @classmethod
    def strided_frames(
        cls: Any,
        grid: tuple[int, int, int],
        stride: int,
        *,
        block_size: int = 56,
        num_global: int = 1,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """Whole frames at a stride: frame t attends the frames t', ``(t - t') % stride == 0``.

        Args:
            grid: T frames, H rows, W columns of tokens, in (t, h, w) order.
            stride: 1 is dense, T or more each frame by itself.
            block_size: tokens per block, 1 to 256. Where it divides ``H * W`` the pattern is exact,
                else the layout covers it.
            num_global: global tokens before the grid's.
            device: where the layout lives.

        Returns:
            A layout of ``T * H * W`` tokens without leading dimensions.

        Source:
            Generating Long Sequences with Sparse Transformers (2019), section 4.2, over frames.
        """
        op = "BlockLayout.strided_frames"
        frames, height, width = check_grid(op, "grid", grid)
        stride = check_count(op, "stride", stride, least=1)
        size = height * width
        num_tokens, block_size, _ = sizes = check_sizes(op, frames * size, block_size, num_global)
        starts = torch.arange(0, num_tokens, block_size)
        ends = (starts + block_size).clamp(max=num_tokens)
        t = torch.arange(frames)
        holds = (t * size < ends[:, None]) & ((t + 1) * size > starts[:, None])
        attends = (t[:, None] - t) % stride == 0
        mask = holds.float() @ attends.float() @ holds.float().T > 0
        return _layout(cls, op, mask, sizes, device)

    @classmethod
    def from_mask_mod(
        cls: Any,
        mask_mod: MaskMod,
        seq_len: int,
        *,
        block_size: int = 128,
        num_global: int = 0,
        batch: int | None = None,
        heads: int | None = None,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """Take the pattern of a FlexAttention ``mask_mod`` that is constant within blocks.

        Evaluated on index tensors, the rows of one block at a time.

        Args:
            mask_mod: of batch, head, query and key index, True where the query attends the key.
            seq_len: tokens of the sequence, globals included.
            block_size: tokens per block, 1 to 256.
            num_global: tokens at the start that attend all and are attended by all.
            batch: samples to evaluate it for; None if it is the same for all.
            heads: heads to evaluate it for; None if it is the same for all.
            device: where it is evaluated and the layout lives.

        Returns:
            A layout with leading dimensions ``()``, ``(heads,)`` or ``(batch, heads)``.

        Raises:
            ValueError: naming a query and a key where the mask is not constant within a block, or
                where a global token is masked.

        Complexity:
            ``seq_len ** 2`` evaluations; memory ``block_size * seq_len`` for each sample and head.
        """
        from torch.nn.attention.flex_attention import create_mask

        op = "BlockLayout.from_mask_mod"
        if not callable(mask_mod):
            raise TypeError(f"{op}: mask_mod must be callable, got {type(mask_mod).__name__}")
        seq_len = check_count(op, "seq_len", seq_len)
        if check_count(op, "num_global", num_global) > seq_len:
            raise ValueError(f"{op}: num_global must be at most {seq_len}, got {num_global}")
        sizes = check_sizes(op, seq_len - num_global, block_size, num_global)
        num_tokens, block_size, num_global = sizes
        for name, count in (("batch", batch), ("heads", heads)):
            if count is not None:
                check_count(op, name, count, least=1)
        place = str(check_device(op, device) or torch.get_default_device())

        def rows(start: int, stop: int) -> Tensor:
            """Bool (batch, heads, stop - start, seq_len)."""

            def shifted(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return mask_mod(b, h, q + start, k)

            return create_mask(shifted, batch, heads, stop - start, seq_len, place)

        if num_global:
            _require(op, "True for a global token", rows(0, num_global), True, 0, 0)
        found = []
        for start in range(num_global, seq_len, block_size):
            mask = rows(start, min(start + block_size, seq_len))
            _require(op, "True for a global token", mask[..., :num_global], True, start, 0)
            mask = mask[..., num_global:]
            block = mask[..., :1, ::block_size]
            wide = block.repeat_interleave(block_size, -1)[..., :num_tokens]
            words = f"constant within each {block_size} x {block_size} block"
            _require(op, words, mask, wide, start, num_global)
            found.append(block)
        blocks = torch.cat(found, -2) if found else torch.ones(batch or 1, heads or 1, 0, 0).bool()
        if batch is None:
            blocks = blocks[0] if heads is not None else blocks[0, 0]
        return _layout(cls, op, blocks, sizes, place)


def _layout(
    cls: Any, op: str, mask: Tensor, sizes: tuple[int, int, int], device: Any
) -> BlockLayout:
    """`BlockLayout.from_mask` on a device; sizes are tokens, block size and global tokens."""
    mask = mask.to(check_device(op, device) or torch.get_default_device())
    layout: BlockLayout = cls.from_mask(
        mask, num_tokens=sizes[0], block_size=sizes[1], num_global=sizes[2]
    )
    return layout


def _runs(grid: tuple[int, int, int], window: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """First and last token, ``(tokens, runs)``, of each run of columns that a token sees."""
    starts = [
        (torch.arange(size) - w // 2).clamp(0, size - w)
        for size, w in zip(grid, window, strict=True)
    ]
    t, h = (starts[axis][:, None] + torch.arange(window[axis]) for axis in (0, 1))
    rows = t[:, None, :, None] * grid[1] + h[None, :, None, :]  # (T, H, window T, window H)
    first = rows.flatten(2)[:, :, None] * grid[2] + starts[2][:, None]
    first = first.flatten(0, 2)
    return first, first + window[2] - 1


def _blocks_of_runs(first: Tensor, last: Tensor, num_tokens: int, block_size: int) -> Tensor:
    """Bool ``(blocks, blocks)``: the blocks that the runs of a block's tokens touch."""
    blocks = -(-num_tokens // block_size)
    query = (torch.arange(num_tokens) // block_size)[:, None].expand_as(first)
    # A run opens at its first block and closes behind its last: marked where more opened.
    open_runs = torch.zeros(blocks, blocks + 1, dtype=torch.int64)
    one = torch.ones_like(first)
    open_runs.index_put_((query, first // block_size), one, accumulate=True)
    open_runs.index_put_((query, last // block_size + 1), -one, accumulate=True)
    return open_runs.cumsum(1)[:, :blocks] > 0


def _require(
    op: str, words: str, mask: Tensor, wanted: Tensor | bool, query: int, key: int
) -> None:
    """That a mask whose corner is at this query and key is as wanted, else say where it is not."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask_mod must return bool, got {mask.dtype}")
    wrong = mask != wanted
    if bool(wrong.any()):
        b, h, q, k = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: mask_mod must be {words}, got {bool(mask[b, h, q, k])} for query {query + q} "
            f"and key {key + k} of sample {b}, head {h}"
        )

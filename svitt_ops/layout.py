"""`BlockLayout`: which query block attends which key blocks, in both directions.

Source: SViTT (CVPR 2023), section 3.2, "edge sparsity".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from svitt_ops import _library
from svitt_ops._ops import ops
from svitt_ops._patterns import Patterns
from svitt_ops._validation import MAX_BLOCK_SIZE as MAX_BLOCK_SIZE
from svitt_ops._validation import (
    check_count,
    check_dense,
    check_device,
    check_generator,
    check_sizes,
    readable,
)
from svitt_ops.randomness import SeededGenerator, rand

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_SIZES = ("num_tokens", "block_size", "num_global")
_LISTS = ("key_counts", "key_blocks", "query_counts", "query_blocks")


@dataclass(frozen=True, eq=False)
class BlockLayout(Patterns):
    """A block-sparse attention pattern over ``num_global + num_tokens`` tokens.

    The first ``num_global`` tokens attend everything and are attended by everything. The other
    ``num_tokens`` are cut into ``ceil(num_tokens / block_size)`` blocks, the last one ragged; query
    block ``i`` attends the key blocks listed for ``i``. Lists hold distinct blocks, ascending.

    Build one with `local_random`, `from_mask` or `from_block_mask`, or by its pattern's name with
    `neighborhood`, `sliding_window`, `sliding_tile`, `strided_frames` or `from_mask_mod`; the plain
    constructor takes the lists themselves, as FlexAttention's ``BlockMask`` has them, and checks
    every entry.

    Attributes:
        num_tokens: tokens that are not global.
        block_size: tokens per block, 1 to 256.
        num_global: global tokens at the start of the sequence.
        key_counts: int32 ``(..., blocks)``, key blocks that each query block attends.
        key_blocks: int32 ``(..., blocks, width)``, their numbers, unused past the count.
        query_counts: int32 ``(..., blocks)``, query blocks that attend each key block.
        query_blocks: int32 ``(..., blocks, width)``, their numbers: the transposed relation.

    Leading dimensions are ``()``, ``(heads,)`` or ``(batch, heads)``; a size of 1 broadcasts.
    """

    num_tokens: int
    block_size: int
    num_global: int
    key_counts: Tensor
    key_blocks: Tensor
    query_counts: Tensor
    query_blocks: Tensor
    trusted: InitVar[bool] = False

    def __post_init__(self, trusted: bool) -> None:
        if not trusted:
            sizes = check_sizes("BlockLayout", self.num_tokens, self.block_size, self.num_global)
            for name, size in zip(_SIZES, sizes, strict=True):
                object.__setattr__(self, name, size)
            self._check_lists()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a call of the constructor, which checks what a file holds."""
        lists, sizes = _flatten(self)
        return BlockLayout, (*sizes, *lists)

    @classmethod
    def local_random(
        cls,
        num_tokens: int,
        *,
        block_size: int = 56,
        num_local: int = 1,
        num_random: int = 3,
        num_global: int = 1,
        generator: torch.Generator | SeededGenerator | None = None,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """Draw SViTT's pattern: a wrapping local window and random blocks per query block.

        The window covers blocks ``i - num_local // 2`` to ``i + (num_local - 1) // 2`` modulo the
        number of blocks. Random blocks are uniform without replacement over the others; where there
        are fewer than asked, all of them are taken. Drawing never synchronises host and device, and
        takes ``blocks * blocks`` numbers from the generator, none where ``num_random`` is 0.

        Args:
            num_tokens: tokens that are not global.
            block_size: tokens per block, 1 to 256.
            num_local: blocks in the local window; odd numbers centre it.
            num_random: random blocks per query block.
            num_global: global tokens.
            generator: source of randomness, torch's own if None; its device draws the noise.
            device: where the layout lives; the generator's device if not given, else the default.

        Returns:
            A layout without leading dimensions.
        """
        op = "BlockLayout.local_random"
        sizes = check_sizes(op, num_tokens, block_size, num_global)
        num_local = check_count(op, "num_local", num_local)
        num_random = check_count(op, "num_random", num_random)
        device = check_device(op, device)
        check_generator(op, generator)
        blocks = -(-sizes[0] // sizes[1])
        if num_random > 0:
            noise = rand((blocks, blocks), generator, device)
        else:
            place = device if generator is None or device is not None else generator.device
            noise = torch.zeros(blocks, blocks, device=place)
        drawn = ops.draw_block_layout(noise, num_local, num_random)
        return cls(*sizes, drawn[0], drawn[1], drawn[2], drawn[3], trusted=True)

    @classmethod
    def from_mask(
        cls, mask: Tensor, *, num_tokens: int, block_size: int, num_global: int = 1
    ) -> BlockLayout:
        """Take the blocks that a mask marks.

        Args:
            mask: bool ``(..., blocks, blocks)``, True where query block (row) attends key block.
            num_tokens: tokens that are not global.
            block_size: tokens per block, 1 to 256.
            num_global: global tokens.

        Returns:
            A layout with the mask's leading dimensions, on the mask's device.
        """
        op = "BlockLayout.from_mask"
        sizes = check_sizes(op, num_tokens, block_size, num_global)
        check_dense(op, "mask", mask, "a bool tensor")
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask must be a bool tensor, got {mask.dtype}")
        blocks = -(-sizes[0] // sizes[1])
        if mask.dim() not in (2, 3, 4) or mask.shape[-2:] != (blocks, blocks):
            raise ValueError(
                f"{op}: mask must have shape ({blocks}, {blocks}), (heads, {blocks}, {blocks}) or "
                f"(batch, heads, {blocks}, {blocks}) for {num_tokens} tokens in blocks of "
                f"{block_size}, got {tuple(mask.shape)}"
            )
        return cls(*sizes, *_lists(mask), *_lists(mask.mT), trusted=True)

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> BlockLayout:
        """Take over a FlexAttention ``BlockMask`` whose mask is constant within every block.

        Args:
            block_mask: square, block size 1 to 256. Its ``mask_mod``, if any, is evaluated on all
                token pairs to prove that partial blocks are in truth full ones.

        Returns:
            A layout without global tokens and with leading dimensions ``(batch, heads)``; a mask
            made by `to_block_mask` gives back the layout that it came from.

        Raises:
            ValueError: if the mask is not square, or not constant within a block.
        """
        from torch.nn.attention.flex_attention import create_mask, noop_mask

        op = "BlockLayout.from_block_mask"
        if not hasattr(block_mask, "kv_num_blocks"):
            raise TypeError(
                f"{op}: block_mask must be a BlockMask, got {type(block_mask).__name__}"
            )
        length, key_length = block_mask.seq_lengths
        block_size, key_block_size = block_mask.BLOCK_SIZE
        if length != key_length or block_size != key_block_size:
            raise ValueError(
                f"{op}: block_mask must be square in tokens and in block size, got lengths "
                f"{(length, key_length)} and block sizes {(block_size, key_block_size)}"
            )
        device = block_mask.kv_indices.device
        source = getattr(block_mask.mask_mod, "layout", None)
        if isinstance(source, BlockLayout) and source.seq_len == length:
            return source.to(device)
        check_sizes(op, length, block_size, 0)
        blocks = -(-length // block_size)
        counts, numbers = block_mask.kv_num_blocks, block_mask.kv_indices
        _check_numbers(op, "kv", counts, numbers, blocks)
        mask = _marked(counts, numbers, blocks)
        partial = bool(mask.any()) and block_mask.mask_mod is not noop_mask
        if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
            counts, numbers = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
            _check_numbers(op, "full_kv", counts, numbers, blocks)
            mask = mask | _marked(counts, numbers, blocks)
        layout = cls.from_mask(mask, num_tokens=length, block_size=block_size, num_global=0)
        if partial:
            batch, heads = mask.shape[:2]
            dense = create_mask(block_mask.mask_mod, batch, heads, length, length, str(device))
            if not torch.equal(dense.expand(batch, heads, length, length), layout.to_dense()):
                raise ValueError(
                    f"{op}: block_mask must be constant within each {block_size} x {block_size} "
                    "block, got a mask_mod that masks single tokens"
                )
        return layout

    def to_block_mask(self, *, block_size: int | None = None) -> BlockMask:
        """The same attention pattern for FlexAttention.

        Args:
            block_size: of the result; this layout's own if it has no global tokens, else 128, which
                FlexAttention's GPU kernels need. Global tokens shift the block grid, so with them
                the pattern is carried by a ``mask_mod`` over partial blocks.

        Returns:
            A ``BlockMask`` of ``seq_len`` x ``seq_len`` on this layout's device.
        """
        from torch.nn.attention.flex_attention import create_block_mask

        if block_size is not None:
            block_size = check_count("BlockLayout.to_block_mask", "block_size", block_size, least=1)
        else:
            block_size = 128 if self.num_global else self.block_size
        batch, heads = (None, None, *self.key_counts.shape[:-1])[-2:]
        dense = self.to_dense()

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return dense[(b, h, q, k)[4 - dense.dim() :]]

        mask_mod.layout = self  # type: ignore[attr-defined]  # lets from_block_mask come back
        return create_block_mask(
            mask_mod, batch, heads, self.seq_len, self.seq_len, dense.device, block_size
        )

    @property
    def seq_len(self) -> int:
        """Tokens of the whole sequence, globals included."""
        return self.num_global + self.num_tokens

    @property
    def num_blocks(self) -> int:
        """Blocks that the ``num_tokens`` are cut into."""
        return -(-self.num_tokens // self.block_size)

    @property
    def device(self) -> torch.device:
        """Where the lists live."""
        return self.key_blocks.device

    @property
    def num_edges(self) -> int:
        """Attended (query, key) token pairs, globals included, summed over leading dimensions.

        Reads the lists, and so waits for the device.
        """
        sizes = torch.full((self.num_blocks,), self.block_size, device=self.device)
        if self.num_blocks:
            sizes[-1] -= self.num_blocks * self.block_size - self.num_tokens
        local = (self.to_mask() * sizes[:, None] * sizes).sum()
        copies = self.key_counts.shape[:-1].numel()
        return int(local) + copies * self.num_global * (self.seq_len + self.num_tokens)

    @property
    def density(self) -> float:
        """`num_edges` relative to dense attention, 0 to 1."""
        pairs = self.key_counts.shape[:-1].numel() * self.seq_len**2
        return self.num_edges / pairs if pairs else 1.0

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        op, to = "BlockLayout.to", check_device("BlockLayout.to", device)
        if to is None:
            raise TypeError(f"{op}: device must be a torch.device or its name, got NoneType")
        lists, sizes = _flatten(self)
        return _unflatten([x.to(to) for x in lists], sizes)

    def to_mask(self) -> Tensor:
        """Bool ``(..., blocks, blocks)``, True where the query block attends the key block."""
        return _marked(self.key_counts, self.key_blocks, self.num_blocks)

    def to_dense(self) -> Tensor:
        """Bool ``(..., seq_len, seq_len)``, True where the token attends; globals included."""
        mask = self.to_mask()
        for dim in (-2, -1):
            mask = mask.repeat_interleave(self.block_size, dim).narrow(dim, 0, self.num_tokens)
        before = self.num_global
        return torch.nn.functional.pad(mask, (before, 0, before, 0), value=True)

    def _check_lists(self) -> None:
        for name in _LISTS:
            check_dense("BlockLayout", name, getattr(self, name))
        blocks, lead = self.num_blocks, self.key_counts.shape[:-1]
        for name in ("key", "query"):
            counts, numbers = getattr(self, f"{name}_counts"), getattr(self, f"{name}_blocks")
            for label, tensor in ((f"{name}_counts", counts), (f"{name}_blocks", numbers)):
                if tensor.dtype != torch.int32:
                    raise TypeError(f"BlockLayout: {label} must be int32, got {tensor.dtype}")
                if tensor.device != self.key_counts.device:
                    raise ValueError(
                        f"BlockLayout: {label} must be on {self.key_counts.device}, "
                        f"got {tensor.device}"
                    )
            if len(lead) > 2 or counts.shape != (*lead, blocks):
                raise ValueError(
                    f"BlockLayout: {name}_counts must have shape (..., {blocks}) with up to two "
                    f"leading dimensions, got {tuple(counts.shape)}"
                )
            if numbers.shape[:-1] != (*lead, blocks):
                raise ValueError(
                    f"BlockLayout: {name}_blocks must have shape {(*lead, blocks)} and a width, "
                    f"got {tuple(numbers.shape)}"
                )
        if not all(readable(getattr(self, name), any_device=True) for name in _LISTS):
            return  # traced, or without values
        for name in ("key", "query"):
            counts, numbers = getattr(self, f"{name}_counts"), getattr(self, f"{name}_blocks")
            _check_numbers("BlockLayout", name, counts, numbers, blocks)
            used = _used(counts, numbers)
            rising = (numbers[..., 1:] > numbers[..., :-1]) | ~used[..., 1:]
            if not bool(rising.all()):
                raise ValueError(f"BlockLayout: {name}_blocks must ascend without repetition")
        rows = _marked(self.key_counts, self.key_blocks, blocks)
        columns = _marked(self.query_counts, self.query_blocks, blocks)
        if not torch.equal(rows, columns.mT):
            raise ValueError(
                "BlockLayout: query_counts and query_blocks must be the transposed relation of "
                "key_counts and key_blocks"
            )


def _flatten(layout: BlockLayout) -> tuple[list[Any], tuple[int, ...]]:
    return [getattr(layout, name) for name in _LISTS], tuple(getattr(layout, x) for x in _SIZES)


def _flatten_with_keys(layout: BlockLayout) -> tuple[list[Any], tuple[int, ...]]:
    lists, sizes = _flatten(layout)
    return [(pytree.GetAttrKey(name), x) for name, x in zip(_LISTS, lists, strict=True)], sizes


def _unflatten(lists: Iterable[Any], sizes: tuple[int, ...]) -> BlockLayout:
    """Unchecked: torch also puts other things than tensors in their places."""
    build: Any = BlockLayout
    return cast(BlockLayout, build(*sizes, *lists, trusted=True))


# A tree of four tensors to torch: an input of `torch.export`, an argument of `torch.func`.
pytree.register_pytree_node(
    BlockLayout,
    _flatten,
    _unflatten,
    serialized_type_name=f"{_library.NAMESPACE}.BlockLayout",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([BlockLayout])


def _used(counts: Tensor, numbers: Tensor) -> Tensor:
    return torch.arange(numbers.shape[-1], device=numbers.device) < counts.unsqueeze(-1)


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and ascending numbers of the marked entries of each row; unused entries are 0."""
    counts = mask.sum(-1, dtype=torch.int32)
    # A stable sort of the inverted mask brings the marked columns to the front, in order.
    numbers = mask.logical_not().to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
    return counts, numbers.masked_fill(_used(counts, numbers).logical_not(), 0)


def _check_numbers(op: str, direction: str, counts: Tensor, numbers: Tensor, blocks: int) -> None:
    low, high = 0, numbers.shape[-1]
    if bool(((counts < low) | (counts > high)).any()):
        raise ValueError(
            f"{op}: {direction}_counts must be {low} to {high}, "
            f"got {int(counts.min())} to {int(counts.max())}"
        )
    if bool(((numbers < 0) | (numbers >= blocks)).any()):
        raise ValueError(
            f"{op}: {direction}_blocks must name blocks 0 to {blocks - 1}, "
            f"got {int(numbers.min())} to {int(numbers.max())}"
        )


def _marked(counts: Tensor, numbers: Tensor, blocks: int) -> Tensor:
    """The mask that lists describe."""
    # Unused entries go to a spare column that is cut off.
    target = numbers.long().masked_fill(_used(counts, numbers).logical_not(), blocks)
    mask = torch.zeros(*numbers.shape[:-1], blocks + 1, dtype=torch.bool, device=numbers.device)
    return mask.scatter_(-1, target, True).narrow(-1, 0, blocks)


def _draw(noise: Tensor, num_local: int, num_random: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain-PyTorch definition of ``svitt_ops::draw_block_layout``."""
    blocks = noise.shape[-1]
    number = torch.arange(blocks, device=noise.device)
    offset = number - number[:, None] + num_local // 2
    local = offset.remainder(blocks) < num_local if blocks else offset < num_local
    num_random = min(num_random, max(blocks - num_local, 0))
    order = noise.masked_fill(local, -1.0).argsort(dim=-1, descending=True, stable=True)
    mask = local.expand(noise.shape).clone()
    mask.scatter_(-1, order[..., :num_random], True)
    key_counts, key_blocks = _lists(mask)
    width = min(num_local + num_random, blocks)
    return key_counts, key_blocks[..., :width].contiguous(), *_lists(mask.mT)


def _draw_fake(
    noise: Tensor, num_local: int, num_random: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks = noise.shape[-1]
    counts = noise.new_empty(noise.shape[:-1], dtype=torch.int32)
    width = min(num_local + num_random, blocks)
    key_blocks = noise.new_empty((*noise.shape[:-1], width), dtype=torch.int32)
    query_blocks = noise.new_empty(noise.shape, dtype=torch.int32)
    return counts, key_blocks, torch.empty_like(counts), query_blocks


_library.define(
    "draw_block_layout(Tensor noise, int num_local, int num_random)"
    " -> (Tensor key_counts, Tensor key_blocks, Tensor query_counts, Tensor query_blocks)",
    fake=_draw_fake,
    cpu=_draw,
    cuda_module="block_layout",
    compiled=False,
)

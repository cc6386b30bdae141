"""Constructors of known patterns, against the pattern token by token."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import svitt_ops as so
from svitt_ops import BlockLayout

Grid = tuple[int, int, int]


def seen(grid: Grid, window: Grid) -> Tensor:
    """Bool (tokens, tokens): neighborhoods one token at a time."""
    tokens = [(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]

    def sees(i: tuple[int, ...], j: tuple[int, ...]) -> bool:
        starts = [min(max(a - n // 2, 0), L - n) for a, n, L in zip(i, window, grid, strict=True)]
        return all(s <= b < s + n for b, s, n in zip(j, starts, window, strict=True))

    return torch.tensor([[sees(i, j) for j in tokens] for i in tokens])


def covered(mask: Tensor, block_size: int) -> Tensor:
    """The blocks with a marked pair."""
    n = mask.shape[0]
    blocks = -(-n // block_size)
    return torch.tensor(
        [
            [
                bool(mask[q : q + block_size, k : k + block_size].any())
                for k in range(0, blocks * block_size, block_size)
            ]
            for q in range(0, blocks * block_size, block_size)
        ]
    )


@pytest.mark.parametrize(
    ("grid", "window", "block_size"),
    [((4, 5, 6), (3, 3, 3), 7), ((3, 4, 5), (1, 2, 5), 4), ((1, 6, 6), (1, 3, 4), 36)],
)
def test_a_neighborhood_covers_each_token_s_window(
    grid: Grid, window: Grid, block_size: int
) -> None:
    layout = BlockLayout.neighborhood(grid, window, block_size=block_size, num_global=2)
    assert layout.num_global == 2 and layout.seq_len == 2 + grid[0] * grid[1] * grid[2]
    assert torch.equal(layout.to_mask(), covered(seen(grid, window), block_size))


def test_a_neighborhood_of_blocks_of_one_token_is_exact() -> None:
    layout = BlockLayout.neighborhood((3, 4, 4), (3, 3, 3), block_size=1, num_global=0)
    assert torch.equal(layout.to_dense(), seen((3, 4, 4), (3, 3, 3)))
    assert set(layout.key_counts.tolist()) == {27}  # as many at a border as inside


@pytest.mark.parametrize("window", [0, 1, 8, 9, 17])
def test_a_sliding_window_is_the_band_s_blocks(window: int) -> None:
    i = torch.arange(35)
    layout = BlockLayout.sliding_window(35, window, block_size=8)
    assert torch.equal(layout.to_mask(), covered((i[:, None] - i).abs() <= window, 8))


def test_sliding_tiles_are_neighborhoods_of_tiles() -> None:
    grid, tile, window = (4, 6, 4), (2, 3, 2), (1, 1, 2)
    layout = BlockLayout.sliding_tile(grid, tile, window)
    assert layout.block_size == 12
    assert torch.equal(layout.to_mask(), seen((2, 2, 2), window))
    # Of tokens brought into the documented order, a block is a tile.
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, 2)
    x = places[None].unflatten(1, (2, 2, 2, 3, 2, 2)).permute(0, 1, 3, 5, 2, 4, 6, 7)
    tiles = x.reshape(8, 12, 3) // torch.tensor(tile)
    assert bool((tiles == tiles[:, :1]).all())


@pytest.mark.parametrize("block_size", [4, 6, 12, 20])
@pytest.mark.parametrize("stride", [1, 2, 7])
def test_strided_frames_attend_frames_at_a_stride(block_size: int, stride: int) -> None:
    frame = torch.arange(60) // 12
    layout = BlockLayout.strided_frames((5, 3, 4), stride, block_size=block_size, num_global=0)
    pairs = (frame[:, None] - frame) % stride == 0
    assert torch.equal(layout.to_mask(), covered(pairs, block_size))
    if 12 % block_size == 0:
        assert torch.equal(layout.to_dense(), pairs)


def head_bands(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q // 4 - k // 4).abs() <= h


def samples(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q // 4 == k // 4) | (k // 4 == b + h)


@pytest.mark.parametrize(
    ("mask_mod", "sizes", "lead"),
    [
        (head_bands, {"heads": 3}, (3,)),
        (head_bands, {}, ()),
        (samples, {"batch": 2, "heads": 2}, (2, 2)),
        (samples, {"batch": 2}, (2, 1)),
    ],
)
def test_a_mask_mod_becomes_its_blocks(
    mask_mod: Callable[..., Tensor], sizes: dict[str, int], lead: tuple[int, ...]
) -> None:
    layout = BlockLayout.from_mask_mod(mask_mod, 22, block_size=4, **sizes)
    assert layout.key_counts.shape == (*lead, 6)
    b, h = (torch.arange(sizes.get(name, 1)) for name in ("batch", "heads"))
    i = torch.arange(22)
    dense = mask_mod(b[:, None, None, None], h[:, None, None], i[:, None], i)
    assert torch.equal(
        layout.to_dense().expand(b.numel(), h.numel(), 22, 22),
        dense.expand(b.numel(), h.numel(), 22, 22),
    )


def test_a_mask_mod_may_have_global_tokens() -> None:
    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q < 1) | (k < 1) | ((q - 1) // 4 == (k - 1) // 4)

    layout = BlockLayout.from_mask_mod(mask_mod, 14, block_size=4, num_global=1)
    assert (layout.num_tokens, layout.num_global) == (13, 1)
    assert torch.equal(layout.to_mask(), torch.eye(4, dtype=torch.bool))


def test_a_layout_of_a_pattern_is_taken_by_the_op() -> None:
    q, k, v = (torch.randn(1, 2, 61, 8) for _ in range(3))
    layout = BlockLayout.neighborhood((3, 4, 5), (1, 3, 3), block_size=6)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~layout.to_dense(), float("-inf"))
    torch.testing.assert_close(so.block_sparse_attention(q, k, v, layout), scores.softmax(-1) @ v)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (
            lambda: BlockLayout.neighborhood((2, 3, 4), (3, 3, 3)),
            ValueError,
            r"neighborhood: window must be at most the grid \(2, 3, 4\), got \(3, 3, 3\)",
        ),
        (
            lambda: BlockLayout.neighborhood((2, 3), (1, 1, 1)),
            ValueError,
            r"neighborhood: grid must be 3 positive ints, got \(2, 3\)",
        ),
        (
            lambda: BlockLayout.sliding_window(10, -1),
            ValueError,
            "sliding_window: window must be at least 0, got -1",
        ),
        (
            lambda: BlockLayout.sliding_window(10, 1, block_size=257),
            ValueError,
            "sliding_window: block_size must be 1 to 256, got 257",
        ),
        (
            lambda: BlockLayout.sliding_tile((4, 4, 4), (3, 2, 2), (1, 1, 1)),
            ValueError,
            r"sliding_tile: tile must divide the grid \(4, 4, 4\), got \(3, 2, 2\)",
        ),
        (
            lambda: BlockLayout.sliding_tile((4, 4, 4), (2, 2, 2), (3, 1, 1)),
            ValueError,
            r"sliding_tile: window must be at most the \(2, 2, 2\) tiles, got \(3, 1, 1\)",
        ),
        (
            lambda: BlockLayout.strided_frames((2, 2, 2), 0),
            ValueError,
            "strided_frames: stride must be at least 1, got 0",
        ),
        (
            lambda: BlockLayout.from_mask_mod(lambda b, h, q, k: q >= k, 12, block_size=4),
            ValueError,
            "from_mask_mod: mask_mod must be constant within each 4 x 4 block, got False for query "
            "0 and key 1 of sample 0, head 0",
        ),
        (
            lambda: BlockLayout.from_mask_mod(
                lambda b, h, q, k: q == k, 4, block_size=1, num_global=1
            ),
            ValueError,
            "from_mask_mod: mask_mod must be True for a global token, got False for query 0 and "
            "key 1",
        ),
        (
            lambda: BlockLayout.from_mask_mod(lambda b, h, q, k: q + k, 12, block_size=4),
            TypeError,
            "from_mask_mod: mask_mod must return bool, got torch.int64",
        ),
        (
            lambda: BlockLayout.from_mask_mod(torch.ones(3), 12),
            TypeError,
            "from_mask_mod: mask_mod must be callable, got Tensor",
        ),
        (
            lambda: BlockLayout.from_mask_mod(head_bands, 3, num_global=4),
            ValueError,
            "from_mask_mod: num_global must be at most 3, got 4",
        ),
    ],
)
def test_bad_patterns_are_refused(
    build: Callable[[], BlockLayout], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        build()

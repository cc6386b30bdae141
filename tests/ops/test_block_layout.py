"""BlockLayout: drawing, conversion, counting."""

from __future__ import annotations

import pytest
import torch

import svitt_ops as so
from svitt_ops.testing import route_to

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@given(
    num_tokens=st.integers(0, 130),
    block_size=st.integers(1, 40),
    num_local=st.integers(0, 5),
    num_random=st.integers(0, 9),
    num_global=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_local_random(
    num_tokens: int, block_size: int, num_local: int, num_random: int, num_global: int, seed: int
) -> None:
    def draw() -> so.BlockLayout:
        return so.BlockLayout.local_random(
            num_tokens,
            block_size=block_size,
            num_local=num_local,
            num_random=num_random,
            num_global=num_global,
            generator=torch.Generator().manual_seed(seed),
        )

    layout = draw()
    blocks = -(-num_tokens // block_size)
    mask = layout.to_mask()
    assert mask.shape == (blocks, blocks) and layout.seq_len == num_tokens + num_global
    assert bool((mask.sum(1) == min(num_local + num_random, blocks)).all())
    for i in range(blocks):
        for step in range(min(num_local, blocks)):
            assert mask[i, (i - num_local // 2 + step) % blocks]
    dense = layout.to_dense()
    assert layout.num_edges == int(dense.sum())
    if layout.seq_len:
        assert layout.density == pytest.approx(dense.float().mean().item())
    assert bool(dense[:num_global].all()) and bool(dense[:, :num_global].all())
    for i in range(0, num_tokens, 7):
        for j in range(0, num_tokens, 5):
            pair = dense[num_global + i, num_global + j]
            assert pair == mask[i // block_size, j // block_size]
    # The plain constructor checks every list, so it accepts what was drawn.
    names = ("key_counts", "key_blocks", "query_counts", "query_blocks")
    so.BlockLayout(num_tokens, block_size, num_global, *(getattr(layout, n) for n in names))
    again = draw()
    assert all(torch.equal(getattr(layout, n), getattr(again, n)) for n in names)


@pytest.mark.parametrize("own", [True, False])
def test_without_random_blocks_nothing_is_drawn(own: bool) -> None:
    """The draws that follow are those of a run without such a layout, seed for seed."""
    generator = torch.Generator().manual_seed(3) if own else None
    torch.manual_seed(3)
    states = generator or torch.default_generator
    before = states.get_state()
    for num_local in (0, 1, 3, 20):
        found = so.BlockLayout.local_random(
            500, num_local=num_local, num_random=0, generator=generator
        )
        noise = torch.rand(9, 9, generator=torch.Generator().manual_seed(1))
        drawn = torch.ops.svitt_ops.draw_block_layout(noise, num_local, 0)
        assert torch.equal(found.key_blocks, drawn[1]) and torch.equal(found.query_blocks, drawn[3])
    assert torch.equal(states.get_state(), before)
    so.BlockLayout.local_random(500, num_random=1, generator=generator)
    other = torch.Generator().manual_seed(3)
    torch.rand(9, 9, generator=other)
    assert torch.equal(states.get_state(), other.get_state())


@given(data=st.data(), blocks=st.integers(0, 9), lead=st.sampled_from([(), (3,), (2, 3)]))
def test_masks_round_trip(data: st.DataObject, blocks: int, lead: tuple[int, ...]) -> None:
    seed = data.draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(*lead, blocks, blocks, generator=generator) < 0.4
    layout = so.BlockLayout.from_mask(mask, num_tokens=blocks * 4, block_size=4, num_global=2)
    assert torch.equal(layout.to_mask(), mask)
    assert layout.num_edges == int(layout.to_dense().sum())


def test_random_blocks_are_uniform() -> None:
    generator = torch.Generator().manual_seed(3)
    blocks, draws = 12, 600
    counts = torch.zeros(blocks, blocks)
    for _ in range(draws):
        counts += so.BlockLayout.local_random(
            blocks * 8, block_size=8, num_random=3, generator=generator
        ).to_mask()
    assert bool((counts.diagonal() == draws).all())
    observed = counts[~torch.eye(blocks, dtype=torch.bool)]
    expected = draws * 3 / (blocks - 1)
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    # Chi-square with about 12 * 10 degrees of freedom: mean 120, deviation 15.5; negatively
    # correlated within a row, which only lowers it.
    assert 50 < statistic < 190


def test_interpreted_drawing_is_the_same() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton is not interpreted here")
    noise = torch.rand(2, 9, 9)
    noise[0, :, 3:6] = 0.5
    expected = torch.ops.svitt_ops.draw_block_layout(noise, 3, 2)
    with route_to("triton"):
        found = torch.ops.svitt_ops.draw_block_layout(noise, 3, 2)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.gpu
def test_drawing_on_the_gpu_is_the_same() -> None:
    noise = torch.rand(57, 57)
    expected = torch.ops.svitt_ops.draw_block_layout(noise, 1, 3)
    found = torch.ops.svitt_ops.draw_block_layout(noise.cuda(), 1, 3)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, found, strict=True))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            so.BlockLayout.local_random(3136, device="cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_global", [0, 2])
@pytest.mark.parametrize("num_tokens", [64, 70])
def test_flex_attention_agrees(num_global: int, num_tokens: int) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    blocks = -(-num_tokens // 16)
    mask = torch.eye(blocks, dtype=torch.bool) | (torch.rand(2, 3, blocks, blocks) < 0.3)
    layout = so.BlockLayout.from_mask(
        mask, num_tokens=num_tokens, block_size=16, num_global=num_global
    )
    block_mask = layout.to_block_mask()
    q, k, v = torch.randn(3, 2, 3, num_tokens + num_global, 16).unbind()
    # Uncompiled FlexAttention evaluates the mask densely.
    expected = flex_attention(q, k, v, block_mask=block_mask)
    torch.testing.assert_close(so.block_sparse_attention(q, k, v, layout), expected)
    back = so.BlockLayout.from_block_mask(block_mask)
    assert torch.equal(back.to_dense().expand_as(layout.to_dense()), layout.to_dense())


def test_foreign_block_masks() -> None:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    def by_block(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return (q // 16 + k // 16) % 2 == 0

    def causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q >= k

    for length in (64, 70):
        foreign = create_block_mask(by_block, 1, 1, length, length, "cpu", BLOCK_SIZE=16)
        layout = so.BlockLayout.from_block_mask(foreign)
        index = torch.arange(length)
        assert torch.equal(
            layout.to_dense()[0, 0], by_block(index, index, index[:, None], index[None])
        )
        assert layout.num_global == 0
    with pytest.raises(ValueError, match="block_mask must be constant within each 16 x 16 block"):
        so.BlockLayout.from_block_mask(
            create_block_mask(causal, 1, 1, 64, 64, "cpu", BLOCK_SIZE=16)
        )
    with pytest.raises(ValueError, match="block_mask must be square"):
        so.BlockLayout.from_block_mask(
            create_block_mask(by_block, 1, 1, 64, 48, "cpu", BLOCK_SIZE=16)
        )
    with pytest.raises(TypeError, match="block_mask must be a BlockMask, got Tensor"):
        so.BlockLayout.from_block_mask(torch.ones(2, 2))
    counts = torch.full((1, 1, 2), 1, dtype=torch.int32)
    numbers = torch.tensor([[[[0, 1], [7, 0]]]], dtype=torch.int32)
    broken = BlockMask.from_kv_blocks(
        counts, numbers.clamp(max=1), BLOCK_SIZE=16, seq_lengths=(32, 32)
    )
    broken.kv_indices.copy_(numbers)
    with pytest.raises(ValueError, match="kv_blocks must name blocks 0 to 1, got 0 to 7"):
        so.BlockLayout.from_block_mask(broken)


def test_to_moves_every_list() -> None:
    moved = so.BlockLayout.local_random(100).to("meta")
    assert moved.device.type == "meta" and moved.query_counts.device.type == "meta"

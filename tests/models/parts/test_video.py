"""The video tower: sparsity, orders, positions, checkpointing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import svitt_ops as so
from svitt_ops.models import SViTTConfig, SViTTForPreTraining, token_order

MakeConfig = Callable[..., SViTTConfig]


def build(config: SViTTConfig, like: SViTTForPreTraining | None = None) -> SViTTForPreTraining:
    torch.manual_seed(0)
    model = SViTTForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if like is not None:
        model.load_state_dict(like.state_dict())
    return model


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("block_size", "num_local", "num_random"), [(8, 1, 7), (5, 30, 0), (64, 1, 0)]
)
def test_full_layout_is_dense(
    make_config: MakeConfig, pixels: Tensor, block_size: int, num_local: int, num_random: int
) -> None:
    blocks = {"block_size": block_size, "num_local": num_local, "num_random": num_random}
    full = build(make_config(keep_rate=1.0, **blocks))
    dense = build(make_config(keep_rate=1.0, edge_sparsity=False))
    with torch.no_grad():
        found, wanted = full.encode_video(pixels), dense.encode_video(pixels)
    torch.testing.assert_close(found.states, wanted.states)
    assert wanted.indices_per_stage == () and wanted.indices.tolist() == [list(range(64))] * 2


def test_sparse_is_not_dense(make_config: MakeConfig, pixels: Tensor) -> None:
    sparse = build(make_config(keep_rate=1.0))
    dense = build(make_config(keep_rate=1.0, edge_sparsity=False), sparse)
    with torch.no_grad():
        difference = sparse.encode_video(pixels).states - dense.encode_video(pixels).states
    assert difference.abs().max() > 1e-2


def test_keep_rate_1_is_no_pruning(make_config: MakeConfig, pixels: Tensor) -> None:
    kept = build(make_config(keep_rate=1.0))
    without = build(make_config(keep_rate=0.7, prune_layers=[]))
    with torch.no_grad():
        found, wanted = kept.encode_video(pixels), without.encode_video(pixels)
    assert torch.equal(found.states, wanted.states)


def test_survivors_are_those_that_cls_attends_most(make_config: MakeConfig, pixels: Tensor) -> None:
    config = make_config(num_hidden_layers=1, prune_layers=[0], edge_sparsity=False)
    model = build(config)
    layer = model.video.layers[0]
    with torch.no_grad():
        found = model.encode_video(pixels)
        tokens, _, codes = model.video._embed(pixels)
        x = layer.norm_before(tokens)
        query, key = (
            p(x).unflatten(-1, (2, 16)).transpose(1, 2)
            for p in (layer.attention.query, layer.attention.key)
        )
        logits = query[:, :, :1] @ key.mT / 4
        table = layer.attention.bias.table
        logits[..., 1:] += table[-3][:, None, None]
        logits[..., :1] += table[-1][:, None, None]
        scores = logits.softmax(-1)[:, :, 0, 1:].mean(1)
        wanted = scores.topk(so.keep_count(0.7, 64), dim=1).indices.sort(1).values
    assert torch.equal(found.indices, wanted)
    assert codes.shape == (64,)


def test_bias_follows_survivors_in_any_order(make_config: MakeConfig, pixels: Tensor) -> None:
    """Dense attention does not depend on the order, so neither may the result, pruned or not."""
    found = {}
    for order in ("standard", "morton", "hilbert"):
        model = build(make_config(edge_sparsity=False, token_order=order))
        with torch.no_grad():
            found[order] = model.encode_video(pixels)
    for order in ("morton", "hilbert"):
        ours, wanted = found[order], found["standard"]
        torch.testing.assert_close(ours.embeds, wanted.embeds)
        for mine, theirs in zip(ours.indices_per_stage, wanted.indices_per_stage, strict=True):
            assert not torch.equal(mine, theirs)
            assert torch.equal(mine.sort(1).values, theirs)
    model = build(make_config(token_order="hilbert"))
    with torch.no_grad():
        assert model.encode_video(pixels).states.isfinite().all()


def test_pattern_is_fixed_in_eval_and_drawn_in_training(
    make_config: MakeConfig, pixels: Tensor
) -> None:
    model = build(make_config(num_random=1, keep_rate=1.0))
    with torch.no_grad():
        first = model.encode_video(pixels).states
        torch.manual_seed(5)
        assert torch.equal(model.encode_video(pixels).states, first)
        torch.testing.assert_close(model.encode_video(pixels[:1]).states, first[:1])
        model.config.eval_pattern_seed = 1
        assert not torch.equal(model.encode_video(pixels).states, first)
        model.config.eval_pattern_seed = None
        drawn = [model.encode_video(pixels).states for _ in range(2)]
        assert not torch.equal(drawn[0], drawn[1])
        model.train()
        torch.manual_seed(7)
        drawn = [model.encode_video(pixels).states for _ in range(2)]
        assert not torch.equal(drawn[0], drawn[1])
        torch.manual_seed(7)
        assert torch.equal(model.encode_video(pixels).states, drawn[0])


def test_pruning_at_random(make_config: MakeConfig, pixels: Tensor) -> None:
    model = build(make_config(prune_by="random"))
    with torch.no_grad():
        found = model.encode_video(pixels)
        assert torch.equal(found.indices[0], found.indices[1])
        alone = model.encode_video(pixels[1:])
        assert torch.equal(alone.indices, found.indices[1:])
        torch.testing.assert_close(alone.states, found.states[1:])
        found = model.train().encode_video(pixels)
    assert found.indices.shape == (2, 32) and not torch.equal(found.indices[0], found.indices[1])


def test_fewer_frames_take_the_first_of_the_table(make_config: MakeConfig, pixels: Tensor) -> None:
    for order in ("standard", "morton"):
        model = build(make_config(keep_rate=1.0, edge_sparsity=False, token_order=order))
        short = build(make_config(num_frames=2, keep_rate=1.0, edge_sparsity=False))
        state = model.state_dict()
        for name, value in state.items():
            if name.endswith("bias.table"):
                middle = value[:-3].unflatten(0, (7, -1))[2:5].flatten(0, 1)
                state[name] = torch.cat([middle, value[-3:]])
        short.load_state_dict(state)
        with torch.no_grad():
            found, wanted = model.encode_video(pixels[:, :2]), short.encode_video(pixels[:, :2])
        assert found.indices.shape == (2, 32)
        torch.testing.assert_close(found.embeds, wanted.embeds)
    with pytest.raises(ValueError, match="pixel_values must have 1 to 4 frames, got 5"):
        model.encode_video(torch.randn(1, 5, 3, 32, 32))
    with pytest.raises(ValueError, match=r"must have shape \(batch, frames, 3, 32, 32\)"):
        model.encode_video(torch.randn(1, 4, 3, 32, 40))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(
    make_config: MakeConfig, batch: dict[str, Tensor], reentrant: bool
) -> None:
    """Layouts and dropped branches are the same in the second run of a checkpointed layer."""
    model = build(make_config(drop_path_rate=0.5, num_random=1, text_dropout=0.1)).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        loss = model(**batch).loss
        model.zero_grad()
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0])
    for ours, wanted in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("grid", [(4, 4, 4), (1, 14, 14), (4, 14, 14), (3, 2, 5), (1, 1, 1)])
def test_orders_are_permutations(grid: tuple[int, int, int]) -> None:
    numbers = list(range(grid[0] * grid[1] * grid[2]))
    for order in ("standard", "morton", "hilbert"):
        assert sorted(token_order(order, grid).tolist()) == numbers
    assert token_order("standard", grid).tolist() == numbers


def test_curves() -> None:
    morton = token_order("morton", (2, 2, 4)).tolist()
    assert morton == [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    for side in (2, 4, 8):
        places = torch.stack(torch.unravel_index(token_order("hilbert", (side,) * 3), (side,) * 3))
        assert (places.diff(dim=1).abs().sum(0) == 1).all()  # the curve never jumps
    with pytest.raises(ValueError, match="'standard', 'morton' or 'hilbert', got 'peano'"):
        token_order("peano", (1, 2, 2))


def test_official_curves() -> None:
    """What the packages that the released code draws its curves with say of small grids."""
    official = {"compat": "svitt-official"}
    morton = [0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15]
    assert token_order("morton", (2, 2, 4), **official).tolist() == morton
    morton = [0, 9, 3, 12, 1, 10, 4, 13, 6, 15, 7, 16, 2, 11, 5, 14, 8, 17]
    assert token_order("morton", (2, 3, 3), **official).tolist() == morton
    hilbert = [0, 8, 9, 1, 5, 13, 12, 4, 7, 15, 14, 6, 2, 10, 11, 3]
    assert token_order("hilbert", (2, 2, 4), **official).tolist() == hilbert
    hilbert = [0, 4, 5, 1, 3, 7, 6, 2, 11, 10, 14, 15, 13, 12, 8, 9]
    assert token_order("hilbert", (4, 2, 2), **official).tolist() == hilbert
    for frames in (1, 4, 8, 16, 32):
        grid = (frames, 14, 14)
        for order in ("morton", "hilbert"):
            ours, theirs = token_order(order, grid), token_order(order, grid, **official)
            assert theirs.sort().values.equal(ours.sort().values)
            longest_is_a_power = frames in (16, 32)
            assert torch.equal(ours, theirs) == (order == "hilbert" and not longest_is_a_power)


def test_order_of_a_model_is_that_of_its_code(make_config: MakeConfig) -> None:
    for compat in (None, "svitt-official"):
        model = build(make_config(token_order="morton", compat=compat))
        wanted = token_order("morton", (4, 4, 4), compat=compat)
        assert torch.equal(model.video.order, wanted)

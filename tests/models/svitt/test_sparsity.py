"""Table A1 of the paper to the last digit, and that the counts are those of what runs."""

from collections.abc import Callable

import pytest
import torch

import svitt_ops as so
from svitt_ops.models import SViTTConfig, SViTTForPreTraining, edge_count, sparsity_table


def test_table_of_the_paper() -> None:
    rows = sparsity_table()
    assert [row.num_frames for row in rows] == [4, 8, 16]
    assert [round(row.edges.total / 1e6, 6) for row in rows] == [1.475694, 2.603084, 4.612768]
    assert [round(row.edges.sparsity, 6) for row in rows] == [0.801950, 0.912218, 0.961013]
    assert [row.edges.video for row in rows] == [1457550, 2580300, 4586400]
    assert [row.edges.multimodal for row in rows] == [18144, 22784, 26368]
    assert [row.tokens for row in rows] == [
        (784, 549, 385, 270),
        (1568, 941, 565, 339),
        (3136, 1568, 784, 392),
    ]
    assert [row.multimodal_tokens for row in rows] == [(270, 27), (339, 34), (392, 40)]
    assert [round(100 * row.macs / row.dense_macs, 1) for row in rows] == [61.7, 47.7, 33.8]


def test_dense_model_has_all_edges() -> None:
    config = SViTTConfig(edge_sparsity=False, keep_rate=1.0, multimodal_keep_rate=1.0)
    count = edge_count(config)
    assert count.total == count.dense and count.sparsity == 0
    (row,) = sparsity_table(config, frames=[2])
    assert row.macs == row.dense_macs and row.tokens == (392,)
    other = SViTTConfig(edge_sparsity=False, keep_rate=0.5)
    assert edge_count(other).video == 4 * 784**2 + 3 * 392**2 + 3 * 196**2 + 2 * 98**2


def test_counted_edges_are_those_of_the_layout() -> None:
    layout = so.BlockLayout.local_random(784)
    of_cls = 2 * 784 + 1
    patches_to_cls = 784
    assert layout.num_edges - of_cls + patches_to_cls == 784 * 225
    assert edge_count(SViTTConfig(keep_rate=1.0)).video == 12 * 784 * 225


@pytest.mark.parametrize("layers", [[0, 1], [0, 2], [2, 0, 2], []])
def test_counted_tokens_are_those_that_survive(
    make_config: Callable[..., SViTTConfig], layers: list[int]
) -> None:
    config = make_config(prune_layers=layers)
    with torch.no_grad():
        found = SViTTForPreTraining(config).eval().encode_video(torch.randn(1, 4, 3, 32, 32))
    (row,) = sparsity_table(config, frames=[4])
    assert [64, *(stage.shape[1] for stage in found.indices_per_stage)] == list(row.tokens)
    assert row.multimodal_tokens[0] == found.indices.shape[1]


@pytest.mark.parametrize(("frames", "count"), [(4, 203394653), (8, 204234461), (16, 205914077)])
def test_parameters_of_the_full_size_model(frames: int, count: int) -> None:
    with torch.device("meta"):
        model = SViTTForPreTraining(SViTTConfig(num_frames=frames))
    assert sum(p.numel() for p in model.parameters()) == count

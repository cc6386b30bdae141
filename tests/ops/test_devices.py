"""Tensors without values: `meta`, and fakes of any device. Shapes come out of every op."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import svitt_ops as so


def run_every_op(device: str, backward: bool) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).requires_grad_(backward)

    def check(out: Tensor, *leaves: Tensor) -> None:
        assert out.device.type == device
        if backward:
            for x, found in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
                assert found.shape == x.shape and found.device == x.device

    q, k, v, table = leaf(2, 3, 21, 8), leaf(2, 3, 21, 8), leaf(2, 3, 21, 8), leaf(66, 3)
    layout = so.BlockLayout.local_random(20, block_size=4, device=device)
    lengths = torch.ones(2, dtype=torch.int32, device=device)
    codes = so.position_codes((1, 4, 5), device=device)
    out, saliency = so.block_sparse_attention(
        q,
        k,
        v,
        layout,
        bias_table=table,
        position_codes=codes,
        key_lengths=lengths,
        return_saliency=True,
    )
    assert out.shape == q.shape and saliency.shape == (2, 20)
    check(out, q, k, v, table)
    ignored = torch.zeros(2, 21, dtype=torch.bool, device=device)
    out, saliency = so.cross_attention(q, k, v, key_padding_mask=ignored, return_saliency="mean")
    assert out.shape == q.shape and saliency.shape == (2, 21)
    check(out, q, k, v)

    a, b, t = leaf(6, 8), leaf(6, 8), leaf(1)
    ids = torch.arange(6, device=device)
    check(so.info_nce(a, b, t, ids=ids), a, b, t)
    check(so.info_nce(a, b, 0.1), a, b)
    check(so.sigmoid_nce(a, b, t, t, ids=ids), a, b, t)
    check(so.sigmoid_nce(a, b, 0.1, -2.0), a, b)
    queue = so.queue_info_nce(a, b, b, t, teacher_query=b, alpha=0.4, query_ids=ids, queue_ids=ids)
    check(queue, a, t)
    assert so.sample_hard_negatives(a, b, t, ids=ids).shape == (6,)
    assert so.retrieval_ranks(a, b).shape == (6,)

    tokens, scores = leaf(2, 9, 4), torch.randn(2, 8, device=device)
    kept = so.prune_tokens(tokens, scores, keep_rate=0.5, position_codes=codes[:8])
    assert kept.tokens.shape == (2, 5, 4) and kept.indices.shape == (2, 4)
    assert kept.position_codes is not None and kept.position_codes.shape == (2, 4)
    check(kept.tokens, tokens)
    assert so.select_tokens(scores, 3).shape == (2, 3)

    mask = torch.ones(5, 5, dtype=torch.bool, device=device)
    masked = so.BlockLayout.from_mask(mask, num_tokens=20, block_size=4)
    lists = masked.key_counts, masked.key_blocks, masked.query_counts, masked.query_blocks
    assert so.BlockLayout(20, 4, 1, *lists).to_dense().shape == (21, 21)
    assert masked.to("meta").device.type == "meta"


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("around", [nullcontext, FakeTensorMode])
@pytest.mark.parametrize("autocast", [False, True])
def test_shapes(
    device: str, around: Callable[[], AbstractContextManager[Any]], autocast: bool
) -> None:
    with around(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        run_every_op(device, backward=True)


def test_shapes_of_cuda_fakes() -> None:
    # A torch without CUDA cannot differentiate fake CUDA tensors, and indexes none of them.
    with FakeTensorMode(), torch.no_grad():
        if torch.cuda.is_available():
            run_every_op("cuda", backward=False)
        assert so.position_codes((1, 4, 5), device="cuda").shape == (20,)
        mask = torch.ones(5, 5, dtype=torch.bool, device="cuda")
        layout = so.BlockLayout.from_mask(mask, num_tokens=20, block_size=4)
        assert layout.device.type == "cuda" and layout.to_mask().shape == (5, 5)


def test_modules_on_meta() -> None:
    with torch.device("meta"):
        bias = so.nn.RelativePositionBias3D((1, 4, 5), 2, std=0.1)
        module, cross = (
            so.nn.BlockSparseSelfAttention(16, 2, bias=bias),
            so.nn.CrossAttention(16, 2),
        )
        tokens = torch.randn(2, 21, 16)
        layout = so.BlockLayout.local_random(20, block_size=4)
    assert layout.device.type == bias.codes.device.type == "meta"
    assert module(tokens, layout).shape == cross(tokens, tokens).shape == tokens.shape
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):  # what was asked for by name is where it was asked for
        drawn = so.BlockLayout.local_random(20, block_size=4, generator=generator, device="cpu")
    assert drawn.device.type == "cpu"


def test_flops_need_no_values() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for device in ("cpu", "meta"):
        with FlopCounterMode(display=False) as counter:
            q = torch.randn(1, 2, 21, 8, device=device, requires_grad=True)
            rows = q[0, 0]
            so.cross_attention(q, q, q).sum().backward()
            so.queue_info_nce(rows, rows, rows, 0.5).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == (4 * 8 * 21 * 21 * 2 * 7 // 2) + 2 * 2 * 21 * 42 * 8


Q, ROWS = torch.randn(2, 3, 21, 8), torch.randn(4, 8)
META, LAYOUT = Q.to("meta"), so.BlockLayout.local_random(20, block_size=4)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: so.cross_attention(Q, META, Q), "cross_attention: key must be on cpu, got meta"),
        (lambda: so.cross_attention(META, Q, Q), "cross_attention: key must be on meta, got cpu"),
        (
            lambda: so.block_sparse_attention(META, META, META, LAYOUT),
            "block_sparse_attention: layout must be on meta, got cpu",
        ),
        (
            lambda: so.info_nce(ROWS, ROWS, torch.ones((), device="meta")),
            "info_nce: temperature must be on cpu, got meta",
        ),
        (
            lambda: so.queue_info_nce(ROWS, ROWS, ROWS.to("meta"), 0.1),
            "queue_info_nce: queue must be on cpu, got meta",
        ),
        (
            lambda: so.prune_tokens(Q[0], META[0, :, 1:, 0], keep=3),
            "prune_tokens: scores must be on cpu, got meta",
        ),
        (
            lambda: so.retrieval_ranks(ROWS.to("meta"), ROWS),
            "retrieval_ranks: key must be on meta, got cpu",
        ),
        (
            lambda: so.sample_hard_negatives(
                ROWS.to("meta"), ROWS.to("meta"), 0.1, generator=torch.Generator()
            ),
            "sample_hard_negatives: generator must be on meta, got cpu",
        ),
    ],
)
def test_devices_do_not_mix(run: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        run()

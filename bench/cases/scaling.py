"""How block-sparse attention grows with frames, batch and density, beside dense attention.

A case is `t<frames>-b<batch>-k<blocks>-<dtype>`: blocks attended by each block of queries, of
`3.5 * frames`. One sequence of cases varies each of the three; those of `-bias` vary frames with
the 3-D relative position bias, which dense attention materialises. Every case is checked in the
first and the last head of the first and the last sample: the op's own benchmark checks them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.cases import block_sparse_attention as op
from bench.measure import results
from bench.measure.harness import Case, Problem

FRAMES = (4, 8, 16, 32, 64)
BATCHES = (1, 2, 4, 8)
BATCH_FRAMES = 8
BLOCKS = (1, 2, 4, 8, 14, 28, 56)
BLOCK_FRAMES = 16
BIAS_FRAMES = (4, 8, 16)
BLOCKS_OF_SVITT = 4
DENSE = ("sdpa_dense", "sdpa_cudnn", "sdpa_flash")
DENSE_BIAS = ("sdpa_bias", "sdpa_efficient_mask")


def cases(device: str) -> list[Case]:
    """The sequences, the cases that two of them share once."""
    found: dict[str, Case] = {}
    for dtype in ("bf16",) if device == "cuda" else ("fp32", "bf16"):
        for case in _cases(device, dtype):
            found.setdefault(case.name, case)
    return list(found.values())


def _cases(device: str, dtype: str) -> Iterator[Case]:
    least = 8 if device == "cuda" else 1

    def case(frames: int, batch: int, blocks: int, bias: bool = False) -> Case:
        fields: dict[str, Any] = {"batch": batch * least, "heads": 12, "head_dim": 64}
        fields |= {"tokens": frames * op.GRID**2 + 1, "frames": frames, "blocks": blocks}
        fields |= {"block_size": 56, "num_local": 1, "num_random": blocks - 1, "num_global": 1}
        fields |= {"layout": "local_random", "strides": "contiguous", "bias": bias}
        # Few frames with a bias: the op's own check will do.
        fields |= {"saliency": False, "sampled": not bias}
        name = f"t{frames}-b{batch * least}-k{blocks}-{dtype}{'-bias' if bias else ''}"
        # Of the op's own quick cases, one of one dtype says enough.
        quick = frames == 4 and not bias and (dtype == "fp32" or device == "cuda")
        return Case(name=name, dtype=dtype, device=device, fields=fields, quick=quick)

    for frames in FRAMES:
        yield case(frames, 1, BLOCKS_OF_SVITT)
    for batch in BATCHES:
        yield case(BATCH_FRAMES, batch, BLOCKS_OF_SVITT)
    for blocks in BLOCKS:
        yield case(BLOCK_FRAMES, 1, blocks)
    for frames in BIAS_FRAMES:
        yield case(frames, 1, BLOCKS_OF_SVITT, bias=True)


def shrunk(case: Case) -> Case:
    """The same case with two blocks of tokens, one head and one sample."""
    return op.shrunk(case)


def problem(case: Case) -> Problem:
    """That of the op, with dense attention as the only peer and a check that scales."""
    found = op.problem(case)
    peers = DENSE_BIAS if case.fields["bias"] else DENSE
    providers = [x for x in found.providers if x.role == "ours" or x.name in peers]
    return replace(found, providers=providers)


def dense_row(result: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest dense attention that has a time."""
    names = DENSE_BIAS if result["fields"]["bias"] else DENSE
    rows = [row for name in names if (row := results.timed(result, name))]
    return min(rows, key=lambda row: row["ms"], default=None)


def summary(result: dict[str, Any]) -> str:
    """A line below the live table's rows: time of dense attention's beside edges of its edges."""
    mine, dense = results.timed(result, "svitt_ops"), dense_row(result)
    if mine is None or dense is None:
        return ""
    time, edges = mine["ms"] / dense["ms"], 1 / result["facts"]["edge_ratio"]
    return f"{'':<22} of dense: {time:.1%} of the time, {edges:.1%} of the edges"

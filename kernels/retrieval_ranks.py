"""Retrieval ranks: how many keys beat the best positive, without the similarity matrix.

Tiling. A program owns `ROWS` queries and walks the keys twice in tiles of `COLUMNS`: for the best
positive (without ids only the tiles that can hold it), then to count what is above. A tile's dot
products come from the same instructions both times, so that a key equal to the positive ties with
it exactly.

Work and traffic: 2 B N D FLOP, twice that with ids; keys are read once or twice per program, from
L2 where they fit it. Numerics: dot products accumulate in fp32, fp32 inputs without TF32.

Source: the retrieval protocol of ALBEF (Li et al., 2021).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .info_nce import _dots, _positives
from .tiles import cdiv, contrast_tile, device_arch, on_device


@triton.jit(do_not_specialize=["a_count", "b_count"])
def _ranks_kernel(
    query_ptr, key_ptr, query_ids_ptr, key_ids_ptr, out_ptr,
    a_count, b_count, query_step, key_step, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Ranks of some queries."""
    first = tl.program_id(0) * ROWS
    a = first + tl.arange(0, ROWS)
    if query_ids_ptr is None:
        start = first // COLUMNS * COLUMNS
        end = tl.minimum(first + ROWS, b_count)
    else:
        start = first * 0
        end = b_count
    best = tl.full([ROWS], -float("inf"), tl.float32)
    for tile in range(start, end, COLUMNS):
        b = tile + tl.arange(0, COLUMNS)
        x = _dots(
            query_ptr, key_ptr, a, b, a_count, b_count, query_step, key_step, dim,
            ROWS, COLUMNS, CHUNK,
        )  # fmt: skip
        same = _positives(query_ids_ptr, key_ids_ptr, a, b, a_count, b_count, 0)
        same = same & (tl.abs(x) < float("inf"))
        best = tl.maximum(best, tl.max(tl.where(same, x, -float("inf")), axis=1))
    beaten = tl.zeros([ROWS], tl.int32)
    for tile in range(0, b_count, COLUMNS):
        b = tile + tl.arange(0, COLUMNS)
        x = _dots(
            query_ptr, key_ptr, a, b, a_count, b_count, query_step, key_step, dim,
            ROWS, COLUMNS, CHUNK,
        )  # fmt: skip
        # What is no number counts against the query.
        lower = (x <= best[:, None]) & (x > -float("inf")) & (b < b_count)[None, :]
        beaten += tl.sum(lower.to(tl.int32), axis=1)
    tl.store(out_ptr + a, (b_count - beaten).to(tl.int64), mask=a < a_count)


def retrieval_ranks(
    query: torch.Tensor,
    key: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the ranks; see the schema in `svitt_ops.retrieval_ranks`."""
    (queries, dim), keys = query.shape, key.shape[0]
    found = query.new_empty(queries, dtype=torch.int64)
    if queries == 0:
        return found
    tile = contrast_tile("forward", dim, queries, query.dtype, device_arch(query.device))
    with on_device(query):
        _ranks_kernel[(cdiv(queries, tile.rows),)](
            query, key, query_ids, key_ids, found,
            queries, keys, query.stride(0), key.stride(0), dim,
            ROWS=tile.rows, COLUMNS=tile.columns, CHUNK=tile.chunk, **tile.options,
        )  # fmt: skip
    return found

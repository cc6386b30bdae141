"""Cross-attention forward: keys split over programs where heads are few, saliency of the keys.

Tiling. One program owns a tile of `ROWS` queries of one (batch, head), all of them where there are
up to 64, and walks one part of the keys in tiles of `COLUMNS`. Where batch, heads and query tiles
make fewer programs than a GPU has room for, the keys are cut into parts; each part then writes a
partial output, maximum and sum, and a second, small kernel combines them in ascending order. The
number of parts depends on shapes alone.

Saliency is one more kernel, over (batch, keys), that adds the heads in order. For "cls" the forward
has stored the logits of query 0 and it takes their exponentials; for "mean" it multiplies the
queries with each tile of keys once more, now that maximum and sum are known.

Memory traffic for D = head_dim and e bytes an element: k and v are read once, 2 D e bytes a key and
head (256 for D = 64 in bf16), with few queries all that counts. "cls" adds 8 bytes a key and head,
"mean" another D e. Partials, 4 (D + 2) bytes a query, head and part, stay in L2. Ignored keys are
not read.

Numerics. Dot products accumulate in fp32 (fp32 inputs without TF32); scale and log2(e) multiply the
fp32 logit after the dot product; online softmax in base 2; probabilities are cast to the dtype of
`value` for the second product. No atomics: a rerun is bitwise identical.

Source: FlashAttention (Dao et al., 2022), algorithm 1; Flash-Decoding (Dao et al., 2023) for the
split over keys; SViTT (Li et al., CVPR 2023), section 3.3, for the saliency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rows import (
    LN_2,
    LOG2_E,
    load_offsets,
    load_rows,
    needs_wide_offsets,
    products,
    store_rows,
    weigh_values,
)
from .tiles import cdiv, combine_chunk, cross_tile, device_arch, launch_options, on_device

PROGRAMS = 264
"""Programs that keep a GPU busy: two for each of the 132 multiprocessors of an H100."""
LEAST_KEYS = 256
"""Keys of a part at least, so that its partial result is small beside what it reads."""

_SIZES = [
    "num_heads", "num_queries", "num_keys", "query_tiles", "parts", "span", "stats_stack",
    "partial_stack",
]  # fmt: skip


@triton.jit
def own_tile(num_heads, tiles, parts, WIDE: tl.constexpr):
    """Which (batch, head) this program works on, which part of it and which tile."""
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles % parts
    pair = tl.program_id(0) // (tiles * parts)
    batch, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
    if WIDE:
        tile, part = tile.to(tl.int64), part.to(tl.int64)
    return pair.to(tl.int64), batch, head, part, tile


@triton.jit
def attended(mask_ptr, tokens, end):
    """Which of some keys are attended: they exist and are not ignored."""
    exists = tokens < end
    if mask_ptr is not None:
        exists = exists & (tl.load(mask_ptr + tokens, mask=exists, other=1) == 0)
    return exists


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, out_ptr, lse_ptr, stats_ptr,
    partial_ptr, partial_stats_ptr, logits_ptr, scale,
    num_heads, num_queries, num_keys, query_tiles, parts, span, stats_stack, partial_stack,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    value_batch, value_head, value_row, out_batch, out_head, out_row,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of queries over one part of the keys: outputs, or partial ones."""
    pair, batch, head, part, tile = own_tile(num_heads, query_tiles, parts, WIDE)
    query_ptr += batch * query_batch + head * query_head
    key_ptr += batch * key_batch + head * key_head
    value_ptr += batch * value_batch + head * value_head
    if mask_ptr is not None:
        mask_ptr += batch * num_keys

    row = tile * ROWS + tl.arange(0, ROWS)
    row_exists = row < num_queries
    query = load_rows(query_ptr, row, query_row, row_exists, HEAD_DIM, DIM)
    scale_log2 = scale * LOG2_E
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    end = tl.minimum((part + 1) * span, num_keys)
    for start in range(part * span, end, COLUMNS):
        token = start + tl.arange(0, COLUMNS)
        seen = attended(mask_ptr, token, end)
        key = load_rows(key_ptr, token, key_row, seen, HEAD_DIM, DIM)
        logit = products(query, key) * scale_log2
        logit += tl.where(seen, 0.0, float("-inf"))[None, :]
        if logits_ptr is not None:
            places = tl.broadcast_to((logits_ptr + pair * num_keys + token)[None, :], logit.shape)
            tl.store(places, logit, mask=(row == 0)[:, None] & (token < end)[None, :])
        value = load_rows(value_ptr, token, value_row, seen, HEAD_DIM, DIM)
        top, total, acc = weigh_values(top, total, acc, logit, 1.0, row >= 0, value)

    if partial_ptr is not None:
        slot = (pair * parts + part) * num_queries + row
        store_rows(partial_ptr, slot, HEAD_DIM, acc, row_exists, HEAD_DIM, DIM)
        tl.store(partial_stats_ptr + slot, top, mask=row_exists)
        tl.store(partial_stats_ptr + partial_stack + slot, total, mask=row_exists)
    else:
        _store_results(
            out_ptr + batch * out_batch + head * out_head, lse_ptr, stats_ptr, stats_stack,
            pair * num_queries, row, row_exists, out_row, acc, top, total, HEAD_DIM, DIM,
        )  # fmt: skip


@triton.jit
def _store_results(
    out_ptr, lse_ptr, stats_ptr, stats_stack, first, row, exists, out_row, acc, top, total,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Outputs and statistics of some rows; those without a key are zero and -inf."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = tl.where(empty[:, None], 0.0, acc / total[:, None])
    store_rows(out_ptr, row, out_row, acc, exists, HEAD_DIM, DIM)
    tl.store(lse_ptr + first + row, (top + tl.log2(total)) * LN_2, mask=exists)
    if stats_ptr is not None:
        tl.store(stats_ptr + first + row, top, mask=exists)
        tl.store(stats_ptr + stats_stack + first + row, tl.log2(total), mask=exists)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "tiles", "parts", *_SIZES[-2:]])
def _combine_kernel(
    partial_ptr, partial_stats_ptr, out_ptr, lse_ptr, stats_ptr,
    num_heads, num_queries, tiles, parts, stats_stack, partial_stack,
    out_batch, out_head, out_row,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Outputs and statistics of `CHUNK` queries of one (batch, head) from the parts' partials."""
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * CHUNK + tl.arange(0, CHUNK)
    exists = row < num_queries
    top = tl.full([CHUNK], float("-inf"), tl.float32)
    total = tl.zeros([CHUNK], tl.float32)
    acc = tl.zeros([CHUNK, DIM], tl.float32)
    for part in range(parts):
        slot = (pair * parts + part) * num_queries + row
        part_top = tl.load(partial_stats_ptr + slot, mask=exists, other=float("-inf"))
        part_total = tl.load(partial_stats_ptr + partial_stack + slot, mask=exists, other=0.0)
        part_acc = load_rows(partial_ptr, slot, HEAD_DIM, exists, HEAD_DIM, DIM)
        new_top = tl.maximum(top, part_top)
        offset = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, weight = tl.exp2(top - offset), tl.exp2(part_top - offset)
        total = total * shrink + part_total * weight
        acc = acc * shrink[:, None] + part_acc * weight[:, None]
        top = new_top
    out_ptr += pair // num_heads * out_batch + pair % num_heads * out_head
    _store_results(
        out_ptr, lse_ptr, stats_ptr, stats_stack, pair * num_queries, row, exists, out_row,
        acc, top, total, HEAD_DIM, DIM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys", "tiles", "stats_stack"])
def _saliency_kernel(
    logits_ptr, query_ptr, key_ptr, mask_ptr, stats_ptr, saliency_ptr, scale,
    num_heads, num_queries, num_keys, tiles, stats_stack,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """What one tile of keys receives: from query 0 where its logits are there, else on average."""
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    if WIDE:
        tile = tile.to(tl.int64)
    token = tile * COLUMNS + tl.arange(0, COLUMNS)
    if mask_ptr is not None:
        mask_ptr += batch * num_keys
    seen = attended(mask_ptr, token, num_keys)
    query_ptr += batch * query_batch
    key_ptr += batch * key_batch
    received = tl.zeros([COLUMNS], tl.float32)
    for head in range(num_heads):
        pair = batch * num_heads + head
        # Two subtractions: the maximum is one of the logits, so the first is exact near it.
        if logits_ptr is not None:
            logit = tl.load(logits_ptr + pair * num_keys + token, mask=seen, other=float("-inf"))
            first, second = load_offsets(
                None, stats_ptr + pair * num_queries, stats_stack, tl.zeros_like(token), seen
            )
            received += tl.exp2((logit - first) - second)
        else:
            key = load_rows(key_ptr, token, key_row, seen, HEAD_DIM, DIM)
            for start in range(0, num_queries, ROWS):
                row = start + tl.arange(0, ROWS)
                if WIDE:
                    row = row.to(tl.int64)
                exists = row < num_queries
                query = load_rows(query_ptr, row, query_row, exists, HEAD_DIM, DIM)
                logit = products(key, query) * (scale * LOG2_E)
                first, second = load_offsets(
                    None, stats_ptr + pair * num_queries, stats_stack, row, exists
                )
                prob = tl.exp2((logit - first[None, :]) - second[None, :])
                received += tl.sum(prob, axis=1)
            query_ptr += query_head
            key_ptr += key_head
    rows = 1 if logits_ptr is not None else num_queries
    received = tl.where(seen, received / (num_heads * rows), 0.0)
    tl.store(saliency_ptr + batch * num_keys + token, received, mask=token < num_keys)


def split_keys(programs: int, num_keys: int, columns: int) -> tuple[int, int]:
    """Parts that the keys are cut into where `programs` would do each all of them, and their size.

    Of the shapes alone, so that a result does not depend on the device.
    """
    parts = max(min(cdiv(PROGRAMS, programs), num_keys // LEAST_KEYS), 1)
    span = cdiv(cdiv(num_keys, parts), columns) * columns
    return max(cdiv(num_keys, max(span, 1)), 1), span


def cross_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    scale: float,
    saliency: int,
    *,
    row_stats: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the forward kernels: one, one more where keys are split, one more for the saliency.

    Arguments are those of the op `svitt_ops::cross_attention`, validated by its caller; `saliency`
    is 0 for none, 1 for query 0, 2 for the mean over queries. The backward also passes `row_stats`,
    fp32 (2, batch, heads, queries), to be filled with each row's maximal logit and the log of its
    sum, both in base 2: more exact than their rounded sum, the lse.

    Returns:
        out (batch, heads, queries, head_dim) in the dtype of query, lse (batch, heads, queries)
        fp32, and saliency (batch, keys) fp32, or empty unless asked for.
    """
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    out = query.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, num_queries, dtype=torch.float32)
    received = query.new_empty((batch, num_keys) if saliency else (0,), dtype=torch.float32)
    if batch == 0 or heads == 0 or num_queries == 0:
        return out, lse, received.zero_()

    arch = device_arch(query.device)
    mask = None if key_padding_mask is None else key_padding_mask.view(torch.int8)
    tile = cross_tile("forward", num_queries, head_dim, query.dtype, arch)
    query_tiles = cdiv(num_queries, tile.rows)
    parts, span = split_keys(batch * heads * query_tiles, num_keys, tile.columns)
    partial = partial_stats = logits = None
    if parts > 1:
        partial_shape = (batch, heads, parts, num_queries)
        partial = query.new_empty(*partial_shape, head_dim, dtype=torch.float32)
        partial_stats = query.new_empty(2, *partial_shape, dtype=torch.float32)
    if saliency == 1:
        logits = query.new_empty(batch, heads, num_keys, dtype=torch.float32)
    stats = row_stats
    if stats is None and saliency:
        stats = lse.new_empty(2, *lse.shape)
    stats_stack, partial_stack = (0 if x is None else x.stride(0) for x in (stats, partial_stats))
    wide = needs_wide_offsets(query, key, value, out)
    with on_device(query):
        _forward_kernel[(batch * heads * parts * query_tiles,)](
            query, key, value, mask, out, lse, stats, partial, partial_stats, logits, scale,
            heads, num_queries, num_keys, query_tiles, parts, span, stats_stack, partial_stack,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            HEAD_DIM=head_dim, WIDE=wide, **tile.shape, **tile.options,
        )  # fmt: skip
        if partial is not None:
            chunk = max(combine_chunk(tile.head_dim) // 2, 16)
            tiles = cdiv(num_queries, chunk)
            _combine_kernel[(batch * heads * tiles,)](
                partial, partial_stats, out, lse, stats,
                heads, num_queries, tiles, parts, stats_stack, partial_stack, *out.stride()[:3],
                HEAD_DIM=head_dim, DIM=tile.head_dim, CHUNK=chunk, maxnreg=255, **launch_options(),
            )  # fmt: skip
        if saliency and num_keys > 0:
            tile = cross_tile("saliency", num_queries, head_dim, query.dtype, arch)
            tiles = cdiv(num_keys, tile.columns)
            _saliency_kernel[(batch * tiles,)](
                logits, query, key, mask, stats, received, scale,
                heads, num_queries, num_keys, tiles, stats_stack,
                *query.stride()[:3], *key.stride()[:3],
                HEAD_DIM=head_dim, WIDE=wide, **tile.shape, **tile.options,
            )  # fmt: skip
    return out, lse, received

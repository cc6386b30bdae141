"""How often the loops of each kernel turn: by its arguments, its grid and the layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.predict.launches import Launch
from svitt_ops.kernels import block_sparse_walk, info_nce, sigmoid_nce
from svitt_ops.kernels.tiles import cdiv

Named = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Of one program; on average, where lists differ in length."""

    outer: float = 1.0
    """Of all loops that multiply matrices, those within others not counted."""
    inner: float = 1.0
    """Of a loop that does so within another."""
    other: float = 1.0
    """Of any other loop,"""
    copying: float = 1.0
    """but for one that loads or stores much: 32 bytes a thread."""
    walks: tuple[float, ...] = ()
    """Instead of `outer`: of each loop that it counts, in the order of the code."""


def steps(launch: Launch) -> Steps:
    """How often the loops of a launch turn."""
    rule = _RULES.get(launch.name.replace("_backward.", "."))
    return rule(launch.named) if rule else Steps()


def _attention(named: Named) -> Steps:
    size, columns, globals = (named[x] for x in ("BLOCK_SIZE", "COLUMNS", "NUM_GLOBAL"))
    listed = named["counts_ptr"].double()
    if not hasattr(block_sparse_walk, "list_slots"):  # once a tile gathered over block borders
        return Steps(outer=float(((globals + listed * size) / columns).ceil().mean()))
    pack, parts = max(columns // size, 1), cdiv(size, columns)
    leads = cdiv(globals, columns) if parts * columns - pack * size < globals else 0
    # Row tiles of nothing but globals walk one block.
    tiles, full = named["ROW_TILES"], cdiv(size, named["ROWS"])
    walked = float((listed / pack).ceil().mean()) * parts
    return Steps(outer=(walked * full + parts * (tiles - full)) / tiles + leads)


def _cross(named: Named) -> Steps:
    keys = named["num_keys"]
    if named.get("mask_ptr") is not None:  # keys behind the last one that counts are not read
        counted = torch.arange(1, keys + 1) * (named["mask_ptr"] == 0)
        keys = float(counted.amax(1).double().mean())
    return Steps(outer=-(-keys // (named["parts"] * named["COLUMNS"])))


def _over_queries(named: Named) -> Steps:
    return Steps(outer=cdiv(named["num_queries"], named["ROWS"]))


def _cross_saliency(named: Named) -> Steps:
    queries = 1 if named["logits_ptr"] is not None else named["num_queries"]
    tiles = cdiv(queries, named["ROWS"])
    return Steps(outer=named["num_heads"], inner=tiles, other=named["num_heads"])


def _pairs(named: Named) -> Steps:
    whole = cdiv(named["b_count"], named["COLUMNS"])
    return Steps(outer=named.get("row_each", whole), inner=_chunks(named))


def _edge_apart(named: Named) -> Steps:
    # One of a program's tiles, for the edge, stands outside the loops; of it that over dims turns.
    plain = _pairs(named)
    outside = () if named["WHOLE"] else (plain.inner,)
    return replace(plain, walks=(*outside, plain.outer - 1))


def _sigmoid(named: Named) -> Steps:
    apart = hasattr(sigmoid_nce, "_take_in") and not named["GRADIENTS"]
    return _edge_apart(named) if apart else _pairs(named)


def _statistics(named: Named) -> Steps:
    if not hasattr(info_nce, "_positives_by_ids"):  # once one loop walked all tiles
        return _pairs(named)
    found = _edge_apart(named)
    if named["query_ids_ptr"] is not None:
        return found
    *outside, looped = found.walks
    rows, columns = named["ROWS"], named["COLUMNS"]
    diagonal = min(cdiv(rows, columns) * found.outer / cdiv(named["b_count"], columns), looped)
    return replace(found, walks=(*outside, looped - diagonal, diagonal))


def _gradient(named: Named) -> Steps:
    return _pairs(named) if named["query_ids_ptr"] is not None else _statistics(named)


def _queue(named: Named) -> Steps:
    each, columns = named["each"], named["COLUMNS"]
    of_keys, of_queue = cdiv(named["rows"], columns), cdiv(named["queue_rows"], columns)
    keys = each * of_keys / (of_keys + of_queue)
    walks = (keys, each - keys)
    if named["queue_ids_ptr"] is None:
        walks = (keys, *_whole_first(each - keys, named["queue_rows"], columns))
    return Steps(outer=each, inner=_chunks(named), walks=walks)


def _whole_first(each: float, count: int, columns: int) -> tuple[float, float]:
    """Of `each` tiles of `count` rows, on average: those that are whole, those that are not."""
    whole = each * (count // columns) / cdiv(count, columns)
    return whole, each - whole


def _ranks(named: Named) -> Steps:
    if "each" not in named:
        return Steps(outer=cdiv(named["b_count"], named["COLUMNS"]), inner=_chunks(named))
    own = () if named["query_ids_ptr"] is not None else (cdiv(named["ROWS"], named["COLUMNS"]),)
    walks = (*own, *_whole_first(named["each"], named["b_count"], named["COLUMNS"]))
    return Steps(outer=named["each"] + sum(own), inner=_chunks(named), walks=walks)


def _sample(named: Named) -> Steps:
    return Steps(outer=2 * cdiv(named["count"], named["COLUMNS"]), inner=_chunks(named))


def _queue_combine(named: Named) -> Steps:
    tiles = cdiv(named["rows"], named["COLUMNS"])
    loops = 2 if named["GRADIENTS"] else 1
    if named["query_ids_ptr"] is None:  # then the positives are known, and nothing is multiplied
        tiles = loops = 1
    merged = named.get("splits", _chunks(named))  # once it also added up the splits
    return Steps(outer=loops * tiles, inner=_chunks(named), other=merged)


def _queue_merge(named: Named) -> Steps:
    return Steps(other=cdiv(named["splits"], named["TILE"]))


def _loss(named: Named) -> Steps:
    return Steps(other=named.get("row_splits", 1))


def _select(named: Named) -> Steps:
    # A bit of a key at a time.
    bits = 8 * named["scores_ptr"].element_size()
    rows = named["num_global"] + named["keep"]
    return Steps(other=bits - 1, copying=cdiv(rows, named["ROWS"]))


def _chunks(named: Named) -> int:
    return cdiv(named["dim"], named["CHUNK"])


_RULES: dict[str, Callable[[Named], Steps]] = {
    "block_sparse_attention._forward_kernel": _attention,
    "block_sparse_attention._grad_query_kernel": _attention,
    "block_sparse_attention._grad_key_kernel": _attention,
    "block_sparse_attention._saliency_kernel": lambda named: Steps(other=named["num_heads"]),
    "cross_attention._forward_kernel": _cross,
    "cross_attention._grad_kernel": _cross,
    "cross_attention._grad_key_kernel": _over_queries,
    "cross_attention._saliency_kernel": _cross_saliency,
    "cross_attention._combine_kernel": lambda named: Steps(other=named["parts"]),
    "cross_attention._combine_grads_kernel": lambda named: Steps(other=named["parts"]),
    "info_nce._statistics_kernel": _statistics,
    "info_nce._gradient_kernel": _gradient,
    "info_nce._loss_kernel": _loss,
    "sigmoid_nce._pairs_kernel": _sigmoid,
    "queue_info_nce._sweep_kernel": _queue,
    "queue_info_nce._merge_kernel": _queue_merge,
    "queue_info_nce._combine_kernel": _queue_combine,
    "queue_info_nce_combine._combine_kernel": _queue_combine,
    "retrieval_ranks._ranks_kernel": _ranks,
    "sample_hard_negatives._sample_kernel": _sample,
    "token_pruning._select_kernel": _select,
}

"""Sparse multimodal attention: hand-written kernels as torch ops."""

from svitt_ops import nn, reference
from svitt_ops._version import __version__
from svitt_ops.block_sparse_attention import block_sparse_attention, position_codes
from svitt_ops.cross_attention import cross_attention
from svitt_ops.info_nce import info_nce
from svitt_ops.layout import BlockLayout
from svitt_ops.queue_info_nce import queue_info_nce
from svitt_ops.retrieval_ranks import retrieval_ranks
from svitt_ops.sample_hard_negatives import sample_hard_negatives
from svitt_ops.sigmoid_nce import sigmoid_nce
from svitt_ops.token_pruning import PrunedTokens, keep_count, prune_tokens, select_tokens

OPS = (
    "block_sparse_attention",
    "cross_attention",
    "token_pruning",
    "info_nce",
    "queue_info_nce",
    "sigmoid_nce",
    "sample_hard_negatives",
    "retrieval_ranks",
)
"""Stems of the ops, the same in every folder."""

__all__ = [
    "OPS",
    "BlockLayout",
    "PrunedTokens",
    "__version__",
    "block_sparse_attention",
    "cross_attention",
    "info_nce",
    "keep_count",
    "nn",
    "position_codes",
    "prune_tokens",
    "queue_info_nce",
    "reference",
    "retrieval_ranks",
    "sample_hard_negatives",
    "select_tokens",
    "sigmoid_nce",
]

"""Plain-PyTorch definitions of the ops: same names, same signatures, any floating dtype.

They are the oracle of the tests and what a CPU runs where no compiler was found.
"""

from typing import TYPE_CHECKING

from svitt_ops.reference.info_nce import info_nce
from svitt_ops.reference.queue_info_nce import queue_info_nce
from svitt_ops.reference.retrieval_ranks import retrieval_ranks
from svitt_ops.reference.sample_hard_negatives import sample_hard_negatives
from svitt_ops.reference.sigmoid_nce import sigmoid_nce
from svitt_ops.reference.token_pruning import prune_tokens, select_tokens

if TYPE_CHECKING:  # they have the ops' signatures, overloads included
    from svitt_ops.block_sparse_attention import block_sparse_attention
    from svitt_ops.cross_attention import cross_attention
else:
    from svitt_ops.reference.block_sparse_attention import block_sparse_attention
    from svitt_ops.reference.cross_attention import cross_attention

__all__ = [
    "block_sparse_attention",
    "cross_attention",
    "info_nce",
    "prune_tokens",
    "queue_info_nce",
    "retrieval_ranks",
    "sample_hard_negatives",
    "select_tokens",
    "sigmoid_nce",
]

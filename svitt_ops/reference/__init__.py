"""Plain-PyTorch definitions of the ops: same names, same signatures, any floating dtype.

They are the oracle of the tests and what a CPU runs where no compiler was found.
"""

from svitt_ops.reference.block_sparse_attention import block_sparse_attention
from svitt_ops.reference.cross_attention import cross_attention

__all__ = ["block_sparse_attention", "cross_attention"]

"""Sparse multimodal attention: hand-written kernels as torch ops."""

from svitt_ops import reference
from svitt_ops._version import __version__
from svitt_ops.block_sparse_attention import block_sparse_attention, position_codes
from svitt_ops.cross_attention import cross_attention
from svitt_ops.layout import BlockLayout

OPS = ("block_sparse_attention", "cross_attention")
"""Stems of the ops, the same in every folder."""

__all__ = [
    "OPS",
    "BlockLayout",
    "__version__",
    "block_sparse_attention",
    "cross_attention",
    "position_codes",
    "reference",
]

"""The ops' namespace in torch's dispatcher, named here alone.

A package for Hugging Face's kernel hub has another file in this place: each build registers in a
namespace of its own, so that two of them can be loaded side by side.
"""

from __future__ import annotations

import torch

ops = torch.ops.svitt_ops


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an op."""
    return f"svitt_ops::{op_name}"

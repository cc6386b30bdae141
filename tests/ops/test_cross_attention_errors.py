"""cross_attention refuses every bad argument by name, with what it must be and what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import svitt_ops as so

Q = torch.randn(2, 3, 5, 16)
K = torch.randn(2, 3, 61, 16)
MASK = torch.zeros(2, 61, dtype=torch.bool)
OP = "cross_attention: "

REFUSED = {
    "rank": (dict(query=Q[0]), ValueError, r"query must have shape \(batch.*got \(3, 5, 16\)"),
    "key rank": (
        dict(key=K[0]),
        ValueError,
        r"key must have shape \(2, 3, keys, 16\), got \(3, 61, 16\)",
    ),
    "key heads": (
        dict(key=K[:, :2]),
        ValueError,
        r"key must have shape \(2, 3, keys, 16\), got \(2, 2, 61, 16\)",
    ),
    "key head_dim": (
        dict(key=K[..., :8]),
        ValueError,
        r"key must have shape \(2, 3, keys, 16\), got \(2, 3, 61, 8\)",
    ),
    "value shape": (
        dict(value=K[:, :, :60]),
        ValueError,
        r"value must have shape \(2, 3, 61, 16\), got \(2, 3, 60, 16\)",
    ),
    "key dtype": (dict(key=K.half()), TypeError, r"key must be torch.float32 .* got torch.float16"),
    "value dtype": (
        dict(value=K.bfloat16()),
        TypeError,
        r"value must be torch.float32 .* got torch.bfloat16",
    ),
    "fp64": (dict(query=Q.double()), TypeError, "query must be float32.*got torch.float64"),
    "integers": (dict(key=K.int()), TypeError, "key must be float32.*got torch.int32"),
    "no tensor": (dict(value=[1.0]), TypeError, "value must be a tensor, got list"),
    "device": (dict(key=K.to("meta")), ValueError, "key must be on cpu, got meta"),
    "strides": (
        dict(key=K.mT.contiguous().mT),
        ValueError,
        "key must have a contiguous last dimension, got strides",
    ),
    "small head": (
        dict(query=Q[..., :4], key=K[..., :4], value=K[..., :4]),
        ValueError,
        "head_dim must be 8 to 256, got 4",
    ),
    "large head": (
        {name: torch.zeros(1, 1, 6, 300) for name in ("query", "key", "value")},
        ValueError,
        "head_dim must be 8 to 256, got 300",
    ),
    "mask type": (
        dict(key_padding_mask=[True]),
        TypeError,
        "key_padding_mask must be a tensor, got list",
    ),
    "mask dtype": (
        dict(key_padding_mask=MASK.float()),
        TypeError,
        "key_padding_mask must be bool, got torch.float32",
    ),
    "mask shape": (
        dict(key_padding_mask=MASK[:, :5]),
        ValueError,
        r"key_padding_mask must have shape \(2, 61\), got \(2, 5\)",
    ),
    "mask rank": (
        dict(key_padding_mask=MASK[:, None]),
        ValueError,
        r"key_padding_mask must have shape \(2, 61\), got \(2, 1, 61\)",
    ),
    "mask device": (
        dict(key_padding_mask=MASK.to("meta")),
        ValueError,
        "key_padding_mask must be on cpu, got meta",
    ),
    "scale": (dict(scale=float("inf")), ValueError, "scale must be finite, got inf"),
    "saliency": (
        dict(return_saliency="max"),
        ValueError,
        "return_saliency must be None, 'cls' or 'mean', got 'max'",
    ),
    "saliency flag": (
        dict(return_saliency=True),
        ValueError,
        "return_saliency must be None, 'cls' or 'mean', got True",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    changes, error, message = REFUSED[name]
    arguments: dict[str, Any] = dict(query=Q, key=K, value=K) | changes
    with pytest.raises(error, match=OP + message):
        so.cross_attention(**arguments)


def test_the_same_arguments_unchanged_are_fine() -> None:
    out = so.cross_attention(Q, K, K, key_padding_mask=MASK)
    assert isinstance(out, torch.Tensor) and out.isfinite().all()

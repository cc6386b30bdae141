"""Every bad argument is refused by name, with what it must be and what it was."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import svitt_ops as so

Q = torch.randn(2, 3, 61, 16)
LAYOUT = so.BlockLayout.local_random(60, block_size=16)
CODES = so.position_codes((1, 6, 10))
TABLE = torch.randn(11 * 19 + 3, 3)
LENGTHS = torch.tensor([61, 7], dtype=torch.int32)
OP = "block_sparse_attention: "


def layout_with(heads: int) -> so.BlockLayout:
    mask = torch.ones(heads, 4, 4, dtype=torch.bool)
    return so.BlockLayout.from_mask(mask, num_tokens=60, block_size=16)


ATTENTION = {
    "rank": (dict(query=Q[0]), ValueError, r"query must have shape \(batch.*got \(3, 61, 16\)"),
    "key shape": (dict(key=Q[:, :, :60]), ValueError, r"key must have shape \(2, 3, 61, 16\), got"),
    "value shape": (
        dict(value=Q[:1]),
        ValueError,
        r"value must have shape .* got \(1, 3, 61, 16\)",
    ),
    "dtypes": (dict(key=Q.half()), TypeError, r"key must be torch.float32 .* got torch.float16"),
    "fp64": (dict(query=Q.double()), TypeError, "query must be float32.*got torch.float64"),
    "integers": (dict(query=Q.int()), TypeError, "query must be float32.*got torch.int32"),
    "no tensor": (dict(query=[1.0]), TypeError, "query must be a tensor, got list"),
    "device": (dict(value=Q.to("meta")), ValueError, "value must be on cpu, got meta"),
    "strides": (
        dict(query=Q.mT.contiguous().mT),
        ValueError,
        "query must have a contiguous last dimension, got strides",
    ),
    "small head": (
        dict(query=Q[..., :4], key=Q[..., :4], value=Q[..., :4]),
        ValueError,
        "head_dim must be 8 to 256, got 4",
    ),
    "large head": (
        {name: torch.zeros(1, 1, 61, 300) for name in ("query", "key", "value")},
        ValueError,
        "head_dim must be 8 to 256, got 300",
    ),
    "no layout": (dict(layout=None), TypeError, "layout must be a BlockLayout, got NoneType"),
    "layout length": (
        dict(layout=so.BlockLayout.local_random(61)),
        ValueError,
        "layout must cover 61 tokens, got 62",
    ),
    "layout heads": (
        dict(layout=layout_with(2)),
        ValueError,
        r"layout must have leading dimensions .* got \(2,\)",
    ),
    "layout device": (
        dict(layout=LAYOUT.to("meta")),
        ValueError,
        "layout must be on cpu, got meta",
    ),
    "codes missing": (dict(bias_table=TABLE), ValueError, "position_codes must be given when"),
    "table missing": (dict(position_codes=CODES), ValueError, "bias_table must be given when"),
    "table rows": (
        dict(bias_table=TABLE[1:], position_codes=CODES),
        ValueError,
        "bias_table must have an odd number of rows and 3 more for 1 global .* got 211",
    ),
    "table too small": (
        dict(bias_table=TABLE[:3], position_codes=CODES),
        ValueError,
        "bias_table must have an odd number",
    ),
    "table heads": (
        dict(bias_table=TABLE[:, :2], position_codes=CODES),
        ValueError,
        r"bias_table must have shape \(rows, 3\), got \(212, 2\)",
    ),
    "table dtype": (
        dict(bias_table=TABLE.long(), position_codes=CODES),
        TypeError,
        "bias_table must be float32",
    ),
    "codes range": (
        dict(bias_table=TABLE, position_codes=CODES * 2),
        ValueError,
        "position_codes must differ by at most 104 .* got a difference of 208",
    ),
    "codes dtype": (
        dict(bias_table=TABLE, position_codes=CODES.long()),
        TypeError,
        "position_codes must be int32, got torch.int64",
    ),
    "codes shape": (
        dict(bias_table=TABLE, position_codes=CODES[:-1]),
        ValueError,
        r"position_codes must have shape \(60,\) or .* got \(59,\)",
    ),
    "negative lengths": (
        dict(key_lengths=LENGTHS - 8),
        ValueError,
        "key_lengths must be 0 to 61, got -1 to 53",
    ),
    "long lengths": (dict(key_lengths=LENGTHS + 1), ValueError, "key_lengths must be 0 to 61"),
    "float lengths": (dict(key_lengths=LENGTHS.float()), TypeError, "key_lengths must be int32"),
    "lengths shape": (
        dict(key_lengths=LENGTHS[:1]),
        ValueError,
        r"key_lengths must have shape \(2,\), got \(1,\)",
    ),
    "scale": (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
    "saliency": (
        dict(
            layout=so.BlockLayout.local_random(61, block_size=16, num_global=0),
            return_saliency=True,
        ),
        ValueError,
        "return_saliency needs num_global of at least 1, got 0",
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_refuses(name: str) -> None:
    changes, error, message = ATTENTION[name]
    arguments: dict[str, Any] = dict(query=Q, key=Q, value=Q, layout=LAYOUT) | changes
    with pytest.raises(error, match=OP + message):
        so.block_sparse_attention(**arguments)


def test_the_same_arguments_unchanged_are_fine() -> None:
    out = so.block_sparse_attention(
        Q, Q, Q, LAYOUT, bias_table=TABLE, position_codes=CODES, key_lengths=LENGTHS
    )
    assert isinstance(out, torch.Tensor) and out.isfinite().all()


LAYOUTS = {
    "block_size 0": (dict(block_size=0), ValueError, "block_size must be at least 1, got 0"),
    "block_size 257": (dict(block_size=257), ValueError, "block_size must be 1 to 256, got 257"),
    "block_size float": (dict(block_size=5.0), TypeError, "block_size must be an int, got float"),
    "num_tokens": (dict(num_tokens=-1), ValueError, "num_tokens must be at least 0, got -1"),
    "num_global": (dict(num_global=-1), ValueError, "num_global must be at least 0, got -1"),
    "num_local": (dict(num_local=-1), ValueError, "num_local must be at least 0, got -1"),
    "num_random": (dict(num_random=True), TypeError, "num_random must be an int, got bool"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_local_random_refuses(name: str) -> None:
    changes, error, message = LAYOUTS[name]
    with pytest.raises(error, match=re.escape(f"BlockLayout.local_random: {message}")):
        so.BlockLayout.local_random(**(dict(num_tokens=60) | changes))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(4, 3, dtype=torch.bool), ValueError, r"mask must have shape \(4, 4\)"),
        (torch.ones(4, 4), TypeError, "mask must be a bool tensor, got torch.float32"),
        (torch.ones(1, 1, 1, 4, 4, dtype=torch.bool), ValueError, "mask must have shape"),
        ([[True]], TypeError, "mask must be a bool tensor, got list"),
    ],
)
def test_from_mask_refuses(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"BlockLayout.from_mask: {message}"):
        so.BlockLayout.from_mask(mask, num_tokens=60, block_size=16)


def lists(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    counts = torch.tensor([2, 1], dtype=torch.int32)
    blocks = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    queries = torch.tensor([[0, 0], [0, 1]], dtype=torch.int32)
    kept = dict(key_counts=counts, key_blocks=blocks)
    return kept | dict(query_counts=counts.flip(0), query_blocks=queries) | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(key_blocks=torch.tensor([[0, 2], [1, 0]])), TypeError, "key_blocks must be int32"),
        (
            dict(key_blocks=torch.tensor([[0, 2], [1, 0]], dtype=torch.int32)),
            ValueError,
            "key_blocks must name blocks 0 to 1, got 0 to 2",
        ),
        (
            dict(query_blocks=torch.tensor([[-1, 0], [0, 1]], dtype=torch.int32)),
            ValueError,
            "query_blocks must name blocks 0 to 1, got -1 to 1",
        ),
        (
            dict(key_counts=torch.tensor([3, 1], dtype=torch.int32)),
            ValueError,
            "key_counts must be 0 to 2, got 1 to 3",
        ),
        (
            dict(key_blocks=torch.tensor([[1, 1], [1, 0]], dtype=torch.int32)),
            ValueError,
            "key_blocks must ascend without repetition",
        ),
        (
            dict(query_counts=torch.tensor([2, 2], dtype=torch.int32)),
            ValueError,
            "query_blocks must ascend without repetition|transposed relation",
        ),
        (
            dict(query_blocks=torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)),
            ValueError,
            "must be the transposed relation",
        ),
        (
            dict(key_counts=torch.tensor([2], dtype=torch.int32)),
            ValueError,
            "key_counts must have shape",
        ),
    ],
)
def test_constructor_refuses(
    changes: dict[str, torch.Tensor], error: type[Exception], message: str
) -> None:
    so.BlockLayout(32, 16, 1, **lists())
    with pytest.raises(error, match=f"BlockLayout: .*({message})"):
        so.BlockLayout(32, 16, 1, **lists(**changes))


def test_codes_are_checked_where_python_cannot() -> None:
    def run(q: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        out = so.block_sparse_attention(q, q, q, LAYOUT, bias_table=TABLE, position_codes=codes)
        assert isinstance(out, torch.Tensor)
        return out

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(Q, CODES), run(Q, CODES))
    with pytest.raises((RuntimeError, IndexError)):
        compiled(Q, CODES * 2)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3, 4), (2, 3, 4, 5)])
def test_position_codes_refuses(shape: Any) -> None:
    with pytest.raises(ValueError, match="position_codes: shape must be 3 positive ints, got"):
        so.position_codes(shape)

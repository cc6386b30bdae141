"""What mypy makes of results that depend on a flag: a literal picks the type, a bool the union."""

from pathlib import Path

import pytest

PAIR = "tuple[Tensor, Tensor]"
BY_FLAG = {
    "": "Tensor",
    "return_saliency=False": "Tensor",
    "return_saliency=True": PAIR,
    "return_saliency=flag": f"Tensor | {PAIR}",
}
BY_NAME = {
    "": "Tensor",
    "return_saliency=None": "Tensor",
    "return_saliency='cls'": PAIR,
    "return_saliency='mean'": PAIR,
    "return_saliency=name": f"Tensor | {PAIR}",
}
CALLS = {
    "so.block_sparse_attention(x, x, x, layout, {})": BY_FLAG,
    "so.reference.block_sparse_attention(x, x, x, layout, {})": BY_FLAG,
    "own(x, layout, {})": BY_FLAG,
    "own.forward(x, layout, {})": BY_FLAG,
    "so.cross_attention(x, x, x, {})": BY_NAME,
    "so.reference.cross_attention(x, x, x, {})": BY_NAME,
    "cross(x, x, {})": BY_NAME,
    "cross.forward(x, x, {})": BY_NAME,
}
SNIPPET = """
from typing import Literal
from typing_extensions import assert_type
from torch import Tensor
import svitt_ops as so
def calls(
    x: Tensor, layout: so.BlockLayout, flag: bool, name: Literal["cls", "mean"] | None,
    own: so.nn.BlockSparseSelfAttention, cross: so.nn.CrossAttention,
) -> None:
"""


def test_a_flag_decides_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("mypy.api")
    monkeypatch.chdir(Path(__file__).parents[1])  # its settings, and the cache of `make lint`
    lines = [
        f"    assert_type({call.format(flag)}, {kind})"
        for call, by in CALLS.items()
        for flag, kind in by.items()
    ]
    found, errors, status = api.run(["-c", SNIPPET + "\n".join(lines)])
    assert status == 0, found + errors

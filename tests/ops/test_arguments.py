"""Arguments of every public function by their kind: what is refused, and what numpy's scalars give.

Each refusal is one line that names the function and the argument.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import svitt_ops as so
from svitt_ops.nn import (
    BlockSparseSelfAttention,
    CrossAttention,
    RelativePositionBias3D,
    TokenPruning,
)

QKV = torch.randn(2, 2, 21, 8)
ROWS = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
IDS = torch.tensor([0, 1, 1, 2])
TOKENS = torch.randn(2, 21, 16)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that they are a prototype
    NESTED = torch.nested.nested_tensor([ROWS, ROWS])
LAYOUT = so.BlockLayout.local_random(20, block_size=4)
LISTS = {
    name: getattr(LAYOUT, name)
    for name in ("key_counts", "key_blocks", "query_counts", "query_blocks")
}

NO_NUMBER = [True, np.True_, "a", [1], (1,), {}, 1j, object(), torch.tensor(1), torch.tensor(0.5)]
NO_NUMBER += [np.array([1, 2]), torch.ones(2, device="meta")]
NO_INT = [*NO_NUMBER, None, 1.5, float("nan"), np.float32(2), Fraction(1, 2), 2**70]
WRONG: dict[str, list[Any]] = {
    "int": NO_INT,
    "count": [*NO_INT, -1, np.int64(-1)],
    "float": [*NO_NUMBER, None, float("nan"), float("inf"), np.float32("nan"), 10**400],
    "scale": [*NO_NUMBER, float("nan"), -float("inf"), np.float64("inf")],
    "temperature": [True, "a", [0.1], None, 1j, 0, -1.0, torch.ones(2), torch.tensor(1)],
    "bias": [True, "a", [0.1], None, 1j, float("inf"), torch.ones(2), torch.tensor(1)],
    "flag": [0, 1, None, "a", 1.0, torch.tensor(True), [], np.array([True])],
    "tensor": ["a", [[1.0]], 1.5, True, None, np.ones((2, 2), np.float32), QKV.to(torch.cfloat)],
    "tensor?": ["a", [1.0], 1.5, True, np.ones(4), QKV.double(), QKV.to("meta")],
    "saliency": [True, 1, "max", ["cls"], torch.ones(2), np.array(["cls", "mean"])],
    "layout": [None, 5, "a", torch.ones(5, 5).bool(), list(LISTS.values())],
    "device": [torch.float16, 1.5, True, "nowhere", ["cpu"], torch.ones(1), "cpu:x", 10**30],
    "dtype": ["float32", 1, True, torch.int64, torch.complex64, np.float32, [torch.float32]],
    "generator": [5, "a", torch.default_generator.get_state()],
    "grid": [8, None, "abc", (1, 2), (1, 4, 5, 6), (0, 4, 5), (1, 4.0, 5), (True, 4, 5), 2.5],
    "group": [5, "a", object(), torch.ones(2, 2)],
}
WRONG["tensor"] += [QKV.to_sparse(), NESTED]
WRONG["tensor?"] += [IDS.to_sparse(), NESTED]
WRONG["temperature"] += [torch.ones(1).to_sparse(), NESTED]
WRONG["device!"] = [*WRONG["device"], None]
WRONG["grid"] += [torch.tensor([1, 4, 5]), np.array(0.5)]

Case = tuple[Callable[..., Any], dict[str, Any], dict[str, str]]
CASES: dict[str, Case] = {
    "block_sparse_attention": (
        so.block_sparse_attention,
        dict(query=QKV, key=QKV, value=QKV, layout=LAYOUT, return_saliency=True),
        dict(query="tensor", key="tensor", value="tensor", layout="layout", scale="scale")
        | dict(key_lengths="tensor?", return_saliency="flag"),
    ),
    "cross_attention": (
        so.cross_attention,
        dict(query=QKV, key=QKV, value=QKV),
        dict(query="tensor", key="tensor", value="tensor", scale="scale")
        | dict(key_padding_mask="tensor?", return_saliency="saliency"),
    ),
    "info_nce": (
        so.info_nce,
        dict(query=ROWS, key=ROWS, temperature=0.1, ids=IDS),
        dict(query="tensor", key="tensor", temperature="temperature", ids="tensor?")
        | dict(weights="tensor?", symmetric="flag", label_smoothing="float", group="group"),
    ),
    "queue_info_nce": (
        so.queue_info_nce,
        dict(query=ROWS, key=ROWS, queue=ROWS, temperature=0.1, query_ids=IDS),
        dict(query="tensor", key="tensor", queue="tensor", temperature="temperature")
        | dict(alpha="float", teacher_query="tensor?", query_ids="tensor?")
        | dict(key_ids="tensor?", queue_ids="tensor?"),
    ),
    "sigmoid_nce": (
        so.sigmoid_nce,
        dict(query=ROWS, key=ROWS, temperature=0.1, bias=-10.0),
        dict(query="tensor", key="tensor", temperature="temperature", bias="bias", ids="tensor?")
        | dict(group="group"),
    ),
    "sample_hard_negatives": (
        so.sample_hard_negatives,
        dict(query=ROWS, key=ROWS, temperature=0.1),
        dict(query="tensor", key="tensor", temperature="temperature", ids="tensor?")
        | dict(generator="generator"),
    ),
    "retrieval_ranks": (
        so.retrieval_ranks,
        dict(query=ROWS, key=ROWS, query_ids=IDS, key_ids=IDS),
        dict(query="tensor", key="tensor", query_ids="tensor", key_ids="tensor"),
    ),
    "prune_tokens": (
        so.prune_tokens,
        dict(tokens=TOKENS, scores=TOKENS[:, 1:, 0], keep=3),
        dict(tokens="tensor", scores="tensor", num_global="count", position_codes="tensor?"),
    ),
    "select_tokens": (
        so.select_tokens,
        dict(scores=TOKENS[..., 0], keep=3),
        dict(scores="tensor", keep="count"),
    ),
    "keep_count": (
        so.keep_count,
        dict(keep_rate=0.5, num_tokens=10),
        dict(keep_rate="float", num_tokens="count"),
    ),
    "position_codes": (
        so.position_codes,
        dict(shape=(1, 4, 5)),
        dict(shape="grid", device="device"),
    ),
    "BlockLayout.local_random": (
        so.BlockLayout.local_random,
        dict(num_tokens=20),
        dict(num_tokens="count", block_size="count", num_local="count", num_random="count")
        | dict(num_global="count", generator="generator", device="device"),
    ),
    "BlockLayout.from_mask": (
        so.BlockLayout.from_mask,
        dict(mask=torch.ones(5, 5).bool(), num_tokens=20, block_size=4),
        dict(mask="tensor", num_tokens="count", block_size="count", num_global="count"),
    ),
    "BlockLayout.from_block_mask": (
        so.BlockLayout.from_block_mask,
        dict(block_mask=LAYOUT.to_block_mask()),
        dict(block_mask="layout"),
    ),
    "BlockLayout": (
        so.BlockLayout,
        dict(num_tokens=20, block_size=4, num_global=1) | LISTS,
        dict(num_tokens="count", block_size="count", num_global="count")
        | dict.fromkeys(LISTS, "tensor"),
    ),
    "BlockLayout.to": (LAYOUT.to, dict(device="cpu"), dict(device="device!")),
    "BlockLayout.to_block_mask": (
        lambda block_size=None: LAYOUT.to_block_mask(
            block_size=0 if block_size is None else block_size
        ),
        dict(block_size=4),
        dict(block_size="count"),
    ),
    "RelativePositionBias3D": (
        RelativePositionBias3D,
        dict(grid=(1, 4, 5), num_heads=2),
        dict(grid="grid", num_heads="count", num_global="count", std="float")
        | dict(device="device", dtype="dtype"),
    ),
    "BlockSparseSelfAttention": (
        BlockSparseSelfAttention,
        dict(dim=16, num_heads=2),
        dict(dim="count", num_heads="int", qkv_bias="flag", key_bias="flag", bias="group")
        | dict(device="device", dtype="dtype"),
    ),
    "CrossAttention": (
        CrossAttention,
        dict(dim=16, num_heads=2, context_dim=8),
        dict(dim="count", num_heads="int", bias="flag", device="device", dtype="dtype"),
    ),
    "TokenPruning": (
        TokenPruning,
        dict(keep_rate=0.5),
        dict(keep_rate="float", num_global="count"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_argument_is_named_in_one_line(name: str) -> None:
    function, good, kinds = CASES[name]
    function(**good)
    for argument, kind in kinds.items():
        for value in WRONG[kind]:
            with pytest.raises((TypeError, ValueError)) as caught:
                function(**{**good, argument: value})
            message = str(caught.value)
            assert message.startswith(f"{name}: "), (argument, value, message)
            assert argument in message and "\n" not in message, (argument, value, message)
            assert len(message) < 200, message


@pytest.mark.parametrize("module", [BlockSparseSelfAttention, CrossAttention])
def test_modules_name_what_they_are_given(module: Any) -> None:
    layer = module(16, 2)
    other: Any = LAYOUT if module is BlockSparseSelfAttention else TOKENS
    for value in (
        [[1.0]],
        TOKENS.to_sparse(),
        TOKENS[0],
        TOKENS[..., :8],
        None,
        1.5,
        np.ones((2, 21, 16)),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{module.__name__}: tokens must "):
            layer(value, other)
    with pytest.raises(TypeError, match="CrossAttention: context must be a tensor, got NoneType"):
        CrossAttention(16, 2)(TOKENS, None)


def test_numpy_scalars_are_numbers() -> None:
    def alike(run: Callable[..., torch.Tensor], *numbers: Any) -> None:
        assert torch.equal(run(*numbers), run(*(x.item() for x in numbers)))

    for kind in (np.float64, np.float32, np.float16):
        alike(lambda x: so.cross_attention(QKV, QKV, QKV, scale=x), kind(0.25))
        alike(lambda x: so.block_sparse_attention(QKV, QKV, QKV, LAYOUT, scale=x), kind(0.25))
        alike(lambda x, y: so.info_nce(ROWS, ROWS, x, label_smoothing=y), kind(0.5), kind(0.25))
        alike(lambda x, y: so.sigmoid_nce(ROWS, ROWS, x, y), kind(0.5), kind(-2.5))
        alike(
            lambda x, y: so.queue_info_nce(ROWS, ROWS, ROWS, x, teacher_query=ROWS, alpha=y),
            kind(0.5),
            kind(0.25),
        )
    for whole in (np.int64, np.int32, np.uint8):
        alike(lambda x: so.prune_tokens(TOKENS, TOKENS[:, 1:, 0], keep=x).tokens, whole(3))
        alike(lambda x: so.select_tokens(TOKENS[..., 0], x), whole(3))
        alike(lambda x, y, z: so.position_codes((x, y, z)), whole(2), whole(3), whole(4))
        layout = so.BlockLayout.local_random(
            whole(20),
            block_size=whole(4),
            num_local=whole(1),
            num_random=whole(2),
            num_global=whole(1),
            generator=torch.Generator().manual_seed(1),
        )
        wanted = so.BlockLayout.local_random(
            20, block_size=4, num_random=2, generator=torch.Generator().manual_seed(1)
        )
        assert torch.equal(layout.key_blocks, wanted.key_blocks)
        assert type(layout.num_tokens) is type(layout.block_size) is type(layout.num_global) is int
        checked = so.BlockLayout(whole(20), whole(4), whole(1), **LISTS)
        assert type(checked.num_tokens) is int and checked.seq_len == 21
        assert BlockSparseSelfAttention(whole(16), whole(2))(TOKENS, LAYOUT).shape == TOKENS.shape
    assert so.cross_attention(QKV, QKV, QKV, scale=1).isfinite().all()
    out = so.block_sparse_attention(QKV, QKV, QKV, LAYOUT, return_saliency=np.True_)
    assert isinstance(out, tuple)


def test_narrow_numpy_floats_stand_for_their_decimal() -> None:
    # As a double float32's 0.55 is 0.550000011920929, which rounds up to one token more.
    for kind in (np.float16, np.float32, np.float64, float):
        assert so.keep_count(kind(0.55), np.int64(100)) == 55
        assert TokenPruning(kind(0.55)).keep_rate == 0.55


def test_no_gradient_is_lost_in_a_number() -> None:
    scale = torch.nn.Parameter(torch.tensor(0.125))
    with pytest.raises(TypeError, match="scale must be a float, got Parameter"):
        so.cross_attention(QKV, QKV, QKV, scale=scale)
    with pytest.raises(TypeError, match="scale must be a float, got Tensor"):
        so.block_sparse_attention(QKV, QKV, QKV, LAYOUT, scale=torch.full((2, 1, 1), 0.125))

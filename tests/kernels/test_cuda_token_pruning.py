"""The CUDA kernel of token pruning against the reference, bit for bit; it is an op of its own."""

from __future__ import annotations

import pytest
import torch

from svitt_ops import _extension, _library
from svitt_ops.reference import token_pruning as reference
from svitt_ops.testing import poisoned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# batch, tokens, keep, globals, dim: every width of vectors, cached keys and not, one launch and two
SHAPES = [
    (3, 1, 1, 1, 8),
    (2, 55, 55, 0, 5),
    (2, 385, 270, 2, 33),
    (2, 785, 550, 1, 768),
    (4, 3137, 1883, 1, 20),
    (2, 8192, 100, 1, 2),
    (2, 9000, 8999, 1, 16),
    (130, 785, 471, 3, 96),
    (130, 57, 9, 1, 7),
    (0, 9, 3, 1, 8),
    (2, 9, 3, 1, 0),
    (2, 0, 0, 2, 8),
]


def test_every_op_has_its_schema() -> None:
    assert _library.cuda_kernels >= {"select_tokens", "prune_tokens", "prune_tokens_backward"}
    for name in _library.cuda_kernels:
        schema = str(getattr(torch.ops.svitt_ops, name).default._schema)
        twin = str(getattr(torch.ops.svitt_ops, f"{name}_cuda").default._schema)
        assert twin == schema.replace(f"{name}(", f"{name}_cuda(")


def test_without_the_extension_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "cuda_reason", lambda: "not today")
    with pytest.raises(RuntimeError, match="prune_tokens_cuda: no CUDA extension: not today"):
        _library.cuda_kernel("prune_tokens")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", ["normal", "ties", "equal", "special", "any bits"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_sort_and_gather(
    shape: tuple[int, ...], scores: str, dtype: torch.dtype
) -> None:
    if not _extension.load_cuda():
        pytest.skip(_extension.cuda_reason())
    batch, tokens, keep, num_global, dim = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", generator=generator)

    x = draw(batch, tokens)
    if scores == "ties":
        x = x.round()
    elif scores == "equal":
        x.fill_(-1.0)
    elif scores == "special":
        kinds = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0]).cuda()
        x = kinds[torch.randint(0, 6, x.shape, generator=generator, device="cuda")]
    x = x.to(dtype)
    if scores == "any bits":
        size = torch.iinfo(torch.int32 if dtype == torch.float32 else torch.int16)
        bits = torch.randint(size.min, size.max, x.shape, generator=generator, device="cuda")
        x = bits.to(getattr(torch, size.dtype)).view(dtype)
    given = draw(batch, num_global + tokens, dim).to(dtype)
    codes = torch.arange(tokens, dtype=torch.int32, device="cuda")
    wanted = reference.prune_tokens(
        given, x, keep=keep, num_global=num_global, position_codes=codes
    )
    inverse = reference.inverse_of(wanted.indices, tokens)
    with poisoned():
        found = _library.cuda_kernel("prune_tokens")(given, x, keep, num_global, codes[None])
        grad = _library.cuda_kernel("prune_tokens_backward")(found[0], inverse, num_global)
        indices = _library.cuda_kernel("select_tokens")(x, keep)
    right = {
        "tokens": wanted.tokens,
        "indices": wanted.indices,
        "inverse": inverse,
        "codes": wanted.position_codes,
        "grad": reference.prune_backward(found[0], inverse, num_global),
        "selected": wanted.indices,
    }
    for (name, expected), result in zip(right.items(), (*found, grad, indices), strict=True):
        assert torch.equal(result, expected), name


@pytest.mark.gpu
def test_graph_capture_and_strides() -> None:
    if not _extension.load_cuda():
        pytest.skip(_extension.cuda_reason())
    prune = _library.cuda_kernel("prune_tokens")
    for batch in (3, 130):
        # Rows of a wider tensor, the last ones 2 bytes away from an aligned address.
        for start in (0, 1):
            wide = torch.randn(batch, 101, 80, device="cuda").bfloat16()
            tokens, scores = wide[..., start : start + 64], torch.rand(batch, 100, device="cuda")
            expected = reference.prune_tokens(tokens, scores, keep=60).tokens
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = prune(tokens, scores, 60, 1, None)[0]
            graph.replay()
            assert torch.equal(captured, expected)

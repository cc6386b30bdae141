"""What the ops' tests do not reach in the Triton kernels of cross-attention."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read when a kernel's module is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from svitt_ops.kernels import cross_attention, cross_attention_backward  # noqa: E402
from svitt_ops.reference.cross_attention import attend, attend_backward  # noqa: E402


def run(queries: int, keys: int, saliency: int) -> list[torch.Tensor]:
    """Everything that the launchers return, for a sample with a mask and one without a key."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, grad = (
        torch.randn(2, 1, n, 32, generator=generator).to(DEVICE)
        for n in (queries, keys, keys, queries)
    )
    mask = (torch.rand(2, keys, generator=generator) < 0.3).to(DEVICE)
    mask[1] = True
    out, lse, received = cross_attention.cross_attention(q, k, v, mask, 0.2, saliency)
    grads = cross_attention_backward.cross_attention_backward(grad, q, k, v, out, lse, mask, 0.2)
    expected = [*attend(q, k, v, mask, 0.2, "cls" if saliency == 1 else "mean", torch.float32)]
    expected += attend_backward(grad, q, k, v, mask, 0.2)
    found = [out, lse, received, *grads]
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    return found


@pytest.mark.parametrize(("queries", "keys", "saliency"), [(20, 300, 1), (70, 150, 2)])
def test_split_keys(
    monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, saliency: int
) -> None:
    monkeypatch.setattr(cross_attention, "LEAST_KEYS", 40)
    assert cross_attention.split_keys(1, keys, 64)[0] > 1
    for first, second in zip(*(run(queries, keys, saliency) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_wide_offsets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = run(70, 100, 2)
    for module in (cross_attention, cross_attention_backward):
        monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
    for first, second in zip(narrow, run(70, 100, 2), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("keys", [0, 1, 30, 255, 256, 1569, 3137])
@pytest.mark.parametrize("programs", [1, 12, 96, 384])
def test_parts_cover_the_keys(programs: int, keys: int) -> None:
    parts, span = cross_attention.split_keys(programs, keys, 64)
    assert span % 64 == 0 and parts >= 1
    assert parts * span >= keys > (parts - 1) * span or keys == 0
    assert parts == 1 or (programs < cross_attention.PROGRAMS and span >= 256)

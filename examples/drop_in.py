"""A plain ViT block, and the same block with block-sparse attention: two lines differ.

python examples/drop_in.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svitt_ops as so

DIM, HEADS = 192, 3


class Block(nn.Module):
    """A pre-norm transformer block, as in any ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor, layout: so.BlockLayout) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, HEADS, DIM // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # read in place: no copies
        out = self.attend(q, k, v, layout)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: so.BlockLayout) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class SparseBlock(Block):
    """The same parameters: only the call that attends is another one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: so.BlockLayout) -> Tensor:
        return so.block_sparse_attention(q, k, v, layout)  # type: ignore[return-value]


def milliseconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)[2]


def main() -> None:
    torch.manual_seed(0)
    dense, sparse = Block(), SparseBlock()
    sparse.load_state_dict(dense.state_dict())
    # 8 frames of 14 x 14 patches and a CLS token, which is global.
    num_tokens = 8 * 14 * 14
    x = torch.randn(1, 1 + num_tokens, DIM)

    # With every block attended the two are the same function, gradients included.
    blocks = num_tokens // 56
    full = so.BlockLayout.from_mask(
        torch.ones(blocks, blocks, dtype=torch.bool), num_tokens=num_tokens, block_size=56
    )
    torch.testing.assert_close(sparse(x, full), dense(x, full), atol=1e-4, rtol=1e-4)
    for block in (sparse, dense):
        block(x, full).square().mean().backward()
    for name, parameter in sparse.named_parameters():
        torch.testing.assert_close(
            parameter.grad, dense.get_parameter(name).grad, atol=1e-4, rtol=1e-3
        )
    print("full layout: output and gradients equal those of scaled_dot_product_attention")

    # SViTT's layout: each block of 56 tokens attends itself, 3 random blocks and CLS.
    layout = so.BlockLayout.local_random(num_tokens, block_size=56, num_local=1, num_random=3)
    with torch.no_grad():
        before = milliseconds(lambda: dense(x, layout))
        after = milliseconds(lambda: sparse(x, layout))
    print(f"whole block, {1 + num_tokens} tokens: dense {before:.1f} ms, sparse {after:.1f} ms")
    print(f"the sparse one attends {layout.density:.0%} of the token pairs")


if __name__ == "__main__":
    main()

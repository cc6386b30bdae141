"""What `make demo` runs: block-sparse attention at work, checked, timed and drawn. Under a minute.

python examples/demo.py [PICTURE.png]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so

HEADS, HEAD_DIM, BLOCK = 12, 64, 56
PICTURE = Path(__file__).parent.parent / "build" / "demo_layout.png"


def main(picture: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    print(f"block_sparse_attention on {device}, torch {torch.__version__}\n")
    print("A video of T frames is T x 14 x 14 patch tokens and one CLS token. Dense attention")
    print(
        f"compares each token with every other. Here each block of {BLOCK} tokens attends itself,"
    )
    print("3 random blocks and CLS; CLS attends everything, so news still travels anywhere in")
    print("two layers. What it must equal is dense attention with the other pairs masked out.\n")

    correctness(device, generator)
    print("\nEdges: pairs of tokens that are compared. Times are medians of a few calls while")
    print("whatever else runs here runs on; `python -m bench` measures properly.\n")
    print(
        f"{'tokens':>7} {'edges':>6} {'pass':<19} {'dense ms':>9} {'sparse ms':>10} {'faster':>7}"
    )
    for frames in (4, 8, 16):
        speed(frames, device, generator)

    print("\nMemory: a dense attention matrix at 16 frames would be")
    tokens = 16 * 196 + 1
    print(
        f"  {HEADS * tokens**2 * 4 / 2**20:6.0f} MiB if it were stored (fp32, {HEADS} heads); here"
    )
    print(
        f"  {HEADS * tokens * 8 / 2**20:6.2f} MiB are kept for the backward beside q, k, v and out."
    )
    draw(so.BlockLayout.local_random(8 * 196, block_size=BLOCK, generator=generator), picture)


def tensors(frames: int, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    shape = (3, 1, HEADS, frames * 196 + 1, HEAD_DIM)
    return torch.randn(shape, generator=generator).to(device).unbind()


def correctness(device: str, generator: torch.Generator) -> None:
    q, k, v = tensors(4, device, generator)
    num_tokens = q.shape[2] - 1
    blocks = num_tokens // BLOCK
    everything = torch.ones(blocks, blocks, dtype=torch.bool, device=device)
    full = so.BlockLayout.from_mask(everything, num_tokens=num_tokens, block_size=BLOCK)
    sparse = so.BlockLayout.local_random(num_tokens, generator=generator, device=device)
    print("Largest difference from scaled_dot_product_attention, fp32:")
    for text, layout in (("every block attended", full), ("sparse, SDPA masked", sparse)):
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.to_dense())
        out = so.block_sparse_attention(q, k, v, layout)
        assert isinstance(out, Tensor)  # a pair with return_saliency
        error = (out - wanted).abs().max().item()
        if not error < 1e-4:
            raise SystemExit(f"{text}: off by {error:.1e}")
        print(f"  {text:<22} {error:.1e}  (values up to {wanted.abs().max().item():.1f})")


def speed(frames: int, device: str, generator: torch.Generator) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(frames, device, generator))
    layout = so.BlockLayout.local_random(q.shape[2] - 1, generator=generator, device=device)
    upstream = torch.randn(q.shape, generator=generator).to(device)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def sparse() -> Tensor:
        out = so.block_sparse_attention(q, k, v, layout)
        assert isinstance(out, Tensor)
        return out

    def with_gradient(call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), (q, k, v), upstream)

    pairs = {
        "forward": (torch.no_grad()(dense), torch.no_grad()(sparse)),
        "forward + backward": (with_gradient(dense), with_gradient(sparse)),
    }
    for name, (before, after) in pairs.items():
        slow, fast = milliseconds(before, device), milliseconds(after, device)
        tokens, edges = f"{q.shape[2]:>7}", f"{layout.density:>6.0%}"
        print(f"{tokens} {edges} {name:<19} {slow:>9.1f} {fast:>10.1f} {slow / fast:>6.1f}x")


def milliseconds(call: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(6):  # the first one warms up
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times[1:])[2]


def draw(layout: so.BlockLayout, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("\nNo picture of the layout: matplotlib is not installed.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 5), facecolor="white")
    axis.imshow(layout.to_dense().cpu(), cmap="Blues", interpolation="nearest")
    axis.set(xlabel="key token", ylabel="query token")
    axis.set_title(f"8 frames: {layout.density:.0%} of the pairs (CLS: too thin to see)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(f"\nPicture of the layout (blue: attended): {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)

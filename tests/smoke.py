"""Run by `make wheel-check` in an environment that has only the wheel and torch."""

from pathlib import Path

import torch

import svitt_ops as so

REPOSITORY = Path(__file__).parent.parent
package = Path(so.__file__).parent
assert package.parent != REPOSITORY, f"{package} is the repository's, not the wheel's"
for name in ("py.typed", "reference/__init__.py", "kernels/__init__.py"):
    assert (package / name).is_file(), f"the wheel lacks {name}"

generator = torch.Generator().manual_seed(0)
layout = so.BlockLayout.local_random(200, block_size=32, num_random=2, generator=generator)
query, key, value = (torch.randn(2, 3, 201, 32, generator=generator) for _ in range(3))
query.requires_grad_()
out, saliency = so.block_sparse_attention(query, key, value, layout, return_saliency=True)
out.square().sum().backward()
expected, _ = so.reference.block_sparse_attention(query, key, value, layout, return_saliency=True)
torch.testing.assert_close(out, expected)
assert saliency.shape == (2, 200)
assert query.grad is not None and query.grad.isfinite().all()
kept = so.prune_tokens(out[:, 0], saliency, keep_rate=0.6)
expected = so.reference.prune_tokens(out[:, 0], saliency, keep_rate=0.6)
assert all(torch.equal(x, y) for x, y in zip(kept[:2], expected[:2], strict=True))
print(f"the ops of {package} agree with the reference")

"""`python -m bench.determinism`: do the same inputs give the same bits, for any number of threads?

Attention with BEiT's relative position bias, dense so that torch computes the same function, and
the contrastive loss, forward and backward: ours, and what training code does. Each is run again and
again with the same inputs, in one process, for several numbers of threads; what is kept is a digest
of the bits of each result.

python -m bench.determinism --out bench/results/determinism/NAME.json     a minute
python -m bench.determinism --draw determinism.json --figures FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import svitt_ops as so
from bench.measure import environment
from bench.peers.dense_attention import pair_index
from bench.report.determinism import draw, table

THREADS = (1, 2, 3, 4)
HEADS, HEAD_DIM, BLOCK = 12, 64, 49
TEMPERATURE = 0.07
TOLERANCE = 1e-4
"""Greatest difference between two ways to compute one result, of its greatest value."""
Results = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to compute something."""

    name: str
    call: Callable[..., Tensor]
    """Of the inputs."""
    flag: bool = False
    """Under `torch.use_deterministic_algorithms`."""

    def run(self, inputs: Results) -> Results:
        """The result, and the gradient of each input."""
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        torch.use_deterministic_algorithms(self.flag)
        try:
            out = self.call(*leaves.values())
            out.backward(torch.linspace(-1, 1, out.numel()).view_as(out) if out.dim() else None)
        finally:
            torch.use_deterministic_algorithms(False)
        grads = {f"gradient of {name}": x.grad for name, x in leaves.items() if x.grad is not None}
        return {"result": out.detach(), **grads}


def attention(frames: int, side: int) -> tuple[Results, tuple[Way, ...]]:
    """Dense attention of a clip with a table of biases, and the ways to compute it."""
    grid = (frames, side, side)
    tokens = frames * side * side
    blocks = -(-tokens // BLOCK)
    every = torch.ones(blocks, blocks, dtype=torch.bool)
    layout = so.BlockLayout.from_mask(every, num_tokens=tokens, block_size=BLOCK, num_global=1)
    codes = so.position_codes(grid)
    rows = (2 * frames - 1) * (2 * side - 1) ** 2 + 3
    index = pair_index(codes, rows)
    inputs = {x: torch.randn(1, HEADS, tokens + 1, HEAD_DIM) for x in ("queries", "keys", "values")}
    inputs["table"] = 0.1 * torch.randn(rows, HEADS)

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        found = so.block_sparse_attention(q, k, v, layout, bias_table=bias, position_codes=codes)
        assert isinstance(found, Tensor)
        return found

    def indexed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, bias[index].permute(2, 0, 1)[None])

    def last(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        logits = torch.einsum("bhqd,bhkd->bqkh", q, k) * HEAD_DIM**-0.5 + bias[index]
        return torch.einsum("bqkh,bhkd->bhqd", logits.softmax(2), v)

    return inputs, (
        Way(name="svitt_ops: block_sparse_attention", call=ours),
        Way(name="torch: SDPA, table[index]", call=indexed),
        Way(name="torch: einsum, table[index], heads last", call=last),
        Way(name="einsum, deterministic algorithms on", call=last, flag=True),
    )


def loss(pairs: int, dim: int) -> tuple[Results, tuple[Way, ...]]:
    """The contrastive loss of a batch, and the ways to compute it."""
    noise = torch.randn(2, pairs, dim)
    inputs = {
        "queries": F.normalize(noise[0], dim=1),
        "keys": F.normalize(noise[0] + noise[1], dim=1),
        "temperature": torch.tensor(TEMPERATURE),
    }

    def eager(query: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
        logits, labels = query @ key.T / temperature, torch.arange(len(query))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return inputs, (
        Way(name="svitt_ops: info_nce", call=so.info_nce),
        Way(name="torch: cross_entropy of q @ k.T", call=eager),
    )


def measure(problems: Sequence[tuple[Results, tuple[Way, ...]]], runs: int) -> list[dict[str, Any]]:
    """Digests of every way's results, by number of threads.

    Raises:
        ValueError: two ways of one problem do not compute the same.
    """
    before, rows = torch.get_num_threads(), []
    try:
        for inputs, ways in problems:
            wanted = ways[0].run(inputs)
            for way in ways:
                _check(way.name, way.run(inputs), wanted)
                digests: dict[str, list[dict[str, str]]] = {}
                for threads in THREADS:
                    torch.set_num_threads(threads)
                    digests[str(threads)] = [_digests(way.run(inputs)) for _ in range(runs)]
                rows.append({"name": way.name, "digests": digests})
    finally:
        torch.set_num_threads(before)
    return rows


def _check(name: str, found: Results, wanted: Results) -> None:
    for part, x in wanted.items():
        error = float((found[part] - x).abs().max() / x.abs().max())
        if not error <= TOLERANCE:
            raise ValueError(f"{name}: {part} differs by {error:.1e} of its greatest value")


def _environment() -> dict[str, Any]:
    """That of the measurement, whose threads are counted."""
    facts = environment.describe(torch.device("cpu"))
    hardware = facts["hardware"].rpartition(", ")[0]
    return {**facts, "hardware": hardware, "threads": list(THREADS)}


def _digests(results: Results) -> dict[str, str]:
    return {
        part: hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16]
        for part, x in results.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.determinism",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=8, help="for each number of threads")
    parser.add_argument("--small", action="store_true", help="tiny inputs, to see that it works")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--draw", type=Path, help="JSON file to draw; nothing is measured")
    parser.add_argument("--figures", type=Path, default=Path("bench/results/figures"))
    arguments = parser.parse_args(argv)
    if arguments.draw is not None:
        for path in draw(json.loads(arguments.draw.read_text()), arguments.figures):
            print(path)
        return 0
    if arguments.runs < 1:
        parser.error(f"--runs must be at least 1, got {arguments.runs}")
    torch.manual_seed(0)
    small = arguments.small
    problems = [attention(1, 7), loss(64, 32)] if small else [attention(2, 14), loss(1024, 256)]
    document = {
        "command": f"python -m bench.determinism {'--small ' * small}--runs {arguments.runs}",
        "environment": _environment(),
        "results": measure(problems, arguments.runs),
    }
    print(table(document))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m bench.search_cost`: what it costs to search N images by N texts, as COOKIE's figure 4.

Two streams encode each image and each text once, and compare embeddings; one stream has a pass for
each pair. Both have the same ResNet and as many text layers. All that two streams do is timed at
every N. Of one stream, N x N passes are timed where they are few; else their time follows from that
of some: `extrapolated`. Weights and inputs are random, which no time depends on.

python -m bench.search_cost --out bench/results/search_cost/NAME.json      hours: the paper's model
python -m bench.search_cost --small --sizes 4 8 --out cost.json            seconds: does it work?
python -m bench.search_cost --draw cost.json --figures FOLDER
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import environment
from bench.peers.one_stream import OneStream
from bench.report.search_cost import draw
from svitt_ops.models import COOKIEConfig, COOKIEModel

SIZES = (100, 200, 500, 1000, 2000)
SMALL: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 16,
    "cnn_depths": [1, 1, 1],
    "cnn_sizes": [32, 64, 128],
    "cnn_stem": 16,
    "hidden_size": 64,
    "projection_dim": 64,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "text_hidden_size": 64,
    "text_num_attention_heads": 4,
    "text_num_hidden_layers": 3,
    "fusion_layer": 3,
    "text_intermediate_size": 128,
    "vocab_size": 1000,
}
TOLERANCE = 1e-4
"""Greatest difference of a result from that of pairs by themselves, of its greatest value."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or draw what was measured; the exit status: 1 where results are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.search_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N")
    parser.add_argument("--pairs", type=int, default=64, help="of one stream that are timed")
    parser.add_argument("--batch", type=int, default=16, help="images, texts or pairs at a time")
    parser.add_argument("--tokens", type=int, default=50, help="of a text")
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it works")
    parser.add_argument("--threads", type=int, help="(default: torch's)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--draw", type=Path, help="JSON file to draw; nothing is measured")
    parser.add_argument("--figures", type=Path, default=Path("bench/results/figures"))
    arguments = parser.parse_args(argv)
    if arguments.draw is not None:
        for path in draw(json.loads(arguments.draw.read_text()), arguments.figures):
            print(path)
        return 0
    if min(*arguments.sizes, arguments.pairs, arguments.batch, arguments.tokens) < 1:
        parser.error("--sizes, --pairs, --batch and --tokens must be at least 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = COOKIEConfig(**(SMALL if arguments.small else {}))
    models = COOKIEModel(config).eval(), OneStream(config).eval()
    with torch.inference_mode():
        wrong = gate(*models, tokens=min(arguments.tokens, 8))
        if wrong:
            print(f"not timed: {wrong}")
            return 1
        document = measure(*models, arguments)
    for row in document["results"]:
        two, one = row["two_stream"]["seconds"], row["one_stream"]["seconds"]
        mark = " (extrapolated)" if row["one_stream"]["extrapolated"] else ""
        print(f"N = {row['n']:>5}: two streams {two:10.2f} s, one {one:12.1f} s{mark}")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def gate(two: COOKIEModel, one: OneStream, *, tokens: int) -> str:
    """What is wrong with the scores of 3 x 3 pairs, each model's beside its own of single pairs."""
    images, texts = _inputs(two.config, 3, tokens)
    searches = (
        ("two streams", lambda *given: search_two(two, *given)),
        ("one stream", lambda *given: search_one(one, *given)),
    )
    for name, search in searches:
        found = search([images], [texts])
        wanted = torch.cat(
            [torch.cat([search([x], [y]) for y in texts.split(1)], 1) for x in images.split(1)]
        )
        error = float((found - wanted).abs().max() / wanted.abs().max())
        if not error <= TOLERANCE:
            return f"{name}: scores of a batch and of single pairs differ by {error:.1e}"
    return ""


def search_two(model: COOKIEModel, images: Iterable[Tensor], texts: Iterable[Tensor]) -> Tensor:
    """Similarities ``(images, texts)`` by two streams, of batches."""
    video = [model.encode_video(some).embeds for some in images]
    text = [model.encode_text(some, torch.ones_like(some)).embeds for some in texts]
    return torch.cat(video) @ torch.cat(text).T


def search_one(model: OneStream, images: Iterable[Tensor], texts: Iterable[Tensor]) -> Tensor:
    """Scores ``(images, texts)`` by one stream, of batches."""
    features, batches = [model.encode_video(some) for some in images], list(texts)
    rows = [
        torch.cat([model(one[None].expand(len(some), -1, -1), some) for some in batches])
        for one in torch.cat(features)
    ]
    return torch.stack(rows)


def measure(two: COOKIEModel, one: OneStream, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of both, by N."""
    batch, config = arguments.batch, two.config
    images, texts = _inputs(config, batch, arguments.tokens)
    features = one.encode_video(images)
    rounds = max(1, arguments.pairs // batch)
    image = _median(lambda: one.encode_video(images), 3) / batch
    pair = _median(lambda: one(features, texts), rounds) / batch
    rows = []
    for n in arguments.sizes:
        whole = n * n <= arguments.pairs
        seconds = n * image + n * n * pair
        if whole:
            seconds = _seconds(lambda n=n: search_one(one, _repeat(images, n), _repeat(texts, n)))  # type: ignore[misc]
        rows.append(
            {
                "n": n,
                "two_stream": {
                    "seconds": _seconds(
                        lambda n=n: search_two(two, _repeat(images, n), _repeat(texts, n))  # type: ignore[misc]
                    )
                },
                "one_stream": {"seconds": seconds, "extrapolated": not whole},
            }
        )
    sizes = " ".join(map(str, arguments.sizes))
    options = (
        f"--sizes {sizes} --pairs {arguments.pairs} --batch {batch} --tokens {arguments.tokens}"
    )
    return {
        "command": f"python -m bench.search_cost {'--small ' * arguments.small}{options}",
        "environment": environment.describe(torch.device("cpu")),
        "one_stream": {
            "seconds_per_image": image,
            "seconds_per_pair": pair,
            "pairs": rounds * batch,
        },
        "features": config.grid_size**2,
        "tokens": arguments.tokens,
        "results": rows,
    }


def _repeat(batch: Tensor, count: int) -> Iterator[Tensor]:
    """As many rows, of one batch over and over: those of thousands would be gigabytes."""
    for start in range(0, count, len(batch)):
        yield batch[: count - start]


def _inputs(config: COOKIEConfig, count: int, tokens: int) -> tuple[Tensor, Tensor]:
    size = config.image_size
    return torch.randn(count, 3, size, size), torch.randint(1, config.vocab_size, (count, tokens))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _median(call: Callable[[], Any], times: int) -> float:
    """Median time of some calls, after an untimed one."""
    call()
    return statistics.median(_seconds(call) for _ in range(times))


if __name__ == "__main__":
    raise SystemExit(main())

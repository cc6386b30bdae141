"""`python -m bench.predict.stand_in`: bf16 by VDPBF16PS, as a processor would do that starts two.

An AMD Zen 5 starts two VDPBF16PS a cycle, as this one, if it has AVX-512 with avx512_bf16, starts
two fp32 multiply-adds. An extension built with `-DSVITT_STAND_IN` has those in their place: its
results are wrong, its loads, stores and exponentials the same. So what is left of the rate of a
product says how far these bind. It is no measurement of another processor, whose caches and
clock differ, and knows no peers.

A product of bf16 is taken to run at twice the rate of torch's in fp32, timed in turns.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import svitt_ops as so
from bench import cases
from bench.measure import environment, floors
from bench.measure.harness import Case, Problem, runner
from bench.measure.timing import Effort, interleave
from bench.predict.run import save

OPS = ("block_sparse_attention", "cross_attention", "info_nce", "queue_info_nce")
TIER = "avx512_bf16"
QUICK = False
"""Whether a small product will do."""
HEADER = f"{'case':<26} {'direction':<17} {'ms':>9} {'of product':>11} {'fp32':>7}"
EXPLANATION = """\
of product  useful FLOP/s, of twice the rate of an fp32 product
fp32        time of the same op on fp32 inputs, over this one"""


def refusal() -> str:
    """Why nothing can be told of this process; empty where something can."""
    tier = torch.ops.svitt_ops.cpu_capability()
    if tier != TIER:
        return f"SVITT_CPU_CAPABILITY must be {TIER} on a processor that has it, got {tier}"
    x = torch.randn(1, 1, 64, 64, dtype=torch.bfloat16)
    if torch.allclose(
        so.cross_attention(x, x, x), F.scaled_dot_product_attention(x, x, x), atol=0.1
    ):
        return "the extension must be built with -DSVITT_STAND_IN, this one multiplies as it should"
    return ""


def pairs_of(op: str, wanted: str) -> Iterator[tuple[Problem, Case, Problem]]:
    """The cases of an op in bf16 whose names contain something, and the same in fp32."""
    module = cases.load(op)
    assert module is not None
    found = {case.name: case for case in module.cases("cpu")}
    for name, case in found.items():
        if case.dtype == "bf16" and wanted in name:
            yield module.problem(case), case, module.problem(found[name.replace("bf16", "fp32")])


def rows_of(op: str, wanted: str, effort: Effort) -> Iterator[dict[str, Any]]:
    """Times of an op's cases, and what they are compared with, timed in turns."""
    device = torch.device("cpu")
    product = floors.ceilings(device, torch.float32, QUICK)[0]
    for problem, case, fp32 in pairs_of(op, wanted):
        for direction in case.directions:
            calls = {
                "bf16": runner(problem.provider("svitt_ops").build(), problem, direction),
                "fp32": runner(fp32.provider("svitt_ops").build(), fp32, direction),
                "product": product.call,
            }
            for call in calls.values():
                call()
            ms = {k: x.summary()["ms"] for k, x in interleave(calls, device, effort).items()}
            row = {"op": op, "case": case.name, "direction": direction, "ms": ms["bf16"]}
            rate = problem.flops[direction] / ms["bf16"]
            row["of_product"] = rate / (2 * product.flops / ms["product"])
            yield row | {"fp32_ratio": ms["fp32"] / ms["bf16"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows, and write them where asked to."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict.stand_in", description=__doc__)
    parser.add_argument("--op", choices=OPS, help="one op (default: all of them)")
    parser.add_argument("--case", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument(
        "--budget",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="time for the samples of one call",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--out", type=Path, metavar="PATH", help="the rows as JSON")
    given = parser.parse_args(arguments)
    # First: threads take it over from the one that starts them. Zeros beside a value would be
    # denormal numbers to the multiply-add, which take it a hundred cycles.
    torch.set_flush_denormal(True)
    torch.set_num_threads(given.threads)
    if reason := refusal():
        parser.error(reason)
    print(EXPLANATION, HEADER, sep="\n")
    rows = []
    for op in (given.op,) if given.op else OPS:
        for row in rows_of(op, given.case, Effort(budget_s=given.budget)):
            rows.append(row)
            case, ratio, product = row["case"], row["fp32_ratio"], row["of_product"]
            label = f"{case:<26} {row['direction']:<17}"
            print(f"{label} {row['ms']:9.3f} {product:11.2f} {ratio:7.2f}", flush=True)
    if not rows:
        parser.error(f"--case: no bf16 case of {given.op or 'these ops'} contains {given.case!r}")
    if given.out:
        save(given.out, {"environment": environment.describe(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()

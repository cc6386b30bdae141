"""`python -m bench`: gate, time and record."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import svitt_ops
from bench import compare, environment, floors, memory, results
from bench.harness import DIRECTIONS, DTYPES, Case, CaseRun
from bench.timing import Effort

HEADER = (
    f"{'case':<22} {'provider':<20} {'ms':>9} {'p20':>9} {'p80':>9} {'x best':>7} "
    f"{'GFLOP/s':>8} {'of gemm':>8} {'of floor':>8} {'+MiB':>8}"
)
LEGEND = """\
x best    time of the best peer that computes the same function, over this time; (of another one)
GFLOP/s   useful FLOP only; of gemm: against a large matrix product timed in the same rounds
of floor  max(bytes / copy bandwidth, FLOP / product rate) over this time
+MiB      peak memory beyond the inputs, results included"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run benchmarks; 0, or 1 if a gate of ours is red."""
    arguments = _parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    effort = Effort(cold=arguments.cold, budget_s=arguments.budget)
    if arguments.quick:
        effort = Effort(cold=arguments.cold, budget_s=0.02, min_samples=2)
    failures, ran, documents = 0, 0, []
    native = {} if arguments.list else floors.machine(torch.device(device))
    for op in [arguments.op] if arguments.op else ops():
        module = importlib.import_module(f"bench.{op}")
        cases = _chosen(module.cases(device), arguments)
        ran += len(cases)
        if arguments.list:
            _print_cases(op, cases, module)
            continue
        if cases:
            document = run(op, module, cases, effort, arguments, device, native)
            failures += _conclude(document, arguments)
            documents.append(document)
    if not ran:
        print("no case fits these options; see `python -m bench --list`", file=sys.stderr)
        return 2
    if arguments.compare:
        changes = compare.compare(results.load(arguments.compare), documents)
        print(compare.render(changes))
        failures += sum(change.verdict == "slower" for change in changes)
    return 1 if failures else 0


def ops() -> list[str]:
    """Ops that have a benchmark."""
    return [op for op in svitt_ops.OPS if (Path(__file__).parent / f"{op}.py").exists()]


def run(
    op: str,
    module: ModuleType,
    cases: list[Case],
    effort: Effort,
    arguments: argparse.Namespace,
    device: str,
    native: dict[str, Any],
) -> dict[str, Any]:
    """Measure the cases of one op, printing each row as it is known; the document."""
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    where = environment.describe(torch.device(device))
    found: list[dict[str, Any]] = []
    directions = [arguments.direction] if arguments.direction else list(DIRECTIONS)
    print(f"{op} on {where['hardware']}, torch {where['versions']['torch']}\n{LEGEND}")
    with tqdm(total=len(cases) * len(directions), unit="case", disable=None) as bar:
        for case in cases:
            torch.compiler.reset()
            bar.set_description(case.name)
            problem = module.problem(case)
            case_run = CaseRun(case, problem, effort, arguments.quick, arguments.provider, native)
            for direction in directions:
                result = case_run.run(direction)
                if not arguments.quick:
                    memory.fill(result, module.__name__, case_run)
                found.append(result)
                bar.write(render(result))
                bar.update()
    if environment.extension_digests() != where["extensions"]:
        # Overwriting a loaded library changes code that is running: any number may be wrong.
        raise SystemExit("the compiled extension was rebuilt during the run: nothing is recorded")
    narrowed = (arguments.case, arguments.dtype, arguments.direction, arguments.provider)
    return {
        "schema": results.SCHEMA,
        "op": op,
        "command": _command(arguments),
        "complete": not any(narrowed) and not arguments.quick,
        "environment": where,
        "effort": vars(effort),
        "machine": native,
        "results": found,
    }


def render(result: dict[str, Any]) -> str:
    """One case in one direction as lines of the live table."""
    facts = ", ".join(f"{key} {_short(value)}" for key, value in result["facts"].items())
    setup = ", ".join(f"{key} {value:.3f} ms" for key, value in result["setup_ms"].items())
    rates = ", ".join(f"{key} {value:.0f}" for key, value in result["ceilings"]["products"].items())
    title = f"\n{result['case']} {result['direction'].replace('_', ' + ')}"
    lines = [f"{title}: {facts}; setup: {setup}"]
    copy = result["ceilings"]["copy_gbs"]
    floor = f"floor {result['floor_ms']:.3f} ms by {result['floor_bound']}"
    lines += [f"  GFLOP/s: {rates}; copy {copy:.1f} GB/s; {floor}", HEADER]
    best = results.best_peer(result)
    for row in result["providers"]:
        name = f"{result['case']:<22} {row['provider']:<20}"
        if row["status"] != "ok":
            lines.append(f"{name} {row['status']}: {row['reason']}")
            continue
        ratio = f"{best['ms'] / row['ms']:.2f}" if best else "-"
        ratio = ratio if row["same_function"] else f"({ratio})"
        extra = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.1f}"
        eager = f"  eager call {row['call_ms']:.3f} ms" if "call_ms" in row else ""
        lines.append(
            f"{name} {row['ms']:>9.3f} {row['p20']:>9.3f} {row['p80']:>9.3f} {ratio:>7} "
            f"{row['gflops']:>8.0f} {row['gemm_ratio']:>8.2f} {1 / row['floor_ratio']:>8.0%} "
            f"{extra:>8}{eager}"
        )
    return "\n".join(lines)


def _conclude(document: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Save, and name what failed; the number of our own failures."""
    path = arguments.out
    if path is None or path.suffix != ".json":
        # Only a complete run takes the place of a committed result.
        folder = path or environment.RESULTS
        if path is None and not document["complete"]:
            folder = environment.REPOSITORY / "build" / "bench"
        path = folder / f"{environment.slug(document['op'], document['environment'])}.json"
    results.save(path, document)
    ours = 0
    for result in document["results"]:
        for row in result["providers"]:
            if row["status"] == "failed":
                ours += row["role"] != "peer"
                where = f"{result['case']} {result['direction']} {row['provider']}"
                print(f"FAILED {where}: {row['reason']}", file=sys.stderr)
    print(f"\nwrote {path}")
    if ours:
        print(f"{ours} of our own gates are red: no time was taken there", file=sys.stderr)
    return ours


def _chosen(cases: list[Case], arguments: argparse.Namespace) -> list[Case]:
    return [
        case
        for case in cases
        if arguments.case in case.name
        and arguments.dtype in ("", case.dtype)
        and (case.quick or not arguments.quick or arguments.case)
    ]


def _print_cases(op: str, cases: list[Case], module: ModuleType) -> None:
    for case in cases:
        fields = " ".join(f"{key}={value}" for key, value in case.fields.items())
        print(f"{op} {case.name}: {fields}")
    if cases:
        smallest = module.problem(module.shrunk(cases[0]))
        print(f"{op} providers: {' '.join(x.name for x in smallest.providers)}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _command(arguments: argparse.Namespace) -> str:
    """The command that repeats this run, without where it wrote."""
    words = ["python -m bench"]
    for name in ("op", "case", "dtype", "direction", "provider", "device"):
        if getattr(arguments, name):
            words.append(f"--{name} {getattr(arguments, name)}")
    words += [f"--{name}" for name in ("quick", "cold") if getattr(arguments, name)]
    if arguments.threads:
        words.append(f"--threads {arguments.threads}")
    if arguments.budget != Effort.budget_s:
        words.append(f"--budget {arguments.budget:g}")
    return " ".join(words)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--op", default="", choices=["", *ops()], help="one op; all by default")
    parser.add_argument("--case", default="", help="cases whose name contains this")
    parser.add_argument("--provider", default="", help="ours, and peers whose name contains this")
    parser.add_argument("--dtype", default="", choices=["", *DTYPES])
    parser.add_argument("--direction", default="", choices=["", *DIRECTIONS])
    parser.add_argument("--device", default="", choices=["", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; torch's by default")
    parser.add_argument("--budget", type=float, default=Effort.budget_s, help="seconds a number")
    parser.add_argument("--cold", action="store_true", help="empty a CPU's caches before each call")
    parser.add_argument("--quick", action="store_true", help="few cases, rough times, no memory")
    parser.add_argument("--list", action="store_true", help="name the cases and run nothing")
    where = "folder of <op>-<hardware>-<torch>.json; bench/results, or build/bench if incomplete"
    parser.add_argument("--out", type=Path, help=f"{where}; FILE.json for a single op")
    what = "print what changed beyond noise since this result; 1 if anything of ours got slower"
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help=what)
    arguments = parser.parse_args(argv)
    if arguments.out and arguments.out.suffix == ".json" and not arguments.op and len(ops()) > 1:
        parser.error("--out FILE.json needs --op: every op writes a file of its own")
    if arguments.compare and not arguments.compare.is_file():
        parser.error(f"--compare: {arguments.compare} is not a file")
    return arguments


if __name__ == "__main__":
    sys.exit(main())

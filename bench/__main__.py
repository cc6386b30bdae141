"""`svitt bench`, or `python -m bench`: gate, time and record."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch

from bench import cases
from bench.measure import environment, floors, memory, results
from bench.measure.harness import DTYPES, Case, CaseRun, Direction
from bench.measure.timing import Effort
from bench.report import compare
from svitt_ops.training.data.paths import expand, output_file, output_folder

DESCRIPTION = """\
Measure the ops, the training step and how both scale on this machine, against everything that
computes the same here. Nothing is timed before its results agree with the fp64 reference.

  %(prog)s --quick                                  a few cases of everything, in two minutes
  %(prog)s --list                                   names of all cases and providers
  %(prog)s --op cross_attention --dtype bf16        one op in one dtype
  %(prog)s --predict h100                           how long it would take on a GPU, without one
  %(prog)s --op info_nce --compare bench/results/info_nce-....json
"""
HEADER = (
    f"{'case':<22} {'provider':<20} {'ms':>9} {'p20':>9} {'p80':>9} {'x best':>7} "
    f"{'GFLOP/s':>8} {'of gemm':>8} {'of floor':>8} {'+MiB':>8}"
)
LEGEND = """\
x best    time of the best peer that computes the same function, over this time; (of another one)
GFLOP/s   useful FLOP only; of gemm: against a large matrix product timed in the same rounds
of floor  max(bytes / copy bandwidth, FLOP / product rate) over this time
+MiB      peak memory beyond the inputs, results included"""


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m bench") -> int:
    """Run benchmarks; 0, or 1 if a gate of ours is red."""
    arguments = _parse(argv, prog)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.predict:
        return _predict(arguments, prog)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    effort = Effort(cold=arguments.cold, budget_s=arguments.budget)
    if arguments.quick:
        effort = Effort(cold=arguments.cold, budget_s=0.02, min_samples=2)
    # Now, since a run may write over it.
    old = results.load(arguments.compare) if arguments.compare else None
    failures, ran, documents = 0, 0, []
    native = {} if arguments.list else floors.machine(torch.device(device))
    for op in [arguments.op] if arguments.op else cases.names():
        module = cases.load(op)
        if module is None:
            continue
        chosen = _chosen(module.cases(device), arguments)
        ran += len(chosen)
        if arguments.list:
            _print_cases(op, chosen, module)
            continue
        if chosen:
            document = run(op, module, chosen, effort, arguments, device, native)
            failures += _conclude(document, arguments)
            documents.append(document)
    if not ran:
        print(f"no case fits these options; see `{prog} --list`", file=sys.stderr)
        return 2
    if old is not None:
        changes = compare.compare(old, documents)
        print(compare.render(changes))
        failures += sum(change.verdict == "slower" for change in changes)
    return 1 if failures else 0


def _predict(arguments: argparse.Namespace, prog: str) -> int:
    """Say how long ours would take on a GPU that is not here; 2 where that cannot be said."""
    from bench.predict import run as predictions

    op, commit, measured = arguments.op, arguments.kernels, None
    if arguments.compare:
        old = results.load(arguments.compare)
        op, commit = old["op"], commit or old["environment"]["commit"] or ""
        if not commit or any(x["device"] != "cuda" for x in old["results"]):
            what = "must be of a GPU and name its commit"
            print(f"{prog} --compare: {arguments.compare.name} {what}", file=sys.stderr)
            return 2
        rows = {(x["case"], x["direction"]): results.ours(x) for x in old["results"]}
        measured = {key: row["ms"] for key, row in rows.items() if row}
    timed = {case for case, _ in measured or ()}
    wanted = []
    for name in [x for x in predictions.OPS if op in ("", x)]:
        module = cases.load(name)
        assert module is not None
        known = module.cases("cuda")
        if timed:
            known = [dataclasses.replace(x, named=False) for x in known if x.name in timed]
        if chosen := _chosen(known, arguments):
            wanted.append((name, chosen))
    if not wanted:
        print("no case of our Triton kernels fits these options", file=sys.stderr)
        return 2
    try:
        predictions.predict(
            arguments.predict,
            wanted,
            direction=arguments.direction,
            commit=commit,
            measured=measured,
            out=arguments.out,
        )
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"{prog} --predict: {error}", file=sys.stderr)
        return 2
    return 0


def run(
    op: str,
    module: ModuleType,
    chosen: list[Case],
    effort: Effort,
    arguments: argparse.Namespace,
    device: str,
    native: dict[str, Any],
) -> dict[str, Any]:
    """Measure the cases of one op, printing and saving each row as it is known; the document."""
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    where = environment.describe(torch.device(device))
    document: dict[str, Any] = {
        "schema": results.SCHEMA,
        "op": op,
        "command": _command(arguments),
        "complete": False,
        "environment": where,
        "effort": vars(effort),
        "machine": native,
        "results": [],
    }
    pairs = [
        (case, direction)
        for case in chosen
        for direction in case.directions
        if arguments.direction in ("", direction)
    ]
    print(f"{op} on {where['hardware']}, torch {where['versions']['torch']}\n{LEGEND}")
    case_run: CaseRun | None = None
    with tqdm(total=len(pairs), unit="case", disable=None) as bar:
        for case, direction in pairs:
            bar.set_description(f"{op} {case.name}")
            if case_run is None or case_run.case is not case:
                torch.compiler.reset()
                problem, only = module.problem(case), arguments.provider
                case_run = CaseRun(case, problem, effort, arguments.quick, only, native)
            result = case_run.run(direction)
            if not arguments.quick:
                memory.fill(result, module.__name__, case_run)
            document["results"].append(result)
            _record(_path(document, arguments), document)
            bar.write(render(result))
            if hasattr(module, "summary"):
                bar.write(module.summary(result))
            bar.update()
    return document


def _record(path: Path, document: dict[str, Any]) -> None:
    """Save what is known by now, so that a run that is killed loses no more than a case."""
    if environment.extension_digests() != document["environment"]["extensions"]:
        # Overwriting a loaded library changes code that is running: any number may be wrong.
        if len(document["results"]) > 1:
            path.unlink()
        raise SystemExit("the compiled extension was rebuilt during the run: nothing is recorded")
    results.save(path, document)


def _path(document: dict[str, Any], arguments: argparse.Namespace) -> Path:
    """Where a document is written; only a complete one takes the place of a committed result."""
    path: Path | None = arguments.out
    if path is not None and path.suffix == ".json":
        return path
    folder = path or environment.RESULTS
    if path is None and not document["complete"]:
        folder = environment.REPOSITORY / "build" / "bench"
    return folder / f"{environment.slug(document['op'], document['environment'])}.json"


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
            f"{extra:>8}{eager}{_inexact(row)}"
        )
    return "\n".join(lines)


def _inexact(row: dict[str, Any]) -> str:
    times = results.inexactness(row)
    return f"  off by {times:.1f} of our error budgets" if times > 1 else ""


def _conclude(document: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Save, and name what failed; the number of our own failures."""
    partial = _path(document, arguments)
    narrowed = (arguments.case, arguments.dtype, arguments.direction, arguments.provider)
    document["complete"] = not any(narrowed) and not arguments.quick
    path = _path(document, arguments)
    results.save(path, document)
    if path != partial:
        partial.unlink()
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


def _chosen(known: list[Case], arguments: argparse.Namespace) -> list[Case]:
    return [
        case
        for case in known
        if arguments.case in case.name
        and arguments.dtype in ("", case.dtype)
        and arguments.direction in ("", *case.directions)
        and (arguments.case or (case.quick if arguments.quick else not case.named))
    ]


def _print_cases(op: str, chosen: list[Case], module: ModuleType) -> None:
    for case in chosen:
        fields = " ".join(f"{key}={value}" for key, value in case.fields.items())
        print(f"{op} {case.name}: {fields}")
    if chosen:
        smallest = module.problem(module.shrunk(chosen[0]))
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


def _parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    ops = cases.names()
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, formatter_class=raw)
    chosen = parser.add_argument_group("what is measured (all by default)")
    add = chosen.add_argument
    add("--op", default="", choices=ops, metavar="OP", help=f"one of {', '.join(ops)}")
    add("--case", default="", metavar="TEXT", help="cases whose name contains this")
    who = "ours, and those whose name contains this, or one of several: edge,node"
    add("--provider", default="", metavar="TEXT", help=who)
    dtypes = f"one of {', '.join(DTYPES)}"
    add("--dtype", default="", choices=[*DTYPES], metavar="DTYPE", help=dtypes)
    directions = get_args(Direction)
    which = f"one of {', '.join(directions)}"
    add("--direction", default="", choices=directions, metavar="DIRECTION", help=which)
    add("--quick", action="store_true", help="few cases, rough times, no memory")
    add("--list", action="store_true", help="name the cases and run nothing")
    add = parser.add_argument_group("prediction, without a GPU").add_argument
    what = "how long our kernels would take on an h100, h200 or a100, by their machine code"
    add("--predict", default="", metavar="CARD", help=f"{what}; not a measurement")
    add("--kernels", default="", metavar="COMMIT", help="of these kernels, not this tree's")
    add = parser.add_argument_group("how").add_argument
    gpu = "cpu or cuda (default: cuda where there is one)"
    add("--device", default="", choices=("cpu", "cuda"), metavar="DEVICE", help=gpu)
    add("--threads", type=int, default=0, metavar="N", help="of the CPU (default: torch's)")
    budget = "for the samples of one number (default: %(default)g)"
    add("--budget", type=float, default=Effort.budget_s, metavar="SECONDS", help=budget)
    add("--cold", action="store_true", help="empty a CPU's caches before each call")
    add = parser.add_argument_group("results").add_argument
    where = "folder of <op>-<hardware>-<torch>.json; bench/results, or build/bench if incomplete"
    add("--out", type=expand, metavar="PATH", help=f"{where}; FILE.json for a single op")
    what = "print what changed beyond noise since this result; 1 if anything of ours got slower"
    add("--compare", type=expand, metavar="OLD.json", help=what)
    arguments = parser.parse_args(argv)
    if arguments.predict:
        _check_prediction(parser, arguments)
    elif arguments.kernels:
        parser.error("--kernels needs --predict")
    elif arguments.out and arguments.out.suffix == ".json" and not arguments.op and len(ops) > 1:
        parser.error("--out FILE.json needs --op: every op writes a file of its own")
    if arguments.compare and not arguments.compare.is_file():
        parser.error(f"--compare: {arguments.compare} is not a file")
    if arguments.out and not arguments.list:
        check = output_file if arguments.out.suffix == ".json" else output_folder
        try:
            check(arguments.out, "--out")
        except ValueError as error:
            parser.error(str(error))
    return arguments


def _check_prediction(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    unused = ("list", "provider", "device", "threads", "cold")
    if given := [f"--{name}" for name in unused if getattr(arguments, name)]:
        parser.error(f"--predict runs nothing here, so it takes no {', '.join(given)}")
    if arguments.out and arguments.out.suffix != ".json":
        parser.error(f"--out must be a FILE.json with --predict, got {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())

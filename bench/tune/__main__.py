"""`svitt tune`, or `python -m bench.tune`: tiles for this GPU."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.tune import child, parent, plan, table
from svitt_ops.kernels import tile_table
from svitt_ops.training.data.paths import expand, output_file, output_folder

DESCRIPTION = """\
Find tiles of the Triton kernels that are faster on this GPU than those they come with, and write
them into a table that they use from then on. A tile gets in only if its results are within the
op's error budget, the same bits twice, and faster by more than noise.

  %(prog)s --dry-run                   what would be tried, and how long that may take
  %(prog)s --minutes 20                most valuable first, for as long as this
  %(prog)s --only info_nce             some; what the table has of others stays
  %(prog)s --toy --out build/toy.json  a rehearsal: tiny problems on the interpreter, without a GPU

`svitt info` says which table is in use. Of these the first counts: the file that SVITT_TILES names
(empty: none), the user's, one that comes with the package, and the kernels' own choice.
"""


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m bench.tune") -> int:
    """Run it; 0, 1 if nothing could be timed, 2 after a mistake, or 128 and a signal's number."""
    parser, arguments = _parse(argv, prog)
    if arguments.child:
        mode, work, report = arguments.child
        child.child(mode, Path(work), Path(report), arguments.toy, arguments.budget)
    gpu = torch.cuda.is_available() and not arguments.toy
    processors, arch, where = _where(gpu)
    wanted = arguments.only.split(",")
    candidates = plan.toys() if arguments.toy else plan.plan(processors)
    chosen = [x for x in candidates if any(word in x.group for word in wanted)]
    if not chosen:
        parser.error(f"--only: no group has {arguments.only!r}; see --dry-run")
    if arguments.dry_run:
        _print(chosen, arguments)
        return 0
    if not gpu and not arguments.toy:
        parser.error("there is no GPU here; --toy rehearses, --dry-run plans")
    out = (arguments.out or tile_table.user_file(arch)).absolute()
    if out.suffix != ".json":
        out /= f"{tile_table.architecture(arch)}.json"
    try:
        record = output_folder(arguments.record, "--record")
        output_file(out, "--out")
    except ValueError as error:
        parser.error(str(error))
    head = {**where, "argv": list(sys.argv[1:] if argv is None else argv)}
    old = table.kept(out, arch, where)

    def known(rows: list[dict[str, Any]]) -> int:
        """Write what is known by now; the number of tiles."""
        text = json.dumps({**head, "results": rows}, indent=1)
        table.write_whole(record / "tune.json", text)
        table.write_whole(record / "tune.txt", table.summary(rows) + "\n")
        made = table.document(rows, arch, where, old)
        if made["entries"] or old:
            table.write_whole(out, table.render(made))
        return len(made["entries"])

    with _signals() as ended:
        log = record / "tune.log"
        rows = parent.run(chosen, *_how(arguments), log=log, known=known, ended=ended)
    print(table.summary(rows))
    if missing := sum("status" not in x for x in rows):
        print(f"{missing} candidates were not reached: more --minutes")
    print(_conclusion(known(rows), out, arch))
    if ended:
        return 128 + ended[0]
    if any(x.get("status") == "ok" for x in rows):
        return 0
    print(f"nothing could be timed: {log} has what was said", file=sys.stderr)
    return 1


def _print(chosen: Sequence[plan.Candidate], arguments: argparse.Namespace) -> None:
    for candidate in chosen:
        print(f"{candidate.group:60} {candidate.label}")
    kernels = len({x.binary for x in chosen})
    print(f"{len(chosen)} candidates, {kernels} to compile by {arguments.jobs} processes: about "
          f"{plan.minutes(chosen, arguments.jobs):.0f} minutes, of which --minutes allows "
          f"{arguments.minutes:g}")  # fmt: skip


def _how(arguments: argparse.Namespace) -> tuple[list[str], parent.Limits]:
    """The command of a child, and what a run may take."""
    command = [sys.executable, "-m", "bench.tune", "--budget", str(arguments.budget)]
    command += [*(["--toy"] * arguments.toy), "--child"]
    return command, parent.Limits(
        seconds=60 * arguments.minutes,
        warm_share=arguments.warm_share,
        jobs=0 if arguments.toy else arguments.jobs,  # the interpreter compiles nothing
        quiet=arguments.quiet,
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Within, SIGTERM and Ctrl-C are kept in a list: what is known is still to be said."""
    ended: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(x, lambda came, _: ended.append(came)) for x in numbers]
    try:
        yield ended
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _where(gpu: bool) -> tuple[int, int, dict[str, Any]]:
    """Multiprocessors, the architecture, and what a table says of where it was made."""
    versions = {name: version(name) for name in ("torch", "triton")}
    if not gpu:
        return 132, 0, {"device": "interpreter", "versions": versions}
    found = torch.cuda.get_device_properties(0)
    arch = 10 * found.major + found.minor
    return found.multi_processor_count, arch, {"device": found.name, "versions": versions}


def _conclusion(count: int, out: Path, arch: int) -> str:
    if not count:
        return "no tile was faster beyond noise"
    text = f"{count} tile{'s' * (count != 1)} in {out}"
    if "SVITT_TILES" in os.environ or out != tile_table.user_file(arch).absolute():
        return f"{text}; used where SVITT_TILES={out}"
    return f"{text}; used from now on"


def _parse(
    argv: Sequence[str] | None, prog: str
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, formatter_class=raw)
    add = parser.add_argument
    add("--minutes", type=float, default=20.0, metavar="N", help="for all (default: %(default)g)")
    add("--dry-run", action="store_true", help="print the plan and run nothing")
    add("--only", default="", metavar="TEXT", help="groups that have this, or one of several: a,b")
    add("--toy", action="store_true", help="rehearse on the interpreter")
    add("--out", type=expand, metavar="FILE", help="the table, or its folder (default: the user's,"
        f" {tile_table.user_file(0).parent}/ARCHITECTURE.json)")  # fmt: skip
    add("--record", type=expand, default=parent.ROOT / "build" / "tune", metavar="FOLDER",
        help="all times, and what was printed (default: build/tune)")  # fmt: skip
    add("--jobs", type=int, default=min(os.cpu_count() or 1, 16), metavar="N",
        help="processes that compile (default: one a core, up to 16)")  # fmt: skip
    add("--warm-share", type=float, default=0.55, metavar="SHARE",
        help="of the time to compile in (default: %(default)g)")  # fmt: skip
    add("--budget", type=float, default=0.15, metavar="SECONDS",
        help="to time a tile in (default: %(default)g)")  # fmt: skip
    add("--quiet", type=float, default=45.0, metavar="SECONDS",
        help="after which a candidate hangs (default: %(default)g)")  # fmt: skip
    add("--child", nargs=3, metavar=("MODE", "WORK", "REPORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name in ("minutes", "budget", "quiet", "jobs"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name}: must be positive, got {getattr(arguments, name)}")
    if not 0 < arguments.warm_share < 1:
        parser.error(f"--warm-share: must be between 0 and 1, got {arguments.warm_share}")
    if arguments.toy:
        os.environ["TRITON_INTERPRET"] = "1"
    return parser, arguments


if __name__ == "__main__":
    sys.exit(main())

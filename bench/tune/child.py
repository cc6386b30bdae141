"""A process that runs candidates, one after the other, and says what happens, line by line."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.measure.harness import DTYPES, explain, gate, results, runner
from bench.measure.timing import Effort, interleave
from bench.tune.plan import Candidate
from svitt_ops.kernels import tile_table, tiles

PR_SET_PDEATHSIG = 1


class Override:
    """Within, launchers get a candidate's tile where they ask for its pass, else today's."""

    def __init__(self, candidate: Candidate) -> None:
        self.which, self.tile = candidate.which, candidate.tile
        self.entries: dict[tile_table.Key, dict[str, Any]] = {}
        """Of a table: what was asked for, and the tile that was given."""

    def __call__(
        self, tile: Any, table: str, which: str, dtype: torch.dtype, arch: int, **shape: int
    ) -> Any:
        """Stands in for `tiles.tuned`."""
        if which != self.which:
            return tile
        tile, kind = replace(tile, **self.tile), str(dtype)[6:]
        found = {"table": table, "pass": which, "dtype": kind, "shape": shape}
        found["tile"] = {name: getattr(tile, name) for name in tile_table.FORMS[table].tile}
        self.entries[tile_table.key(table, which, kind, shape)] = found
        return tile

    def __enter__(self) -> None:
        self.before, tiles.tuned = tiles.tuned, self  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        tiles.tuned = self.before


class Bench:
    """Runs candidates, keeping the problem of the last case."""

    def __init__(self, toy: bool, budget_s: float) -> None:
        self.device = torch.device("cpu" if toy else "cuda")
        self.effort = Effort(
            budget_s=budget_s, min_samples=3 if toy else 7, max_samples=5 if toy else 60
        )
        self.key: Any = None
        self.loaded: set[int] = set()

    def open(self, candidate: Candidate) -> None:
        """Make the problem of a candidate's case."""
        if (key := (candidate.op, candidate.case)) == self.key:
            return
        self.key = self.expected = self.problem = self.function = None
        toy = self.device.type == "cpu"
        if not toy:
            torch.cuda.empty_cache()
        module = importlib.import_module(f"bench.cases.{candidate.op}")
        case = next(x for x in module.cases("cuda") if x.name == candidate.case)
        if toy:
            case = module.shrunk(replace(case, dtype="fp32", device="cpu"))
        sampled = candidate.op == "block_sparse_attention" and not case.fields["bias"]
        fields = {**case.fields, **candidate.fields} | ({"sampled": True} if sampled else {})
        self.case = replace(case, fields=fields)
        self.problem = module.problem(self.case)
        self.function = self.problem.provider("svitt_ops").build()
        self.key = key

    def warm(self, candidate: Candidate) -> dict[str, Any]:
        """Run it once, so that it is compiled."""
        self.open(candidate)
        with Override(candidate):
            results(self.function, self.problem, candidate.direction)
        self.wait()
        return {"status": "ran", "kernels": used_resources(self.loaded)}

    def timed(self, candidate: Candidate, alone: bool) -> dict[str, Any]:
        """Check it, time it, in turns with today's tile unless alone, check it again."""
        self.open(candidate)
        override = Override(candidate)
        with override:
            first = results(self.function, self.problem, candidate.direction)
            kernels = {"kernels": used_resources(self.loaded)}
            second = results(self.function, self.problem, candidate.direction)
        if len(override.entries) != 1:
            return _refused(f"{len(override.entries)} tiles were asked for, must be one")
        (entry,) = override.entries.values()
        tile_table.check_entry(entry | {"case": candidate.group, "today_ms": None, "ms": 0.0})
        if candidate.plant == "wrong":
            first = {name: value + 1 for name, value in first.items()}
        if objection := self.objection(candidate, first):
            return _refused(objection) | kernels
        if any(not torch.equal(first[x], second[x]) for x in first):
            return _refused("a second run gave other bits") | kernels
        calls = {"it": self.call(candidate, override)}
        today_fails = ""
        if candidate.tile and not alone:
            try:
                calls["today"] = self.call(candidate, Override(replace(candidate, tile={})))
            except Exception as error:
                today_fails = explain(error)
                self.wait()
        found = {k: v.summary() for k, v in interleave(calls, self.device, self.effort).items()}
        with override:
            last = results(self.function, self.problem, candidate.direction)
        if objection := self.objection(candidate, last):
            return _refused(f"after timing: {objection}") | kernels
        row = {"status": "ok", **found["it"], "today": found.get("today"), "entry": entry}
        return row | kernels | {"today_fails": today_fails}

    def call(self, candidate: Candidate, override: Override) -> Any:
        """What is timed; it has run once."""
        run = runner(self.function, self.problem, candidate.direction)

        def call() -> None:
            with override:
                run()

        call()
        self.wait()
        return call

    def objection(self, candidate: Candidate, found: Any) -> str:
        """Why results are not those of the op; empty where they are."""
        if self.expected is None:
            self.expected = self.problem.oracles["op"]()
        dtype = DTYPES[self.case.dtype]
        verdict: str = gate(found, self.expected, dtype, candidate.direction)["objection"]
        return verdict

    def wait(self) -> None:
        """For the GPU, whose errors show now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _refused(reason: str) -> dict[str, Any]:
    return {"status": "refused", "reason": reason}


def used_resources(seen: set[int]) -> dict[str, list[Any]]:
    """Registers, spills and shared memory of the kernels that were loaded since the last call."""
    found = {}
    for name, module in list(sys.modules.items()):
        for kernel in vars(module).values() if name.startswith("svitt_ops.kernels.") else ():
            caches = getattr(kernel, "device_caches", None) or {}
            for compiled in [x for cache in caches.values() for x in cache[0].values()]:
                if id(compiled) not in seen and getattr(compiled, "n_regs", None):
                    seen.add(id(compiled))
                    shared = getattr(compiled.metadata, "shared", None)
                    found[kernel.__name__] = [compiled.n_regs, compiled.n_spills, shared]
    return found


def child(mode: str, work: Path, report: Path, toy: bool, budget_s: float) -> None:
    """Run the candidates of a file, and append what happens to another; ends the process.

    Args:
        mode: "warm" runs each once, "time" checks and times them.
        work: JSON list of {"id", "candidate", "alone"}; alone: today's tile crashed or hung,
            and is not run beside it.
        report: JSON lines.
        toy: on the interpreter.
        budget_s: seconds to time a candidate in.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # what hangs has to be watched
    with report.open("a", buffering=1) as lines, ExitStack() as routes:

        def say(**what: Any) -> None:
            lines.write(json.dumps(what, default=str) + "\n")

        say(event="hello")
        if toy:
            from svitt_ops.testing import route_to

            routes.enter_context(route_to("triton"))
        bench = Bench(toy, budget_s)
        for given in json.loads(work.read_text()):
            number, candidate = given["id"], Candidate(**given["candidate"])
            say(event="start", id=number)
            begin = time.monotonic()
            if candidate.plant == "exit":
                os._exit(3)
            if candidate.plant == "hang":
                time.sleep(3600)
            fatal = False
            try:
                alone = given["alone"]
                row = bench.warm(candidate) if mode == "warm" else bench.timed(candidate, alone)
            except Exception as error:
                row = {"status": "failed", "reason": explain(error)}
                if "out of memory" in row["reason"]:
                    bench.key = None  # what is there may be half of it
                try:
                    bench.wait()
                except Exception:
                    fatal = True  # the context is lost, and all that would follow in it
            say(event="done", id=number, seconds=time.monotonic() - begin, **row)
            if fatal:
                os._exit(4)
    os._exit(0)

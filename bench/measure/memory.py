"""Peak memory that one call takes beyond its inputs, results included.

On a GPU the caching allocator counts. On a CPU the kernel does: each provider runs in a process of
its own, forked from a server that has loaded torch and done nothing else, and the peak resident set
is read after the first call at full size (the second of what compiles). That sees every allocator,
a kernel's own workspace too, and counts whole pages, so it is good to about a MiB. A training step
of seconds is not repeated for it: there the gate's call is read, in the process of the run. Each
row says in `memory_method` which it was.
"""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from bench.measure import resident
from bench.measure.harness import Case, CaseRun, Direction, Problem, runner
from bench.measure.timing import SLOW_MS

_TIMEOUT_S = 300


def fill(result: dict[str, Any], module: str, run: CaseRun) -> None:
    """Write `extra_bytes` into the rows of a result whose providers passed their gate."""
    direction: Direction = result["direction"]
    for row in result["providers"]:
        if row["status"] != "ok":
            continue
        name = row["provider"]
        if run.device.type == "cuda":
            call = runner(run.functions[name], run.problem, direction)
            row |= {"extra_bytes": _on_cuda(call), "memory_method": "allocator"}
        elif row["ms"] > SLOW_MS and name in run.peaks:
            row |= {"extra_bytes": run.peaks[name], "memory_method": "gate's call"}
        elif resident.SUPPORTED:
            found = _on_cpu(module, run.case, name, direction)
            row |= {"extra_bytes": found, "memory_method": "own process"}


def _on_cuda(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def _on_cpu(module: str, case: Case, name: str, direction: Direction) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module, __name__])
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, module, case, name, direction, torch.get_num_threads())
    process = context.Process(target=_measure, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(_TIMEOUT_S) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def _measure(
    sender: Any, module: str, case: Case, name: str, direction: Direction, threads: int
) -> None:
    torch.set_num_threads(threads)
    op = importlib.import_module(module)
    with resident.nothing_kept():
        _call(op.problem(op.shrunk(case)), name, direction)()
        problem = op.problem(case)
        call = _call(problem, name, direction)
        if problem.provider(name).compiled:
            call()
        _, taken = resident.peak(call)
    sender.send(taken)


def _call(problem: Problem, name: str, direction: Direction) -> Callable[[], Any]:
    return runner(problem.provider(name).build(), problem, direction)

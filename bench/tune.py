"""Times candidate tiles of the Triton kernels, each checked against its op's oracle first.

    python -m bench.tune --limit 180 --out build/tune            on a GPU
    python -m bench.tune --list                                  the plan, without running it
    TRITON_INTERPRET=1 python -m bench.tune --toy --out ...      tiny problems by the interpreter

A first phase runs every candidate once in many processes, since compiling takes most of the time:
what they compile is in Triton's cache afterwards. Then one process checks and times them, alone on
the GPU, most valuable first: CUDA graphs and a cold L2, as the benchmark does. A candidate that
crashes or hangs costs its process, and the next one goes on with the rest. `tune.json` is written
after each result.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
TOO_FAR = 2e-2
"""Norm of a difference, relative to the norm of what the tile of today computes."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One tile for one case."""

    op: str
    case: str
    """What the case is called in the results."""
    fields: Mapping[str, Any]
    """Of the benchmark's first case of the op, those that differ."""
    dtype: str
    direction: str
    passes: tuple[str, ...]
    """Entries of the tile table that the tile stands in for."""
    tile: Mapping[str, int] = field(default_factory=dict)
    """Fields of the tile that differ from today's; none: today's."""
    gate: str = "oracle"
    """"oracle", or "today": what today's tile computes."""
    plant: str = ""
    """Of a rehearsal: "exit", "hang" or "wrong"."""

    @property
    def group(self) -> str:
        """Those that are compared with each other."""
        return f"{self.op} {self.case} {self.direction} {'+'.join(self.passes)}"

    @property
    def label(self) -> str:
        """The tile in a few letters."""
        short = {"rows": "r", "columns": "c", "chunk": "k", "slice": "s", "num_warps": "w"}
        short |= {"num_stages": "st", "programs": "p", "max_registers": "reg"}
        name = " ".join(f"{short[k]}{v}" for k, v in self.tile.items()) or "today"
        return f"{name} {self.plant}".strip()

    @property
    def binary(self) -> str:
        """The same for candidates whose kernels are the same."""
        kind = (self.op, self.dtype, self.direction, self.passes, self.fields.get("bias"))
        tile = {k: v for k, v in self.tile.items() if k != "programs"}
        return json.dumps([kind, tile, self.case if not tile else "", self.plant], default=str)


def _tiles(names: str, *rows: tuple[int, ...]) -> list[dict[str, int]]:
    return [{}, *(dict(zip(names.split(), row, strict=True)) for row in rows)]


CONTRAST = "rows columns chunk num_warps num_stages programs"
STATISTICS = _tiles(
    CONTRAST,
    (128, 64, 256, 8, 3, 132),
    (128, 32, 256, 8, 2, 264),
    (64, 32, 256, 4, 2, 264),
    (64, 64, 256, 4, 2, 132),
    (128, 32, 256, 8, 3, 132),
    (64, 32, 256, 4, 3, 264),
    (128, 64, 256, 8, 2, 132),
    (128, 64, 64, 8, 3, 264),
    (64, 64, 64, 4, 3, 528),
    (64, 64, 256, 4, 2, 264),
    (128, 64, 256, 8, 3, 264),
    (64, 32, 256, 4, 2, 528),
)
GRADIENT_NAMES = "rows columns chunk slice num_warps num_stages programs max_registers"
GRADIENT = _tiles(
    GRADIENT_NAMES,
    (64, 64, 256, 256, 8, 2, 132, 255),
    (128, 64, 256, 256, 8, 2, 132, 255),
    (64, 32, 256, 256, 4, 2, 264, 255),
    (128, 64, 256, 128, 8, 2, 132, 255),
    (64, 64, 256, 128, 4, 2, 132, 255),
    (64, 64, 256, 256, 8, 3, 132, 255),
    (64, 64, 256, 256, 4, 2, 264, 255),
    (64, 32, 256, 128, 4, 2, 264, 255),
    (64, 64, 256, 256, 8, 2, 264, 128),
    (64, 128, 256, 256, 8, 2, 132, 255),
    (64, 32, 256, 256, 8, 2, 264, 128),
    (128, 32, 256, 256, 8, 3, 132, 255),
)
QUEUE_NAMES = "rows columns chunk slice num_warps num_stages programs"
QUEUE = _tiles(
    QUEUE_NAMES,
    (64, 32, 64, 256, 8, 2, 132),
    (32, 64, 256, 256, 8, 2, 132),
    (32, 32, 256, 256, 8, 2, 132),
    (64, 64, 64, 256, 8, 2, 132),
    (64, 32, 64, 256, 8, 2, 66),
    (64, 32, 64, 256, 8, 2, 264),
    (32, 64, 64, 128, 4, 3, 264),
    (32, 64, 256, 128, 4, 2, 132),
    (64, 32, 64, 256, 8, 3, 132),
    (64, 32, 256, 256, 8, 2, 132),
)
RANKS_BF16 = _tiles(
    CONTRAST,
    (64, 64, 256, 4, 3, 132),
    (64, 64, 256, 4, 2, 264),
    (64, 64, 64, 4, 3, 264),
    (64, 32, 256, 4, 3, 264),
    (32, 64, 256, 4, 2, 264),
    (64, 128, 256, 8, 2, 132),
    (128, 64, 256, 8, 3, 132),
)
RANKS_FP32 = _tiles(
    CONTRAST,
    (64, 64, 16, 8, 1, 264),
    (64, 64, 16, 8, 2, 264),
    (64, 64, 16, 8, 3, 264),
    (64, 64, 32, 8, 2, 264),
    (64, 64, 16, 4, 2, 264),
    (64, 64, 16, 8, 2, 132),
    (32, 64, 16, 4, 2, 264),
    (32, 32, 16, 4, 2, 528),
    (64, 64, 16, 16, 2, 264),
)
ATTENTION_NAMES = "columns num_warps num_stages max_registers"
ATTENTION = {
    "forward": _tiles(
        ATTENTION_NAMES,
        (64, 4, 2, 112),
        (64, 4, 1, 168),
        (64, 4, 1, 128),
        (64, 4, 3, 168),
        (32, 4, 1, 128),
    ),
    "grad_query": _tiles(
        ATTENTION_NAMES,
        (64, 4, 2, 168),
        (64, 4, 3, 168),
        (64, 4, 1, 128),
        (64, 4, 1, 112),
        (32, 4, 1, 128),
    ),
    "grad_key": _tiles(
        ATTENTION_NAMES,
        (64, 4, 1, 168),
        (64, 4, 1, 255),
        (64, 4, 2, 255),
        (64, 4, 2, 168),
        (32, 4, 1, 168),
    ),
}
BIASED = {
    "forward": _tiles(
        ATTENTION_NAMES,
        (32, 4, 1, 128),
        (64, 4, 1, 168),
        (64, 4, 1, 255),
        (32, 4, 2, 128),
        (16, 4, 1, 128),
    ),
    "grad_query": _tiles(
        ATTENTION_NAMES,
        (64, 4, 1, 255),
        (32, 4, 1, 128),
        (64, 4, 1, 168),
        (32, 4, 2, 168),
        (32, 4, 3, 168),
    ),
    "grad_key": _tiles(
        ATTENTION_NAMES,
        (16, 4, 1, 168),
        (32, 4, 1, 255),
        (32, 4, 1, 168),
        (16, 4, 1, 128),
        (32, 8, 1, 128),
    ),
}


def plan() -> list[Candidate]:
    """All candidates, most valuable first."""
    found: list[Candidate] = []

    def add(tiles: list[dict[str, int]], passes: str | tuple[str, ...], **given: Any) -> None:
        names = (passes,) if isinstance(passes, str) else passes
        found.extend(Candidate(passes=names, tile=tile, **given) for tile in tiles)

    def contrast(rows: int, most: int = 99) -> None:
        given = {"op": "info_nce", "case": f"b{rows}-d256", "dtype": "bf16"}
        fields = {"rows": rows, "dim": 256}
        add(STATISTICS[:most], "forward", direction="forward", fields=fields, **given)
        add(GRADIENT[:most], "backward", direction="forward_backward", fields=fields, **given)

    def attention(frames: int, which: str, most: int = 99, bias: bool = False) -> None:
        direction = "forward" if which == "forward" else "forward_backward"
        tokens = 196 * frames + 1
        fields = {"frames": frames, "tokens": tokens, "bias": bias} | ({} if bias else SAMPLED)
        given = {"op": "block_sparse_attention", "dtype": "bf16", "fields": fields}
        given |= {"case": f"n{tokens}{'-bias' * bias}", "gate": "today" if bias else "oracle"}
        tiles = BIASED[which] if bias else ATTENTION[which]
        add(tiles[:most], which, direction=direction, **given)

    def ranks(rows: int, dtype: str) -> None:
        tiles = RANKS_FP32 if dtype == "fp32" else RANKS_BF16
        given = {"op": "retrieval_ranks", "case": f"n{rows}-{dtype}", "dtype": dtype}
        add(tiles, "ranks", direction="forward", fields={"rows": rows, "dim": 256}, **given)

    def queue(rows: int, length: int, alpha: float, most: int = 99) -> None:
        case = f"b{rows}-q{length}{'-teacher' if alpha else ''}"
        fields = {"rows": rows, "queue": length, "dim": 256, "alpha": alpha}
        given = {"op": "queue_info_nce", "case": case, "dtype": "bf16", "fields": fields}
        which = "taught_queue" if alpha else "queue"
        add(QUEUE[:most], which, direction="forward_backward", **given)

    contrast(4096)
    attention(4, "forward")
    queue(32, 8192, 0.4)
    ranks(1000, "fp32")
    ranks(1000, "bf16")
    attention(4, "grad_query")
    attention(4, "grad_key")
    contrast(1024, 6)
    contrast(16384, 7)
    queue(256, 65536, 0.4, 6)
    attention(8, "forward", 6)
    attention(4, "forward", bias=True)
    attention(4, "grad_query", bias=True)
    attention(4, "grad_key", bias=True)
    ranks(4096, "bf16")
    ranks(4096, "fp32")
    queue(32, 65536, 0.0, 6)
    attention(16, "forward", 6)
    attention(8, "grad_key", 6)
    attention(8, "grad_query", 6)
    return found


SAMPLED = {"sampled": True}


def toys() -> list[Candidate]:
    """One candidate of each kind beside today's tile, on the interpreter; and planted failures."""
    seen: set[tuple[str, ...]] = set()
    found = []
    for candidate in plan():
        key = (candidate.op, candidate.dtype, str(candidate.fields.get("bias")), *candidate.passes)
        if candidate.tile and key not in seen:
            seen.add(key)
            tile = {k: v for k, v in candidate.tile.items() if k not in ("rows", "chunk", "slice")}
            tile = {**tile, "columns": 32}
            found += [replace(candidate, tile={}), replace(candidate, tile=tile)]
    first = next(x for x in found if x.op == "retrieval_ranks")
    plants = [replace(first, plant=name) for name in ("exit", "wrong", "hang")]
    return [*plants, *found]


# What a process of candidates does.


def import_kernels() -> None:
    """`svitt_ops.kernels`, also where the package is not installed: its folder is another."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    importlib.import_module("svitt_ops")
    try:
        importlib.import_module("svitt_ops.kernels")
    except ModuleNotFoundError:
        folder = ROOT / "kernels"
        spec = importlib.util.spec_from_file_location(
            "svitt_ops.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["svitt_ops.kernels"] = module
        spec.loader.exec_module(module)
        sys.modules["svitt_ops"].kernels = module  # type: ignore[attr-defined]


@contextmanager
def tile_of(candidate: Candidate) -> Iterator[None]:
    """Within, the launchers use the candidate's tile."""
    attention = candidate.op == "block_sparse_attention"
    table = "attention_tile" if attention else "contrast_tile"
    tiles = importlib.import_module("svitt_ops.kernels.tiles")
    today: Callable[..., Any] = getattr(tiles, table)

    def chosen(which: str, *args: Any) -> Any:
        tile = today(which, *args)
        return replace(tile, **candidate.tile) if which in candidate.passes else tile

    with ExitStack() as patches:
        for suffix in ("", "_backward"):
            name = f"svitt_ops.kernels.{candidate.op}{suffix}"
            if importlib.util.find_spec(name) is not None:
                module = importlib.import_module(name)
                if hasattr(module, table):
                    patches.enter_context(mock.patch.object(module, table, chosen))
        yield


def build(candidate: Candidate, toy: bool) -> tuple[Any, Any]:
    """The benchmark's problem, and our function."""
    module = importlib.import_module(f"bench.cases.{candidate.op}")
    device = "cpu" if toy else "cuda"
    case = module.cases("cuda")[0]
    case = replace(case, dtype="fp32" if toy else candidate.dtype, device=device)
    case = replace(case, name=candidate.case, fields={**case.fields, **candidate.fields})
    if toy:
        case = module.shrunk(case)
    problem = module.problem(case)
    return problem, problem.provider("svitt_ops").build()


def used_resources(seen: set[int]) -> dict[str, Any]:
    """Registers and spills of the kernels that were compiled or loaded since the last call."""
    found = {}
    try:
        for name, module in list(sys.modules.items()):
            if not name.startswith("svitt_ops.kernels."):
                continue
            for kernel in vars(module).values():
                caches = getattr(kernel, "device_caches", None)
                for entry in caches.values() if caches else ():
                    for compiled in entry[0].values():
                        if id(compiled) not in seen and getattr(compiled, "n_regs", None):
                            seen.add(id(compiled))
                            shared = getattr(compiled.metadata, "shared", None)
                            numbers = [compiled.n_regs, compiled.n_spills, shared]
                            found[kernel.__name__] = numbers
    except Exception as error:
        return {"unknown": repr(error)[:200]}
    return found


class Bench:
    """Runs candidates one after the other, keeping the problem of the last case."""

    def __init__(self, toy: bool, budget_s: float) -> None:
        import torch

        from bench.measure.timing import Effort

        self.torch, self.toy = torch, toy
        self.effort = Effort(budget_s=budget_s, max_samples=5 if toy else 60)
        self.key: Any = None
        self.expected: Any = None
        self.today: dict[str, dict[str, Any]] = {}
        self.loaded: set[int] = set()

    def _open(self, candidate: Candidate) -> None:
        key = (candidate.op, candidate.case, candidate.dtype)
        if key != self.key:
            self.key, self.expected, self.today = None, None, {}
            self.problem = self.function = None
            if not self.toy:
                self.torch.cuda.empty_cache()
            self.problem, self.function = build(candidate, self.toy)
            self.key = key

    def warm(self, candidate: Candidate) -> dict[str, Any]:
        """Run it once."""
        from bench.measure.harness import results

        self._open(candidate)
        with tile_of(candidate):
            found = results(self.function, self.problem, candidate.direction)
        self._wait()
        sizes = {name: tuple(value.shape) for name, value in found.items()}
        return {"status": "ran", "outputs": str(sizes), "kernels": used_resources(self.loaded)}

    def timed(self, candidate: Candidate) -> dict[str, Any]:
        """Check it, time it, check it again."""
        from bench.measure.harness import results, runner
        from bench.measure.timing import interleave

        self._open(candidate)
        direction = candidate.direction
        device = self.torch.device("cpu" if self.toy else "cuda")
        if candidate.gate == "today" and direction not in self.today:
            self.today[direction] = results(self.function, self.problem, direction)
        with tile_of(candidate):
            first = results(self.function, self.problem, direction)
            kernels = used_resources(self.loaded)
            if candidate.plant == "wrong":
                first = {name: value + 1 for name, value in first.items()}
            objection, checks = self._objection(candidate, first)
            if not objection:
                second = results(self.function, self.problem, direction)
                if any(not self.torch.equal(first[x], second[x]) for x in first):
                    objection = "a second run gave other bits"
            if objection:
                return {"status": "refused", "reason": objection, "kernels": kernels}
            call = runner(self.function, self.problem, direction)
            call()
            self._wait()
            row = interleave({"it": call}, device, self.effort)["it"].summary()
            objection, _ = self._objection(
                candidate, results(self.function, self.problem, direction)
            )
        if objection:
            return {"status": "refused", "reason": f"after timing: {objection}"}
        return {"status": "ok", **row, "kernels": kernels, "checks": checks}

    def _objection(self, candidate: Candidate, found: Any) -> tuple[str, Any]:
        from bench.measure.harness import DTYPES, gate

        if candidate.gate == "today":
            far = {}
            for name, wanted in self.today[candidate.direction].items():
                wide = wanted.detach().double()
                gap = (found[name].detach().double() - wide).norm()
                far[name] = float(gap / wide.norm().clamp(min=1e-30))
            worst = max(far, key=lambda name: far[name])
            bad = not all(x <= TOO_FAR for x in far.values())
            return (f"{worst} is off by {far[worst]:.2e} of its norm" if bad else "", far)
        if self.expected is None:
            self.expected = self.problem.oracles["op"]()
        dtype = DTYPES["fp32" if self.toy else candidate.dtype]
        verdict = gate(found, self.expected, dtype, candidate.direction)
        return verdict["objection"], verdict["checks"]

    def _wait(self) -> None:
        if not self.toy:
            self.torch.cuda.synchronize()


def child(mode: str, work: Path, report: Path, toy: bool, budget_s: float) -> None:
    """Runs the candidates of a file, and appends what happens to another, line by line."""
    import_kernels()
    if toy:
        from svitt_ops.testing import route_to
    given = [(x["id"], Candidate(**_tuples(x["candidate"]))) for x in json.loads(work.read_text())]
    with report.open("a", buffering=1) as lines, ExitStack() as routes:

        def say(**what: Any) -> None:
            lines.write(json.dumps(what, default=str) + "\n")
            lines.flush()

        say(event="hello", seconds=time.monotonic())
        if toy:
            routes.enter_context(route_to("triton"))
        bench = Bench(toy, budget_s)
        for number, candidate in given:
            say(event="start", id=number)
            begin = time.monotonic()
            if candidate.plant == "exit":
                os._exit(3)
            if candidate.plant == "hang":
                time.sleep(3600)
            fatal = False
            try:
                row = bench.warm(candidate) if mode == "warm" else bench.timed(candidate)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                row = {"status": "failed", "reason": text[:300]}
                bench.key = None
                try:
                    bench._wait()
                except Exception:
                    fatal = True  # the context is lost, and all that would follow in it
            say(event="done", id=number, seconds=time.monotonic() - begin, **row)
            if fatal:
                os._exit(4)
        say(event="bye")
    os._exit(0)


def _tuples(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "passes": tuple(given["passes"])}


# The parent.


class Process:
    """A child and what it has said; it is started again after a crash, without the culprit."""

    def __init__(
        self,
        mode: str,
        work: list[tuple[int, Candidate]],
        folder: Path,
        name: str,
        extra: list[str],
        quiet: float,
    ) -> None:
        self.quiet = quiet
        self.mode, self.left, self.folder, self.name = mode, list(work), folder, name
        self.extra, self.starts, self.current = extra, 0, None
        self.process: subprocess.Popen[bytes] | None = None
        self.read_to = 0
        self.begin()

    def begin(self) -> None:
        """Start on what is left."""
        if not self.left:
            return
        self.starts += 1
        stem = f"{self.name}-{self.starts}"
        work = self.folder / f"{stem}.json"
        self.report = self.folder / f"{stem}.jsonl"
        self.report.touch()
        rows = [{"id": number, "candidate": asdict(candidate)} for number, candidate in self.left]
        work.write_text(json.dumps(rows, default=dict))
        command = [sys.executable, "-m", "bench.tune", "--child", self.mode, str(work)]
        command += [str(self.report), *self.extra]
        # Compilers take all cores: nothing else should make threads beside them.
        given = {**os.environ, "OMP_NUM_THREADS": "1"} if self.mode == "warm" else None
        with (self.folder / f"{stem}.log").open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=given, stdout=log, stderr=log, start_new_session=True
            )
        self.read_to, self.current, self.heard = 0, None, time.monotonic()

    def poll(self) -> list[dict[str, Any]]:
        """What is new; a child that died or hangs is replaced."""
        if self.process is None:
            return []
        dead = self.process.poll() is not None
        found = self._read()
        quiet = time.monotonic() - self.heard
        # Importing and the first problem take long, on a machine full of compilers.
        if not dead and quiet > (self.quiet if self.current is not None else 2 * self.quiet):
            self.stop()
            dead = True
            found += self._read()
            reason = f"hung: nothing for {quiet:.0f} s"
        else:
            reason = f"crashed: exit status {self.process.returncode}"
        if dead:
            self.process = None
            if self.current is not None:
                found.append({"id": self.current, "status": "failed", "reason": reason})
                self._drop(self.current)
            elif self.left and self.starts >= 3:
                found += [
                    {"id": number, "status": "failed", "reason": f"not started, {reason}"}
                    for number, _ in self.left
                ]
                self.left = []
            if self.starts < 12:
                self.begin()
        return found

    def _read(self) -> list[dict[str, Any]]:
        text = self.report.read_bytes()
        end = text.rfind(b"\n") + 1
        lines = text[self.read_to : end].splitlines()
        self.read_to = end
        found = []
        for line in lines:
            self.heard = time.monotonic()
            said = json.loads(line)
            if said["event"] == "start":
                self.current = said["id"]
            elif said["event"] == "done":
                self._drop(said["id"])
                self.current = None
                found.append({k: v for k, v in said.items() if k != "event"})
        return found

    def _drop(self, number: int) -> None:
        self.left = [x for x in self.left if x[0] != number]

    @property
    def busy(self) -> bool:
        """Whether there is more to come."""
        return self.process is not None

    def stop(self) -> None:
        """End the child."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def write(out: Path, document: dict[str, Any]) -> None:
    """Never leaves half a file."""
    part = out / "tune.json.part"
    part.write_text(json.dumps(document, indent=1, default=str))
    part.replace(out / "tune.json")


def summary(document: dict[str, Any], shown: int = 4) -> str:
    """A few lines for each group: the best tiles, today's, and who was refused."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in document["results"]:
        groups.setdefault(row["group"], []).append(row)
    lines = []
    for name, rows in groups.items():
        timed = sorted((x for x in rows if x.get("status") == "ok"), key=lambda x: x["ms"])
        today = next((x for x in timed if x["label"] == "today"), None)
        lines.append(f"{name}: today {today['ms']:.4f} ms" if today else f"{name}: today ?")
        lines += [f"    {x['ms']:.4f}  {x['label']}" for x in timed[:shown]]
        for row in rows:
            if row.get("status") in ("failed", "refused"):
                lines.append(f"    {row['status']}  {row['label']}: {row.get('reason', '')[:90]}")
    return "\n".join(lines)


def tune(arguments: argparse.Namespace, chosen: list[Candidate]) -> int:
    """Both phases; 1 if nothing could be timed."""
    begin = time.monotonic()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    numbered = list(enumerate(chosen))
    rows: dict[int, dict[str, Any]] = {}
    for number, x in numbered:
        rows[number] = {"id": number, "group": x.group, "label": x.label, "tile": dict(x.tile)}
        rows[number] |= {"op": x.op, "case": x.case, "direction": x.direction, "passes": x.passes}
    document: dict[str, Any] = {"argv": sys.argv[1:], "limit_s": arguments.limit, "warm": []}
    document["results"] = list(rows.values())
    quiet = arguments.quiet
    extra = ["--budget", str(arguments.budget), *(["--toy"] * arguments.toy)]

    def left() -> float:
        return arguments.limit - (time.monotonic() - begin)

    with tempfile.TemporaryDirectory(prefix="tune-") as temporary:
        folder = Path(temporary)
        processes: list[Process] = []
        try:
            once: dict[str, tuple[int, Candidate]] = {}
            for number, candidate in numbered:
                once.setdefault(candidate.binary, (number, candidate))
            unique = list(once.values())
            jobs = min(arguments.jobs, len(unique))
            until = arguments.limit * (1 - arguments.warm_share)
            for job in range(jobs):
                work = unique[job::jobs]
                processes.append(Process("warm", work, folder, f"warm{job}", extra, quiet))
            broken: dict[str, str] = {}
            while any(x.busy for x in processes) and left() > until:
                for process in processes:
                    for row in process.poll():
                        document["warm"].append({**rows[row["id"]], **row})
                        if row["status"] == "failed":
                            broken[chosen[row["id"]].binary] = row["reason"]
                        write(out, document)
                time.sleep(0.1)
            late = [number for process in processes for number, _ in process.left]
            for process in processes:
                process.stop()
            print(f"compiled {len(document['warm'])}, {len(broken)} failed, {len(late)} late, "
                  f"after {time.monotonic() - begin:.0f} s", flush=True)  # fmt: skip
            unready = {chosen[number].binary for number in late}
            for number, candidate in numbered:
                if candidate.binary in broken:
                    rows[number] |= {"status": "failed", "reason": broken[candidate.binary]}
            able = [x for x in numbered if x[1].binary not in broken]
            # What is not compiled yet comes last.
            able.sort(key=lambda x: x[1].binary in unready)
            timer = Process("time", able, folder, "time", extra, quiet)
            processes = [timer]
            while timer.busy and left() > 3:
                for row in timer.poll():
                    rows[row["id"]] |= row
                    done = rows[row["id"]]
                    text = f"{row['ms']:.4f} ms" if "ms" in row else row.get("reason", "")[:100]
                    print(f"{done['group']:60} {done['label']:40} {text}", flush=True)
                    write(out, document)
                time.sleep(0.02)
        finally:
            for process in processes:
                process.stop()
            logs = sorted(folder.glob("*.log"))
            text = "\n".join(f"== {x.name}\n{x.read_text(errors='replace')[-3000:]}" for x in logs)
            (out / "tune.log").write_text(text)
    document["seconds"] = time.monotonic() - begin
    document["complete"] = all("status" in row for row in rows.values())
    write(out, document)
    text = summary(document)
    (out / "tune.txt").write_text(text + "\n")
    print(text)
    print(f"wrote {out / 'tune.json'} after {document['seconds']:.0f} s")
    return int(not any(row.get("status") == "ok" for row in rows.values()))


def main(argv: list[str] | None = None) -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--warm-share", type=float, default=0.55, help="of them to compile in")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiling processes")
    parser.add_argument("--budget", type=float, default=0.15, help="seconds to time one candidate")
    parser.add_argument("--quiet", type=float, default=45.0, help="seconds after which one hangs")
    parser.add_argument("--only", default="", help="groups whose name has one of these, by comma")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/tune")))
    parser.add_argument("--toy", action="store_true", help="tiny problems by the interpreter")
    parser.add_argument("--list", action="store_true", help="print the plan")
    parser.add_argument("--child", nargs=3, metavar=("MODE", "WORK", "REPORT"), help="internal")
    arguments = parser.parse_args(argv)
    if arguments.child:
        mode, work, report = arguments.child
        child(mode, Path(work), Path(report), arguments.toy, arguments.budget)
    if arguments.toy:
        os.environ["TRITON_INTERPRET"] = "1"
    wanted = arguments.only.split(",")
    chosen = [x for x in (toys() if arguments.toy else plan()) if any(w in x.group for w in wanted)]
    if not chosen:
        parser.error(f"--only: no group has {arguments.only!r}")
    if arguments.list:
        for candidate in chosen:
            print(f"{candidate.group:60} {candidate.label}")
        print(f"{len(chosen)} candidates, {len({x.binary for x in chosen})} to compile")
        return 0
    return tune(arguments, chosen)


if __name__ == "__main__":
    sys.exit(main())

"""Drives the processes that run candidates, and survives what happens to them."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.tune.plan import Candidate

ROOT = Path(__file__).resolve().parents[2]
LEAST_S = 3.0
"""What is left of the time for writing."""
STARTS = 12


@dataclass(kw_only=True)
class Process:
    """A child and what it has said; it is started again after a crash, without the culprit."""

    command: Sequence[str]
    """The child's, up to the names of its two files."""
    left: list[tuple[int, Candidate]]
    folder: Path
    name: str
    quiet: float
    """Seconds of silence after which it hangs; twice as many until it has begun."""
    environment: dict[str, str] = field(default_factory=dict)
    starts: int = 0
    alone: set[str] = field(default_factory=set)
    """Groups whose tile of today crashed or hung."""
    process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Start on what is left."""
        if not self.left:
            return
        self.starts += 1
        stem = f"{self.name}-{self.starts}"
        work, self.report = self.folder / f"{stem}.json", self.folder / f"{stem}.jsonl"
        self.report.touch()
        rows = [
            {"id": number, "candidate": asdict(x), "alone": x.group in self.alone}
            for number, x in self.left
        ]
        work.write_text(json.dumps(rows, default=dict))
        with (self.folder / f"{stem}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*self.command, str(work), str(self.report)],
                cwd=ROOT,
                env=os.environ | self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.read_to, self.current, self.heard = 0, None, time.monotonic()

    def poll(self) -> list[dict[str, Any]]:
        """What is new; a child that died or hangs is replaced."""
        if self.process is None:
            return []
        dead = self.process.poll() is not None
        found = self._read()
        quiet = time.monotonic() - self.heard
        reason = f"crashed: exit status {self.process.returncode}"
        if not dead and quiet > (self.quiet if self.current is not None else 2 * self.quiet):
            self.stop()
            dead = True
            found += self._read()
            reason = f"hung: nothing for {quiet:.0f} s"
        if dead:
            self.process = None
            if self.current is not None:
                found.append(self._lost(self.current, reason))
            elif self.left and self.starts >= 3:
                rest = [number for number, _ in self.left]
                found += [self._lost(number, f"not started, {reason}") for number in rest]
            if self.starts < STARTS:
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
            if said.pop("event") == "start":
                self.current = said["id"]
            elif "status" in said:
                self.current = None
                found.append(self._done(said))
        return found

    def _lost(self, number: int, reason: str) -> dict[str, Any]:
        """What its process did not live to say; a tile of today is then not run beside others."""
        candidate = dict(self.left)[number]
        if not candidate.tile:
            self.alone.add(candidate.group)
        return self._done({"id": number, "status": "failed", "reason": reason})

    def _done(self, row: dict[str, Any]) -> dict[str, Any]:
        self.left = [x for x in self.left if x[0] != row["id"]]
        return row

    @property
    def busy(self) -> bool:
        """Whether there is more to come."""
        return self.process is not None

    def stop(self) -> None:
        """End the child."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may take."""

    seconds: float
    warm_share: float = 0.55
    """Of them, to compile in."""
    jobs: int = 1
    """Processes that compile; 0: nothing is compiled first."""
    quiet: float = 45.0
    """Seconds after which a candidate hangs."""


def run(
    chosen: Sequence[Candidate],
    command: Sequence[str],
    limits: Limits,
    log: Path,
    known: Callable[[list[dict[str, Any]]], object],
    ended: Collection[int] = (),
) -> list[dict[str, Any]]:
    """Compile, check and time candidates.

    Args:
        chosen: the candidates, most valuable first.
        command: of a child, up to its mode.
        limits: what the run may take.
        log: where the ends of what children print go.
        known: is called with all rows after each result, and at the end.
        ended: signals that have come: with the first, the run ends.

    Returns:
        A row for each candidate; one without a status was not reached.
    """
    begin = time.monotonic()
    numbered = list(enumerate(chosen))
    rows = [{"group": x.group, "label": x.label, **asdict(x)} for x in chosen]

    def left() -> float:
        return 0 if ended else limits.seconds - LEAST_S - (time.monotonic() - begin)

    with tempfile.TemporaryDirectory(prefix="tune-") as temporary:
        folder, processes = Path(temporary), list[Process]()

        def process(
            mode: str, name: str, work: list[tuple[int, Candidate]], alone: Iterable[str] = ()
        ) -> Process:
            # Compilers take all cores: nothing else should make threads beside them.
            environment = {"OMP_NUM_THREADS": "1"} if mode == "warm" else {}
            made = Process(
                command=[*command, mode],
                left=work,
                folder=folder,
                name=name,
                quiet=limits.quiet,
                environment=environment,
                alone=set(alone),
            )
            processes.append(made)
            made.begin()
            return made

        try:
            once: dict[str, tuple[int, Candidate]] = {}
            for number, candidate in numbered:
                once.setdefault(candidate.binary, (number, candidate))
            unique, broken = list(once.values()), dict[str, str]()
            jobs = min(limits.jobs, len(unique))
            for job in range(jobs):
                process("warm", f"warm{job}", unique[job::jobs])
            until, ran = limits.seconds * (1 - limits.warm_share), 0
            while any(x.busy for x in processes) and left() > until:
                for row in [x for worker in processes for x in worker.poll()]:
                    ran += row["status"] == "ran"
                    # Alone on the GPU there may be memory enough.
                    if row["status"] == "failed" and "out of memory" not in row["reason"]:
                        broken[chosen[row["id"]].binary] = row["reason"]
                time.sleep(0.1)
            late = {candidate.binary for worker in processes for _, candidate in worker.left}
            for worker in processes:
                worker.stop()
            if jobs:
                print(f"compiled {ran}, {len(broken)} failed, {len(late)} late, "
                      f"after {time.monotonic() - begin:.0f} s", flush=True)  # fmt: skip
            for number, candidate in numbered:
                if candidate.binary in broken:
                    rows[number] |= {"status": "failed", "reason": broken[candidate.binary]}
            able = [x for x in numbered if x[1].binary not in broken]
            # What is not compiled yet comes last.
            able.sort(key=lambda x: x[1].binary in late)
            alone = [x for worker in processes for x in worker.alone]
            timer = process("time", "time", able, alone)
            while timer.busy and left() > 0:
                for row in timer.poll():
                    done = rows[row.pop("id")]
                    done |= row
                    text = f"{row['ms']:.4f} ms" if "ms" in row else row.get("reason", "")[:100]
                    print(f"{done['group']:60} {done['label']:40} {text}", flush=True)
                    known(rows)
                time.sleep(0.02)
        finally:
            for worker in processes:
                worker.stop()
            logs = sorted(folder.glob("*.log"))
            ends = [f"== {x.name}\n{x.read_text(errors='replace')[-3000:]}" for x in logs]
            log.write_text("\n".join(ends))
            known(rows)
    return rows

"""The run on a machine with a GPU: three files come back, whatever happens on the way."""

import os
import re
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"
PYTHON = """\
#!/bin/sh
# Stands in for Python: says what it would do, and writes a result.
case "$*" in
  *pip*) echo built ;;
  *"svitt_ops info"*) echo a GPU ;;
  *"-m pytest"*" -n 3"*) echo "test_some.py::test_one PASSED"; echo "=== 3 passed in 1.00s ===" ;;
  "-c import xdist") ;;
  -c*) echo fast slow last ;;
  *"--op fault"*) echo an illegal memory access; exit 9 ;;
  *)
    op=$4 out=$6
    echo "n785-bf16  svitt_ops  1.0 of $op $7"
    echo "{}" > "$out/$op.json"
    echo "{" > "$out/$op.part"
    if [ "$op" = slow ]; then : > "$0.slow"; sleep 60; fi ;;
esac
"""


def start(folder: Path, **settings: str) -> "subprocess.Popen[bytes]":
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    given = {"PYTHON": str(python), "OUT": str(folder / "out"), "WORKERS": "3", **settings}
    return subprocess.Popen([SCRIPT], env=os.environ | given, stdout=subprocess.DEVNULL)


def left(folder: Path) -> tuple[str, dict[str, str]]:
    """The summary, and what is in the archives; nothing else came back."""
    out = folder / "out"
    names = sorted(path.name for path in out.iterdir())
    assert names == ["logs.tar.gz", "results.tar.gz", "summary.txt"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    found = {}
    for name in names[:2]:
        with tarfile.open(out / name) as archive:
            for member in archive.getmembers():
                if file := archive.extractfile(member):
                    found[member.name] = file.read().decode()
    return (out / "summary.txt").read_text(), found


def test_each_step_leaves_its_log(tmp_path: Path) -> None:
    assert start(tmp_path, BENCH_OPS="fast last", BENCH_ARGS="--quick").wait() == 0
    summary, found = left(tmp_path)
    assert set(found) == {
        *(f"logs/{x}.log" for x in ("build", "info", "tests", "bench-fast", "bench-last")),
        *(f"results/{x}.json" for x in ("fast", "last")),
    }
    for line in ("=== 3 passed", "n785-bf16  svitt_ops  1.0 of fast --quick", "== all passed"):
        assert line in summary


def test_steps_are_chosen(tmp_path: Path) -> None:
    assert start(tmp_path, STEPS="build tests").wait() == 0
    _, found = left(tmp_path)
    assert set(found) == {"logs/build.log", "logs/tests.log"}
    assert start(tmp_path, STEPS="bild").wait() == 1
    assert "no such step" in left(tmp_path)[0]


def test_a_fault_in_one_op_leaves_the_next(tmp_path: Path) -> None:
    assert start(tmp_path, STEPS="bench", BENCH_OPS="fault last").wait() == 1
    summary, found = left(tmp_path)
    assert "bench-fault: FAILED with status 9" in summary and "bench-last: passed" in summary
    assert "illegal memory access" in found["logs/bench-fault.log"]
    assert "results/last.json" in found


def test_what_was_measured_at_the_limit_is_kept(tmp_path: Path) -> None:
    assert start(tmp_path, STEPS="bench", LIMIT="10").wait() == 1
    summary, found = left(tmp_path)
    assert "bench-slow: FAILED, over the limit" in summary
    assert "bench-last: FAILED, over the limit" in summary
    assert {"results/fast.json", "results/slow.json"} <= set(found)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_end_without_notice_leaves_what_there_was(tmp_path: Path, how: signal.Signals) -> None:
    process = start(tmp_path, STEPS="bench")
    while not (tmp_path / "python.slow").exists():  # `fast` is packed by then
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    assert process.wait() != 0
    _, found = left(tmp_path)
    assert "results/fast.json" in found
    assert ("results/slow.json" in found) == (how == signal.SIGTERM)

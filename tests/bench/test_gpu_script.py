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
  *pip*)
    [ -z "$NO_COMPILER" ] || { echo "error: command 'c++' failed" >&2; exit 1; }
    echo built ;;
  *"svitt_ops info"*)
    echo "versions"; echo "  nvcc       none"
    echo "extensions"; echo "  cuda       not built: the install found no nvcc" ;;
  *"-m bench.tune"*)
    mkdir -p "$6" "$8"; echo "{}" > "$6/sm_90.json"; echo "$3 $4 $9" > "$8/tune.txt"
    echo "info_nce b4096 forward forward: today 0.0620 ms"
    if [ "$9" = fault ]; then echo "RuntimeError: an illegal memory access"; exit 1; fi ;;
  *"-m pytest"*" -n 3"*) echo "test_some.py::test_one PASSED"; echo "=== 3 passed in 1.00s ===" ;;
  "-c import xdist") ;;
  -c*) echo fast slow last ;;
  *"--op fault"*) echo an illegal memory access; exit 9 ;;
  *"--op large"*) echo "n785-bf16  svitt_ops  failed: out of memory"; exit 1 ;;
  *"--op greedy"*) kill -9 $$ ;;
  *)
    op=$4 out=$6
    echo "n785-bf16  svitt_ops  1.0 of $op $7"
    echo "{}" > "$out/$op.json"
    echo "{" > "$out/$op.part"
    if [ "$op" = slow ]; then : > "$0.slow"; sleep 60; fi ;;
esac
"""


def start(folder: Path, *words: str, **settings: str) -> "subprocess.Popen[bytes]":
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    given = {"PYTHON": str(python), "OUT": str(folder / "out"), "WORKERS": "3", **settings}
    return subprocess.Popen([SCRIPT, *words], env=os.environ | given, stdout=subprocess.DEVNULL)


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


def test_want_of_memory_is_told_apart_from_the_limit(tmp_path: Path) -> None:
    assert start(tmp_path, STEPS="bench", BENCH_OPS="large greedy last").wait() == 1
    summary, found = left(tmp_path)
    assert "svitt_ops  failed: out of memory\n   | n785" in summary
    assert "bench-greedy: FAILED, killed, perhaps for want of memory," in summary
    assert "bench-last: passed" in summary and "results/last.json" in found


def test_the_summary_says_what_was_not_built_and_why(tmp_path: Path) -> None:
    assert start(tmp_path, STEPS="build info", NO_COMPILER="1").wait() == 1
    summary, _ = left(tmp_path)
    assert "build: FAILED with status 1" in summary and "   | error: command 'c++'" in summary
    assert "info: passed" in summary and "  nvcc       none" in summary
    assert "not built: the install found no nvcc" in summary


@pytest.mark.parametrize("fault", ["", "fault"])
def test_tune_brings_a_table(fault: str, tmp_path: Path) -> None:
    process = start(tmp_path, "tune", LIMIT="1500", TUNE_ARGS=fault)
    assert process.wait() == bool(fault)
    summary, found = left(tmp_path)
    assert "info_nce b4096 forward forward: today 0.0620 ms" in summary
    assert ("   | RuntimeError: an illegal memory access" in summary) == bool(fault)
    assert found["results/tiles/sm_90.json"] == "{}\n"
    assert found["results/tune/tune.txt"] == f"--minutes 24 {fault}\n"
    assert {"logs/build.log", "logs/info.log", "logs/tune.log"} <= set(found)


def test_without_a_python_or_a_place_it_ends_with_a_reason(tmp_path: Path) -> None:
    assert start(tmp_path, STEPS="info bench", PYTHON="/no/python").wait() == 1
    summary, _ = left(tmp_path)
    assert "info: FAILED with status 127" in summary and "No such file" in summary
    assert "bench: FAILED to import" in summary
    (tmp_path / "file").touch()
    assert start(tmp_path, OUT=str(tmp_path / "file" / "out")).wait() == 2


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

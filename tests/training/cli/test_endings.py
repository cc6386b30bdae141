"""How the `svitt` command ends: one line and exit 2 for mistakes, whatever stands on the screen."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tqdm.auto import tqdm

import svitt_cli
from svitt_ops.training import cli
from svitt_ops.training.engine.run import pretrain

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
COMMANDS = (
    [],
    ["demo"],
    ["pretrain"],
    ["evaluate"],
    ["evaluate", "retrieval"],
    ["visualize"],
    ["sparsity"],
    ["info"],
)


@pytest.fixture(scope="module")
def run_folder(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("run")
    pretrain(make_recipe(folder, "optimizer.steps=1"))
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `svitt info` raise, while a progress bar is on the screen."""

    def run(_: Any) -> int:
        tqdm(total=3, desc="bar").update()
        raise error

    monkeypatch.setattr(cli, "run", run)


def test_help_does_not_wait_for_torch() -> None:
    code = f"""
import sys
import svitt_cli
for command in {COMMANDS!r}:
    try:
        svitt_cli.main([*command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
for wrong in (["--version"], ["pretrain"], ["evaluate", "retrieval", "x"], ["what"]):
    try:
        svitt_cli.main(wrong)
    except SystemExit as stop:
        assert stop.code == (2 if wrong != ["--version"] else 0)
print("heavy:", *(name for name in ("torch", "svitt_ops", "numpy", "yaml") if name in sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "heavy:"
    assert "svitt-ops 0" in run.stdout


def test_the_command_is_the_light_one() -> None:
    assert cli.main is svitt_cli.main
    pyproject = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert 'svitt = "svitt_cli:main"' in pyproject


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("recipe: x\n  must be y"), "recipe: x must be y"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "a.json: No such file or"),
        (OSError(28, "No space left on device", "/runs/x"), "/runs/x: No space left on device"),
        (ImportError("no liger-kernel:\n pip install it"), "no liger-kernel: pip install it"),
        (OSError("cannot\nbe"), "cannot be"),
        (MemoryError("512 GB"), "out of memory (512 GB)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), "out of memory (DefaultCPU"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "a process that"),
        (ModuleNotFoundError("No module", name="kornia"), "needs kornia, of the extra `train`: in"),
        (
            ValueError(
                "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent"
                ' call last):\n  File "x", line 3\n    raise ValueError(x)\n'
                "ValueError: 20 files in a row\n"
            ),
            "20 files in a row\n",
        ),
    ],
)
def test_a_mistake_is_a_line_of_its_own(
    error: Exception,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_with(error, monkeypatch)
    assert svitt_cli.main(["info"]) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert f"{last}\n".startswith(f"svitt info: {line}")
    assert "Traceback" not in last
    assert before[-1].rpartition("\r")[2].startswith("bar:")  # the bar stands above


def test_a_fault_of_the_library_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (TypeError("x"), RuntimeError("shape"), ModuleNotFoundError("x", name="torch")):
        fail_with(error, monkeypatch)
        with pytest.raises(type(error)):
            svitt_cli.main(["info"])


def test_interrupted_beside_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert svitt_cli.main(["info"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "svitt info: interrupted"


def test_warnings_stand_above_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "skipped: a.mp4", None, None)
    with tqdm(total=3, desc="bar") as bar:
        bar.update()
        svitt_cli._LogHandler().emit(record)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "skipped: a.mp4" in lines


@pytest.mark.parametrize("command", [["info"], ["bench", "--list", "--device", "cpu"], ["--help"]])
def test_a_reader_that_leaves_is_no_mistake(command: list[str]) -> None:
    code = "import sys, svitt_cli; sys.exit(svitt_cli.main(sys.argv[1:]))"
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-c", code, *command], stdout=write, stderr=subprocess.PIPE, env=BUFFERED
    )
    os.close(write)
    assert (run.returncode, run.stderr) == (141, b"")


@pytest.mark.parametrize(("word", "name"), [("info", "svitt info"), ("--help", "svitt")])
def test_a_full_disk_behind_stdout_is_named(word: str, name: str) -> None:
    code = f"import svitt_cli, sys; sys.exit(svitt_cli.main([{word!r}]))"
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=BUFFERED,
        )
    assert run.returncode == 2
    assert run.stderr == f"{name}: standard output: No space left on device\n"


def test_overrides_may_follow_options(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "seed=3", "--config", "pretrain-4f", "--show", "optimizer.lr=1e-4"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "seed: 3" in text and "lr: 0.0001" in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["pretrain", "--config=~/no.yaml"], "recipe: must be a YAML file or one of"),
        (["pretrain", "--config=~/bad.yaml"], "bad.yaml: cannot be read as YAML"),
        (["pretrain", "--config=small"], "data.train.0.annotations: must be a file, got"),
        (["pretrain", "--config=small", "output=bad.yaml"], "recipe: "),
        (
            ["evaluate", "retrieval", "no", "--annotations=a"],
            "model: must be the folder of a model",
        ),
        (["evaluate", "retrieval", "~/half", "--annotations=a"], "no weights"),
        (["evaluate", "retrieval", "~/cut", "--annotations=a"], "model.safetensors cannot be read"),
        (
            ["evaluate", "retrieval", "RUN", "--annotations=~/no.json"],
            "--annotations: must be a file",
        ),
        (
            ["evaluate", "retrieval", "RUN", "--annotations=ANNO", "--root=~/no"],
            "--root: must be a",
        ),
        (["evaluate", "retrieval", "RUN", "--annotations=ANNO", "--root=bad.yaml"], "no folder"),
        (
            ["evaluate", "retrieval", "RUN", "--annotations=ANNO", "--json=~"],
            "--json: must be a file",
        ),
        (
            ["evaluate", "retrieval", "RUN", "--annotations=ANNO", "--json=bad.yaml/x"],
            "--json: the f",
        ),
        (
            ["evaluate", "retrieval", "RUN", "--annotations=ANNO", "--json="],
            "--json: must be a path",
        ),
        (["visualize", "RUN", "no.mp4", "--caption=x"], "video: must be a file, got 'no.mp4'"),
        (
            ["visualize", "RUN", "bad.yaml", "--caption=x", "--output=~"],
            "--output: must be a file to",
        ),
        (
            ["visualize", "RUN", "bad.yaml", "--caption=x", "--output=x.mp4"],
            "--output: must end in",
        ),
        (["visualize", "~/half", "bad.yaml", "--caption=x"], "no weights"),
        (["visualize", "RUN", "bad.yaml", "--caption=\udcff"], "--caption: must be text in UTF-8"),
        (["sparsity", "--frames", "4", "0"], "--frames: must be at least 1, got 0"),
        (["demo", "--output=bad.yaml"], "--output: must be a folder to write to"),
        (["demo", "--output=new", "optimizer.steps=0"], "optimizer.steps must be at least 1"),
        (
            ["demo", "--output=new", "output=x"],
            "override: must leave output, seed, init and the corpus",
        ),
    ],
)
def test_every_path_is_looked_at_first(
    home: Path,
    run_folder: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    line: str,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    work = ("engine.build.read_annotations", "engine.loading.load_for_use", "cli.demo.build_corpus")
    for name in work:
        monkeypatch.setattr(f"svitt_ops.training.{name}", refuse)
    (home / "bad.yaml").write_text("a: [")
    for name in ("half", "cut"):
        (home / name).mkdir()
        (home / name / "config.json").write_text('{"model_type": "svitt"}')
    (home / "cut" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    places = {"RUN": str(run_folder), "--annotations=ANNO": f"--annotations={corpus}/test.json"}
    before = sorted(home.glob("[!.]*"))
    assert cli.main([places.get(word, word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert line in err.splitlines()[-1] and err.startswith("svitt ") and out == ""
    assert err.count("\n") == 1
    assert sorted(home.glob("[!.]*")) == before


def test_home_folders_on_the_command_line(
    home: Path, run_folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "run").symlink_to(run_folder)
    (home / "corpus").symlink_to(corpus)
    words = ["evaluate", "retrieval", "~/run", "--annotations=~/corpus/test.json"]
    words += ["--root=~/corpus", "--json=~/new/numbers.json", "--workers=0", "--cpu"]
    assert cli.main(words) == 0
    facts = json.loads((home / "new" / "numbers.json").read_text())
    assert facts["videos"] == 8
    assert facts["skipped"] == {}
    video = f"~/corpus/{json.loads((corpus / 'test.json').read_text())[0]['video']}"
    words = ["visualize", "~/run", video, "--caption=a red square", "--output=~/figures/one"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(home / "figures" / "one.png")
    assert (home / "figures" / "one.png").stat().st_size > 1000
    assert not (home / "~").exists()


def test_numbers_for_a_full_disk(
    home: Path, run_folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "retrieval", str(run_folder), "--annotations", str(corpus / "test.json")]
    assert cli.main([*words, "--workers=0", "--cpu", "--json=/dev/full"]) == 2
    out, err = capsys.readouterr()
    assert "text to video" in out  # the numbers are not lost
    assert err.splitlines()[-1] == "svitt evaluate: /dev/full: No space left on device"


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond some kilobytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_figure_for_a_full_disk(
    home: Path, run_folder: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    video = str(corpus / json.loads((corpus / "test.json").read_text())[0]["video"])
    words = ["visualize", str(run_folder), video, "--caption=a red square", "--output=one.png"]
    assert cli.main(words) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "svitt visualize: one.png: File too large"


def test_ctrl_c_while_it_trains(make_recipe: Any, tmp_path: Path) -> None:
    from svitt_ops.training.engine.recipes import recipe_text

    recipe = make_recipe(tmp_path / "run", "optimizer.steps=100000", "data.workers=1")
    (tmp_path / "r.yaml").write_text(recipe_text(recipe))
    # A shell's background jobs ignore SIGINT, and so would their children.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "import svitt_cli; sys.exit(svitt_cli.main(sys.argv[1:]))"
    words = ["pretrain", "--config", str(tmp_path / "r.yaml"), "run.save_steps=1"]
    errors = tmp_path / "stderr"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stderr=file, start_new_session=True
        )
    while not list((tmp_path / "run").glob("checkpoint-*")):
        assert process.poll() is None, errors.read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers too
    assert process.wait() == 130
    lines = errors.read_text().splitlines()
    assert lines[-1] == "svitt pretrain: interrupted"
    assert "Traceback" not in errors.read_text()

"""The build: what is left out where a tool is missing, and what the source archive holds."""

import os
import runpy
import stat
from pathlib import Path
from typing import Any

import pytest
from setuptools.command.egg_info import FileList

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit whose nvcc is the C++ compiler, and a torch that is built for it."""
    import torch
    from torch.utils import cpp_extension

    folder = tmp_path / "cuda"
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V1"; exit; fi\n'
        'for last; do :; done; echo "int probe() { return 0; }" | c++ -fPIC -xc++ -c - -o "$last"\n'
    )
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(folder))
    return folder


def run_setup(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[str]]:
    """What setup.py asks setuptools for, and the names of the extensions in it."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: asked.update(options))
    monkeypatch.chdir(REPOSITORY)
    for name in ("CXX", "CC"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # it sets them: put back afterwards
        if not os.environ[name]:
            monkeypatch.delenv(name)
    found = runpy.run_path(str(REPOSITORY / "setup.py"))
    if found["find_compiler"]() is None:
        pytest.skip("needs a C++ compiler")
    return asked, [extension.name for extension in asked["ext_modules"]]


def test_without_libcudart_the_rest_is_installed(
    cuda_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, names = run_setup(monkeypatch)
    assert names == ["svitt_ops._C_cpu"]
    assert "svitt_ops: no CUDA extension: libcudart cannot be linked (" in capsys.readouterr().err
    assert asked["py_modules"] == ["svitt_cli"]


def test_an_nvcc_that_cannot_compile(
    cuda_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvcc = cuda_home / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("for last;", 'echo "gcc 99?" >&2; exit 1; for last;'))
    _, names = run_setup(monkeypatch)
    assert names == ["svitt_ops._C_cpu"]
    assert "no CUDA extension: nvcc cannot compile (gcc 99?)" in capsys.readouterr().err
    nvcc.write_text("\x7fELF of another machine")
    _, names = run_setup(monkeypatch)
    assert names == ["svitt_ops._C_cpu"]
    assert "no CUDA extension: no nvcc was found" in capsys.readouterr().err


def test_with_libcudart_it_is_built(
    cuda_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = f'echo "int x;" | c++ -xc++ -shared -fPIC - -o {cuda_home}/lib64/libcudart.so'
    if os.system(script):
        pytest.skip("needs a C++ compiler")
    from torch.utils import cpp_extension

    join = cuda_home.joinpath
    monkeypatch.setattr(cpp_extension, "_join_cuda_home", lambda *path: str(join(*path)))
    _, names = run_setup(monkeypatch)
    assert names == ["svitt_ops._C_cpu", "svitt_ops._C_cuda"]
    assert capsys.readouterr().err == ""


def test_the_source_archive_holds_what_is_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """README and messages send readers to `make bench`, the tests, the docs and the examples."""
    monkeypatch.chdir(REPOSITORY)
    held = FileList()
    for line in Path("MANIFEST.in").read_text().splitlines():
        held.process_template_line(line)
    for name in (
        ".ci/run",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "Makefile",
        "SECURITY.md",
        "bench/__main__.py",
        "bench/gpu.sh",
        "constraints.txt",
        "csrc/cuda/token_pruning.cu",
        "docs/benchmarks.md",
        "docs/conf.py",
        "examples/drop_in.py",
        "hub/build.toml",
        "tests/conftest.py",
        "tests/training/cli/test_commands.py",
        "training/recipes/README.md",
    ):
        assert name in held.files, name
    assert not [name for name in held.files if name.endswith((".pyc", ".so"))]

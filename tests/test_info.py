"""`svitt info`: complete where everything is there, and useful where something is missing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import svitt_ops
from svitt_ops import __main__, _extension, info


def run_info(folder: Path, *flags: str, package: Path | None = None) -> str:
    """`python -m svitt_ops info` in a fresh process, of the installed package or of a copy."""
    environment = dict(os.environ)
    if package is not None:
        environment["PYTHONPATH"] = str(package.parent)
    command = [sys.executable, "-m", "svitt_ops", "info", *flags]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def copy_package(folder: Path) -> Path:
    """A copy of the package without its compiled extensions."""
    source = Path(svitt_ops.__file__).parent
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    return Path(shutil.copytree(source, folder / "svitt_ops", ignore=ignore))


def test_json_agrees_with_this_process(tmp_path: Path) -> None:
    facts = json.loads(run_info(tmp_path, "--json"))
    assert facts["versions"]["svitt_ops"] == svitt_ops.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["ops"]) == set(svitt_ops.OPS)
    assert facts["extensions"]["cpu"]["reason"] == _extension.status().cpu_reason
    expected = "C++" if _extension.load_cpu() else "plain PyTorch"
    for choices in facts["ops"].values():
        assert choices["cpu"]["implementation"] == expected
        assert choices["cuda"]["reason"]


def test_text_names_every_op_and_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "triton", "nvcc", "cpu", "cuda", *svitt_ops.OPS):
        assert word in text


def test_capability_is_a_known_one() -> None:
    capability = _extension.cpu_capability()
    if _extension.load_cpu():
        assert capability in ("avx512+amx", "avx512_bf16", "avx512", "avx2", "generic")
    else:
        assert capability is None


@pytest.mark.parametrize("wanted", ["generic", "sse9"])
def test_a_lesser_capability_can_be_asked_for(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not _extension.load_cpu():
        pytest.skip("no C++ extension")
    monkeypatch.setenv("SVITT_CPU_CAPABILITY", wanted)
    call = "import svitt_ops._extension as e; print(e.cpu_capability())"
    run = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
    if wanted == "generic":
        assert run.stdout.strip() == wanted
    else:
        assert run.returncode != 0
        assert "SVITT_CPU_CAPABILITY must be one of generic, avx2, avx512" in run.stderr


def test_without_the_extension(tmp_path: Path) -> None:
    facts = json.loads(run_info(tmp_path, "--json", package=copy_package(tmp_path)))
    assert facts["extensions"]["cpu"]["path"] is None
    assert "no C++20 compiler" in facts["extensions"]["cpu"]["reason"]
    for choices in facts["ops"].values():
        assert choices["cpu"]["implementation"] == "plain PyTorch"


def test_with_an_extension_that_does_not_load(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    (package / "_C_cpu.abi3.so").write_bytes(b"not a shared library")
    facts = json.loads(run_info(tmp_path, "--json", package=package))
    assert "did not load" in facts["extensions"]["cpu"]["reason"]
    for choices in facts["ops"].values():
        assert choices["cpu"]["implementation"] == "plain PyTorch"
    assert "did not load" in run_info(tmp_path, package=package)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_installed", lambda package: None)
    facts = info.collect()
    assert facts["versions"]["triton"] is None
    for choices in facts["ops"].values():
        assert choices["cuda"] == {"implementation": None, "reason": "triton is not installed"}
    assert "triton is not installed" in info.render(facts)


@pytest.mark.parametrize(
    ("missing", "said"),
    [("", "was never shown to be faster"), ("no nvcc", "is not there: no nvcc")],
)
def test_an_op_with_a_cuda_kernel_says_why_triton_runs(
    monkeypatch: pytest.MonkeyPatch, missing: str, said: str
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(_extension, "cuda_reason", lambda: missing)
    choices = {op: facts["cuda"] for op, facts in __main__.collect()["ops"].items()}
    assert choices["token_pruning"]["implementation"].startswith("Triton")
    assert choices["token_pruning"]["reason"].endswith(f"its CUDA kernel {said}")
    assert "CUDA kernel" not in choices["block_sparse_attention"]["reason"]


def test_an_unknown_command_is_refused() -> None:
    with pytest.raises(SystemExit) as error:
        __main__.main(["inform"])
    assert error.value.code == 2

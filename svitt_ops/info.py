"""What `svitt info` says: what was built, and what each op will run here and why."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import svitt_ops
from svitt_ops import _extension, _library


def collect() -> dict[str, Any]:
    """Everything that `svitt info` says, as plain data."""
    status, gpus = _extension.status(), _gpus()
    return {
        "versions": {
            "svitt_ops": svitt_ops.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "triton": _installed("triton"),
            "cuda": torch.version.cuda,
            "nvcc": _nvcc(),
        },
        "devices": {
            "cpu": {
                "name": _cpu_name(),
                "threads": torch.get_num_threads(),
                "capability": _capability(),
            },
            "cuda": gpus,
        },
        "tiles": _tiles(sorted({int(gpu["sm"]) for gpu in gpus} or {0})),
        "extensions": {
            "cpu": {"path": status.cpu_path, "reason": status.cpu_reason},
            "cuda": {"path": status.cuda_path, "reason": status.cuda_reason},
        },
        "ops": {op: {"cpu": _cpu_choice(op), "cuda": _cuda_choice(op)} for op in svitt_ops.OPS},
    }


def render(facts: dict[str, Any]) -> str:
    """The facts of `collect` as text."""
    rows: list[tuple[str, str, str]] = []
    for name, value in facts["versions"].items():
        rows.append(("versions", name, value or "none"))
    cpu = facts["devices"]["cpu"]
    capability = cpu["capability"] or "no compiled kernels"
    rows.append(("devices", "cpu", f"{cpu['name']}, {cpu['threads']} threads, {capability}"))
    for gpu in facts["devices"]["cuda"]:
        text = f"{gpu['name']}, {gpu['memory_gib']} GiB, sm_{gpu['sm']}"
        rows.append(("devices", f"cuda:{gpu['index']}", text))
    if not facts["devices"]["cuda"]:
        rows.append(("devices", "cuda", "none"))
    for name, tiles in facts["tiles"].items():
        tuned = f"{tiles['tuned']} tuned, {tiles['table']}" if tiles["tuned"] else tiles["table"]
        rows.append(("tiles", name, tuned))
    for name, extension in facts["extensions"].items():
        rows.append(("extensions", name, extension["reason"] or extension["path"]))
    for op, choices in facts["ops"].items():
        for device, choice in choices.items():
            runs = choice["implementation"] or "nothing"
            rows.append((op, device, f"{runs}: {choice['reason']}"))
    lines: list[str] = []
    heading = ""
    for section, name, text in rows:
        if section != heading:
            lines.append(section)
            heading = section
        lines.append(f"  {name:<10} {text}")
    return "\n".join(lines)


def _tiles(architectures: list[int]) -> dict[str, dict[str, Any]]:
    """Which table of tiles the Triton kernels of each architecture take, and how many it has."""
    try:
        from svitt_ops.kernels import tile_table
    except ModuleNotFoundError:  # a part of an installation
        return {}
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the words say it too
        for arch in architectures:
            try:
                table, tiles = tile_table.in_use(arch)
            except ValueError as error:
                table, tiles = f"none can run: {error}", {}
            found[tile_table.architecture(arch)] = {"table": table, "tuned": len(tiles)}
    return found


def _cpu_choice(op: str) -> dict[str, str | None]:
    reason = _extension.status().cpu_reason
    if reason:
        return {"implementation": "plain PyTorch", "reason": reason}
    known = torch._C._dispatch_has_kernel_for_dispatch_key
    if not all(known(f"svitt_ops::{name}", "CPU") for name in _schemas(op)):
        return {"implementation": None, "reason": "the extension is older than this op: reinstall"}
    return {
        "implementation": "C++",
        "reason": f"compiled, {_capability()} where kernels have variants",
    }


def _cuda_choice(op: str) -> dict[str, str | None]:
    triton = _installed("triton")
    if triton is None:
        return {"implementation": None, "reason": "triton is not installed"}
    reason = "the GPU is there" if _gpus() else "for tensors on a GPU, and there is none here"
    if _library.cuda_kernels.intersection(_schemas(op)):
        missing = _extension.cuda_reason()
        built = f"is not there: {missing}" if missing else "was never shown to be faster"
        reason += f"; its CUDA kernel {built}"
    return {"implementation": f"Triton {triton}", "reason": reason}


def _schemas(op: str) -> list[str]:
    """The names in the dispatcher of the ops of one stem."""
    names = _library.implementations.items()
    return [name for name, (_, module) in names if module.startswith(op)]


def _capability() -> str | None:
    try:
        return _extension.cpu_capability()
    except (AttributeError, RuntimeError):  # an extension built before there was such an op
        return "unknown"


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "index": index,
                "name": device.name,
                "memory_gib": round(device.total_memory / 2**30, 1),
                "sm": f"{device.major}{device.minor}",
            }
        )
    return gpus


def _installed(package: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\S+),", run.stdout)
    return found[1] if found else None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"model name\s*:\s*(.+)", file.read())
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"

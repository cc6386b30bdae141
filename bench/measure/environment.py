"""Where a result comes from: hardware, versions, commit. Nothing that names a host or a user."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import svitt_ops
from svitt_ops.info import collect

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "bench" / "results"


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and state of the machine and of the source, as plain data."""
    facts = collect()
    return {
        "hardware": hardware(device),
        "cpu": facts["devices"]["cpu"],
        "cuda": facts["devices"]["cuda"],
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "versions": facts["versions"],
        "ops": facts["ops"],
        "tuned_tiles": {name: x["tuned"] for name, x in facts["tiles"].items()},
        "extensions": extension_digests(),
        **_source(),
    }


def extension_digests() -> dict[str, str]:
    """SHA-256 of the compiled extensions, which say what was measured where the commit cannot."""
    folder = Path(svitt_ops.__file__).parent
    files = sorted(folder.glob("_C_*.so"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def hardware(device: torch.device) -> str:
    """The device in words, with what changes its speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = collect()["devices"]["cpu"]
    name = re.sub(r"\((R|TM|tm|r)\)", "", cpu["name"]).partition(", ")[0]
    return (
        f"{name}, {cpu['capability'] or 'no compiled kernels'}, {torch.get_num_threads()} threads"
    )


def slug(op: str, environment: dict[str, Any]) -> str:
    """File name of a result, without the ending."""
    version = environment["versions"]["torch"].partition("+")[0]
    name = re.sub(r"[^a-z0-9]+", "-", environment["hardware"].lower()).strip("-")
    return f"{op}-{name}-torch{version}"


def _source() -> dict[str, Any]:
    """Commit, and whether any file but the results differs from it; None without git."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return {"commit": None, "dirty": None}
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {"commit": commit, "dirty": bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None

"""The examples run as a reader runs them."""

import os
import subprocess
import sys
from pathlib import Path

import svitt_ops

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    environment = dict(os.environ, PYTHONPATH=str(Path(svitt_ops.__file__).parent.parent))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_drop_in() -> None:
    text = run("drop_in.py")
    assert "output and gradients equal" in text
    assert "sparse" in text

"""The examples run as a reader runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import svitt_ops

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    environment = dict(os.environ, PYTHONPATH=str(Path(svitt_ops.__file__).parent.parent))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_drop_in() -> None:
    text = run("drop_in.py")
    assert "output and gradients equal" in text
    assert "sparse" in text


@pytest.mark.timeout(180)
def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "layout.png"
    text = run("demo.py", str(picture))
    assert picture.stat().st_size > 0
    assert str(picture) in text
    assert "every block attended" in text
    for tokens in ("785", "1569", "3137"):
        assert tokens in text

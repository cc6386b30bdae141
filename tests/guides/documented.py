"""The commands that the README, the guides and `--help` tell a reader to give."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = ("README.md", "training/recipes/README.md")
HELP = (
    (),
    ("demo",),
    ("pretrain",),
    ("finetune",),
    ("evaluate",),
    ("evaluate", "retrieval"),
    ("visualize",),
)
HELP += (("embed",), ("search",), ("sparsity",), ("info",))


def documented_commands(svitt: Path) -> dict[str, str]:
    """Each `svitt` or `torchrun` line of a page's code blocks or of a help text, by where first."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for command in _commands(block):
                found.setdefault(command, page)
    for words in HELP:
        run = subprocess.run([svitt, *words, "--help"], capture_output=True, text=True, check=True)
        for command in _commands(run.stdout):
            found.setdefault(command, " ".join(("svitt", *words, "--help")))
    return found


def _commands(text: str) -> list[str]:
    """Lines that are commands; what stands behind two spaces or a # explains them."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = (re.split(r"\s{2,}|\s#", line.strip())[0] for line in joined.splitlines())
    return [line for line in lines if re.match(r"(svitt|torchrun) \S", line)]

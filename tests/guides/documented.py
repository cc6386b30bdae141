"""The commands that the README, the guides and `--help` tell a reader to give."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "training/recipes/README.md"),
    *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")),
)
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


def blocks(page: str, *languages: str) -> list[tuple[int, str]]:
    """The fenced blocks of a page in one of the languages: the line and the text of each."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start(2)) + 1, found[2])
        for found in re.finditer(r"^```(\S*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        if found[1] in languages
    ]


def documented_commands(svitt: Path) -> dict[str, str]:
    """Lines of blocks without a language, and commands of help texts, by where they are first."""
    found: dict[str, str] = {}
    for page in PAGES:
        for _, block in blocks(page, ""):
            for command in _lines(block):
                found.setdefault(command, page)
    for words in HELP:
        run = subprocess.run([svitt, *words, "--help"], capture_output=True, text=True, check=True)
        for command in _lines(run.stdout):
            if re.match(r"(svitt|torchrun) \S", command):
                found.setdefault(command, " ".join(("svitt", *words, "--help")))
    return found


def _lines(text: str) -> list[str]:
    """Lines without what stands behind two spaces or a #, which explains them."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = (re.split(r"\s{2,}|\s#", line.strip())[0] for line in joined.splitlines())
    return [line for line in lines if line]

"""`python docs/check.py FOLDER`: a built site loads nothing from elsewhere, and is whole."""

import re
import sys
from pathlib import Path

LOADED = re.compile(
    r"<(?:script|link|img|source|iframe|video|audio|embed|object)\b[^>]*?"
    r"\b(?:src|href|srcset|data)\s*=\s*[\"']\s*((?:https?:)?//[^\"']*)"
    r"|url\(\s*[\"']?((?:https?:)?//[^\"')]*)|@import\s+[\"']((?:https?:)?//[^\"']*)",
    re.IGNORECASE,
)
PAGES = ("index.html", "README.html", "docs/index.html", "docs/train.html", "docs/api/ops.html")


def loaded(text: str) -> list[str]:
    """Addresses of other machines that a page or a style sheet would fetch by itself."""
    return [next(filter(None, found)) for found in LOADED.findall(text)]


def main(folder: Path) -> int:
    """0, or 1 and what is wrong."""
    files = [x for x in sorted(folder.rglob("*")) if x.suffix in (".html", ".css")]
    wrong = [f"{page}: missing" for page in PAGES if not (folder / page).is_file()]
    for file in files:
        text = file.read_text(encoding="utf-8")
        wrong += [f"{file.relative_to(folder)}: loads {address}" for address in loaded(text)]
    print("\n".join(wrong) or f"{len(files)} files load nothing from elsewhere")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

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
    """0; or 1, where something is wrong."""
    wrong = [f"{page}: missing" for page in PAGES if not (folder / page).is_file()]
    files = [x for x in sorted(folder.rglob("*")) if x.suffix in (".html", ".css")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        name = file.relative_to(folder)
        wrong += [f"{name}: loads {address}" for address in loaded(text)]
        shown = re.findall(r"<(?:img|source)\b[^>]*?\bsrc(?:set)?=\"([^\"]+)", text)
        lost = (x for x in shown if not x.startswith("data:") and not (file.parent / x).is_file())
        wrong += [f"{name}: shows {picture}, which is not there" for picture in lost]
    print("\n".join(wrong) or f"{len(files)} files load nothing from elsewhere")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

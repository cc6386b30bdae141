"""Tables of Markdown, as lines."""

from __future__ import annotations

from collections.abc import Sequence


def head(columns: Sequence[str], texts: int = 1) -> list[str]:
    """The first two lines; all columns but the first `texts` hold numbers."""
    return [line(columns), "|---" * texts + "|---:" * (len(columns) - texts) + "|"]


def line(cells: Sequence[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"

"""Numbers as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def format_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns: the first to the left, the others to the right if all are short."""
    columns = max(len(row) for row in rows)
    widths = [max(len(row[k]) for row in rows if k < len(row)) for k in range(columns)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [
            cell if columns == 2 else cell.rjust(width)
            for cell, width in zip(row[1:], widths[1:], strict=False)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def left_out_lines(skipped: Mapping[str, str]) -> list[str]:
    """How many videos were skipped, and why."""
    if not skipped:
        return []
    count = len(skipped)
    reasons = [f"  {reason}" for reason in skipped.values()]
    return [f"{count} unusable video{'s' * (count > 1)} skipped:", *reasons]

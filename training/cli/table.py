"""Numbers as text: the tables that commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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


def render_retrieval(facts: dict[str, Any]) -> str:
    """Recalls of `retrieval`, or of every frame order of `probe_retrieval`, and what was lost."""
    orders = {"": facts} if "text_to_video" in facts else facts
    rows: list[tuple[str, ...]] = [("", "R@1", "R@5", "R@10", "mean")]
    for order, found in orders.items():
        if not isinstance(found, dict) or "text_to_video" not in found:
            continue
        for name, key in (("text to video", "text_to_video"), ("video to text", "video_to_text")):
            label = f"{order}, {name}" if order else name
            rows.append((label, *(f"{found[key][k]:.1f}" for k in ("R1", "R5", "R10", "mean"))))
            if not order and found["contrastive"][key] != found[key]:
                plain = found["contrastive"][key]
                row = (f"{plain[k]:.1f}" for k in ("R1", "R5", "R10", "mean"))
                rows.append(("  before re-ranking", *row))
    first = next(iter(orders.values()))
    lines = [f"{first['texts']} texts, {first['videos']} videos", *format_rows(rows)]
    if "delta" in facts:
        lines.append(f"normal - shuffled: {facts['delta']:.1f}")
    if cut := first.get("texts_cut"):
        lines.append(f"{cut} of {first['texts']} texts are longer than the text length, and cut")
    if count := len(first["skipped"]):
        lines.append(f"{count} unusable video{'s' * (count > 1)} skipped:")
        lines += [f"  {reason}" for reason in first["skipped"].values()]
    return "\n".join(lines)


def render_sparsity(frames: Sequence[int]) -> str:
    """The paper's Table A1 for these numbers of frames."""
    from svitt_ops.models import sparsity_table

    rows: list[tuple[str, ...]] = [
        (
            "frames",
            "q_v",
            "edges, M",
            "dense, M",
            "sparsity S",
            "MACs",
            "visual tokens",
            "multimodal",
        )
    ]
    for row in sparsity_table(frames=frames):
        rows.append(
            (
                str(row.num_frames),
                f"{row.keep_rate:g}",
                f"{row.edges.total / 1e6:.6f}",
                f"{row.edges.dense / 1e6:.6f}",
                f"{row.edges.sparsity:.6f}",
                f"{row.macs / row.dense_macs:.1%}",
                "/".join(map(str, row.tokens)),
                "/".join(map(str, row.multimodal_tokens)),
            )
        )
    note = "MACs: of the video tower, as a share of the dense one's."
    return "\n".join([*format_rows(rows), note])

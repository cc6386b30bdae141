"""`svitt sparsity`: edges and tokens of the full-size model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from svitt_ops.models import sparsity_table
from svitt_ops.training.tasks.parts.table import format_rows


def run(arguments: argparse.Namespace) -> int:
    """Print the table; the exit status."""
    if min(arguments.frames) < 1:
        raise ValueError(f"--frames: must be at least 1, got {min(arguments.frames)}")
    print(render_sparsity(arguments.frames))
    return 0


def render_sparsity(frames: Sequence[int]) -> str:
    """The paper's Table A1 for these numbers of frames."""
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

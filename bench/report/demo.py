"""`python -m bench.report.demo RUN/demo.json...`: keep what demos measured, for README's table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import environment
from bench.report.markdown import head, line

FOLDER = environment.RESULTS / "demo"


def main(argv: Sequence[str] | None = None) -> int:
    """Copies the facts of finished demos beside where and from what source they ran."""
    parser = argparse.ArgumentParser(prog="python -m bench.report.demo", description=__doc__)
    parser.add_argument("facts", type=Path, nargs="+", help="demo.json of a finished demo")
    parser.add_argument("--out", type=Path, default=FOLDER)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in arguments.facts:
        facts = json.loads(path.read_text())
        if "seconds" not in facts:
            parser.error(f"{path}: is of a demo that did not end")
        del facts["figure"]  # a path
        document = {"environment": environment.describe(torch.device("cpu")), "demo": facts}
        name = arguments.out / f"seed-{facts['seed']}.json"
        name.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def load(folder: Path) -> list[dict[str, Any]]:
    """The kept results, by seed."""
    found = [json.loads(path.read_text()) for path in folder.glob("seed-*.json")]
    return sorted(found, key=lambda document: document["demo"]["seed"])


def render(documents: Sequence[dict[str, Any]]) -> str:
    """A column for each seed."""
    where = documents[0]["environment"]
    hardware = where["hardware"].rpartition(", ")[0]
    demos = [document["demo"] for document in documents]
    first, commit = demos[0], (where["commit"] or "unknown")[:10]
    rows = [
        ("R@1, text to video", "{:.0f} %", [x["retrieval"]["text_to_video"]["R1"] for x in demos]),
        ("R@5, text to video", "{:.0f} %", [x["retrieval"]["text_to_video"]["R5"] for x in demos]),
        ("R@1, video to text", "{:.0f} %", [x["retrieval"]["video_to_text"]["R1"] for x in demos]),
        ("temporal pairs told apart", "{:.1f} %", [x["pair_accuracy"]["normal"] for x in demos]),
        ("with shuffled frames", "{:.1f} %", [x["pair_accuracy"]["shuffled"] for x in demos]),
    ]
    lines = [
        f"**{hardware}**, torch {where['versions']['torch']}, commit {commit}: "
        f"`svitt demo --seed N`, {first['frames']} frames, {first['retrieval']['videos']} clips of "
        f"scenes never trained on; {first['edges']['edges']:,} edges of "
        f"{first['edges']['dense']:,}, visual tokens "
        f"{' -> '.join(map(str, first['tokens']['visual']))}",
        "",
        *head(["seed", *(str(demo["seed"]) for demo in demos)]),
    ]
    for title, form, values in rows:
        lines.append(line([title, *map(form.format, values)]))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

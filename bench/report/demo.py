"""`python -m bench.report.demo RUN/demo.json...`: keep what demos measured, for the tables."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import environment
from bench.report import demo_pictures
from bench.report.markdown import head, line

FOLDER = environment.RESULTS / "demo"
DENSE = ("model.edge_sparsity=false", "model.keep_rate=1", "model.multimodal_keep_rate=1")
"""Overrides of a demo that drops nothing."""


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
        facts.pop("figure", None)  # a path
        document = {"environment": environment.describe(torch.device("cpu")), "demo": facts}
        try:
            name = _name(document)
        except ValueError as error:
            parser.error(f"{path}: {error}")
        (arguments.out / name).write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _name(document: dict[str, Any]) -> str:
    facts = document["demo"]
    if "system" in facts:
        return f"{demo_pictures.name_of(facts)}-seed-{facts['seed']}.json"
    moves, dense = _kind(document)
    return f"{'motion-' * moves}{'dense-' * dense}seed-{facts['seed']}.json"


def load(folder: Path) -> list[dict[str, Any]]:
    """The kept results of films, by corpus, sparsity and seed."""
    found = [x for x in _read(folder) if "system" not in x["demo"]]
    return sorted(found, key=lambda document: (_kind(document), document["demo"]["seed"]))


def load_pictures(folder: Path) -> list[dict[str, Any]]:
    """Those of pictures, by system and seed."""
    found = [x for x in _read(folder) if "system" in x["demo"]]
    return sorted(
        found, key=lambda document: (document["demo"]["system"], document["demo"]["seed"])
    )


def _read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in folder.glob("*seed-*.json")]


def _kind(document: dict[str, Any]) -> tuple[bool, bool]:
    """Whether of the motion corpus, and whether of a model that drops nothing."""
    facts = document["demo"]
    return bool(facts["corpus"]["motion"]), facts["edges"]["edges"] == facts["edges"]["dense"]


def render(documents: Sequence[dict[str, Any]]) -> str:
    """A table for each corpus, hybrid and dense, with a column for each seed."""
    parts = [list(found) for _, found in itertools.groupby(documents, _kind)]
    return "\n\n".join(map(_table, parts))


def _table(documents: Sequence[dict[str, Any]]) -> str:
    where = documents[0]["environment"]
    hardware = where["hardware"].rpartition(", ")[0]
    demos = [document["demo"] for document in documents]
    first, commit = demos[0], (where["commit"] or "unknown")[:10]
    moves, dense = _kind(documents[0])
    options = " --motion" * moves + "".join(f" {override}" for override in DENSE * dense)
    tokens = [*first["tokens"]["visual"], *first["tokens"]["multimodal"][1:]]
    found = [demo["retrieval"] for demo in demos]
    plain = [table["contrastive"] for table in found]
    answers = [demo["tasks"]["qa"] for demo in demos]
    survivors = [demo["survivors"] for demo in demos]
    steps = [demo["seconds_per_step"] for demo in demos]
    rows = [
        ("R@1, text to video", "{:.0f} %", [x["text_to_video"]["R1"] for x in found]),
        ("before re-ranking", "{:.0f} %", [x["text_to_video"]["R1"] for x in plain]),
        ("R@5, text to video", "{:.0f} %", [x["text_to_video"]["R5"] for x in found]),
        ("R@1, video to text", "{:.0f} %", [x["video_to_text"]["R1"] for x in found]),
        ("temporal pairs told apart", "{:.1f} %", [x["pair_accuracy"]["normal"] for x in demos]),
        ("with shuffled frames", "{:.1f} %", [x["pair_accuracy"]["shuffled"] for x in demos]),
        ("questions answered rightly", "{:.1f} %", [x["score"] for x in answers]),
        ("always the commonest answer", "{:.1f} %", [x["majority"] for x in answers]),
        *(
            (f"of {kind}", "{:.1f} %", [x["by_type"][kind]["accuracy"] for x in answers])
            for kind in answers[0]["by_type"]
        ),
        ("of order, with shuffled frames", "{:.1f} %", [x["order_shuffled"] for x in answers]),
        *(
            (
                f"{name} survivors on {what}, of random ones'",
                "{:.2f} x",
                [x[name]["share"] / x[name]["random"] for x in survivors],
            )
            for name, what in (("visual", "objects"), ("multimodal", "named objects"))
        ),
        (
            "training step, of a dense one's time",
            "{:.0%}",
            [x["sparse"] / x["dense"] for x in steps],
        ),
        ("minutes", "{:.1f}", [demo["seconds"]["total"] / 60 for demo in demos]),
        ("load of the machine", "{:.1f}", [demo["load"] for demo in demos]),
    ]
    lines = [
        f"**{hardware}**, torch {where['versions']['torch']}, commit {commit}: "
        f"`svitt demo --seed N{options}`, {first['frames']} frames, "
        f"{first['retrieval']['videos']} clips of scenes never trained on and "
        f"{first['tasks']['qa']['questions']} questions; {first['edges']['edges']:,} edges of "
        f"{first['edges']['dense']:,}, tokens {' -> '.join(map(str, tokens))}",
        "",
        *head(["seed", *(str(demo["seed"]) for demo in demos)]),
    ]
    for title, form, values in rows:
        lines.append(line([title, *map(form.format, values)]))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

"""Tables of demos on pictures: every task beside chance, and what parts of the systems are for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from bench.report.markdown import head, line
from svitt_ops.training.cli.demo_pictures import rows_of

LOSSES = ("vtm", "vtc", "mlm", "mim", "psl")
"""Of SIMLA, in the order in which its ablation adds them."""


def _with(count: int) -> tuple[str, ...]:
    """Overrides of a demo of SIMLA that pretrains by the first so many losses."""

    def weights(stage: str, losses: Sequence[str]) -> str:
        said = ", ".join(f"{name}: {int(name in losses)}" for name in LOSSES)
        return f"{stage}.model.loss_weights={{{said}}}"

    match = weights("match", LOSSES[:count])
    if count > 1:
        return (match,)
    # Without the contrastive loss the first stage has to match, too.
    return (weights("towers", LOSSES[:1]), "towers.model.hard_negatives=false", match)


VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "simla": {
        "itm": _with(1),
        "itc": _with(2),
        "mlm": _with(3),
        "mim": _with(4),
        "": (),
    },
    "softmask": {"unmasked": ("model.mask_source=none",), "": ()},
    "scl": {"incomplete": ("match.model.loss_weights={vtc: 1, vtm: 1, mlm: 1, scl: 0}",), "": ()},
    "cookie": {
        "unshared": ("model.weight_sharing=unshared",),
        "ccl": ("match.model.loss_weights={ccl: 1, vcl: 0, tcl: 0}",),
        "": (),
    },
}
"""Overrides of what a demo is compared with, by system and name; "" is the demo itself."""
TITLES = {
    "simla": {"itm": "ITM", "itc": "+ ITC", "mlm": "+ MLM", "mim": "+ MIM", "": "+ PSL"},
    "softmask": {"unmasked": "without soft masks", "": "with soft masks"},
    "scl": {"incomplete": "without completion", "": "with completion"},
    "cookie": {
        "unshared": "all losses, own weights",
        "ccl": "CCL alone, shared weights",
        "": "all losses, shared weights",
    },
}
INTRODUCTION = {
    "simla": "SIMLA pretrained by one loss more in each row; fine-tuning is the same for all.",
    "softmask": "SoftMask without its masks and their matching loss, and with them.",
    "scl": "SCL pretrained without its completion of masked pictures and texts, and with it.",
    "cookie": "COOKIE without shared weights, without the losses within a modality, and with both.",
}


NOTE = """\
Each demo draws a corpus, trains on it, and is measured on pictures of scenes that it never saw.
Chance is, of questions, statements and relations of a text to a picture, the commonest answer; of
pointing, the mean area of the named box; of codes, random ones.

What is not learned: where things are in relation to each other is answered little better than by
chance, and a box drawn around a map rarely is that of the thing, even if its peak lies on it. The
match head of so small a model often ranks worse than the search before it, most of all SCL's, which
learns from false texts drawn at random; it is reported as it is. Before any training a map of
Grad-CAM already peaks on things more often than on the ground: compare with the untrained row.
The order of SIMLA's losses in its paper is not found again: contrast is what retrieval needs, and
what the losses after it change is less than what seeds do. So it is with SoftMask's masks."""


def name_of(facts: dict[str, Any]) -> str:
    """What the file of a demo's facts is called before `-seed-N.json`: system and variant.

    Raises:
        ValueError: the demo had overrides that are those of no variant.
    """
    system, given = facts["system"], tuple(facts["overrides"])
    known = {overrides: name for name, overrides in VARIANTS.get(system, {"": ()}).items()}
    if given not in known:
        raise ValueError(f"overrides must be none, or those of a variant, got {' '.join(given)}")
    return f"{system}-{known[given]}" if known[given] else system


def render(documents: Sequence[dict[str, Any]]) -> str:
    """A table for each system with a column for each seed, and one of its variants."""
    parts = [NOTE] if documents else []
    for system, found in itertools.groupby(documents, lambda x: x["demo"]["system"]):
        by_name: dict[str, list[dict[str, Any]]] = {}
        for document in found:
            by_name.setdefault(name_of(document["demo"]), []).append(document)
        if own := by_name.get(system):
            parts.append(_table(own))
        if len(by_name) > 1:
            parts.append(_comparison(system, by_name))
    return "\n\n".join(parts)


def _source(documents: Sequence[dict[str, Any]], command: str) -> str:
    """Where the documents of one table come from, of whose demos some ran from later sources."""
    where = documents[0]["environment"]
    seeds: dict[str, list[str]] = {}
    for document in documents:
        commit = (document["environment"]["commit"] or "unknown")[:10]
        seeds.setdefault(commit, []).append(str(document["demo"]["seed"]))
    commits = " and ".join(f"{commit} (seed {', '.join(found)})" for commit, found in seeds.items())
    if len(seeds) == 1:
        (commits,) = seeds
    versions = f"torch {where['versions']['torch']}, commit {commits}"
    return f"**{where['hardware']}**, {versions}: `{command}`"


def _table(documents: Sequence[dict[str, Any]]) -> str:
    demos = [document["demo"] for document in documents]
    first = demos[0]
    command = f"svitt demo --system {first['system']} --seed N"
    lines = [
        f"{_source(documents, command)}, {first['parameters']:,} parameters,"
        f" {first['corpus']['train_pictures']:,} pictures to train on and"
        f" {first['corpus']['test_pictures']} of scenes never trained on",
        "",
        *head([first["system"], "chance", *(f"seed {demo['seed']}" for demo in demos)]),
    ]
    columns = [{name: score for name, score, _ in rows_of(demo["tasks"])} for demo in demos]
    for name, _, chance in rows_of(first["tasks"]):
        scores = [f"{column[name]:.1f} %" for column in columns]
        lines.append(line([name.strip(), "" if chance is None else f"{chance:.1f} %", *scores]))
    minutes = [
        f"{demo['seconds']['total'] / 60:.1f}" + " for the rest" * demo["resumed"] for demo in demos
    ]
    lines.append(line(["minutes", "", *minutes]))
    cores = [f"{demo['core_seconds'] / 60:.1f}" for demo in demos]
    lines.append(line(["minutes of one core", "", *cores]))
    lines.append(line(["load of the machine", "", *(f"{demo['load']:.1f}" for demo in demos)]))
    return "\n".join(lines)


def _comparison(system: str, by_name: dict[str, list[dict[str, Any]]]) -> str:
    """Scores of each variant, by task; of several seeds each."""
    named = {name: by_name.get(f"{system}-{name}" if name else system) for name in VARIANTS[system]}
    there = {name: documents for name, documents in named.items() if documents}
    tasks = list(next(iter(there.values()))[0]["demo"]["tasks"])
    lines = [INTRODUCTION[system], "", *head(["", "seeds", *tasks], texts=2)]
    for name, documents in there.items():
        demos = [document["demo"] for document in documents]
        cells = [
            " / ".join(f"{demo['tasks'][task]['score']:.1f}" for demo in demos) for task in tasks
        ]
        seeds = ", ".join(str(demo["seed"]) for demo in demos)
        lines.append(line([TITLES[system][name], seeds, *cells]))
    return "\n".join(lines)

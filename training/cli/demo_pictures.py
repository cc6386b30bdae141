"""`svitt demo --system S`, of pictures: draw a corpus, pretrain, learn each task, evaluate.

ALBEF and its kin share the recipes `demo-pictures*`, which are ALBEF's; `SYSTEMS` says what others
change. SCL and COOKIE have their own, `demo-scl*` and `demo-cookie*`. Minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from svitt_ops.training.cli.stages import (
    MARKER,
    TOKENIZER,
    Course,
    check_overrides,
    note,
    prepare,
    write_tokenizer,
)
from svitt_ops.training.corpora.pictures import build_pictures
from svitt_ops.training.corpora.scenes import PictureSpec, Scene
from svitt_ops.training.data.annotations import CAPTIONED
from svitt_ops.training.data.paths import expand, write_text
from svitt_ops.training.engine.build import read_corpora
from svitt_ops.training.engine.loading import load_for_use
from svitt_ops.training.engine.recipes import Corpus, Data, Recipe, load_recipe
from svitt_ops.training.engine.settings import run_values
from svitt_ops.training.engine.task import Evaluable, load_task
from svitt_ops.training.tasks.parts.table import format_rows

Overrides = Mapping[str, Sequence[str]]
Rows = list[tuple[str, float, float | None]]
SAID = {
    "train": ["caption"],
    "train-questions": ["question", "answer"],
    "train-reasoning": ["sentence"],
    "train-entailment": ["sentence"],
    "train-grounding": ["text"],
}
"""Annotation files to train on, and their fields with words."""


CANDIDATES = (
    13  # that are ranked anew: of 100 pictures as large a share as 128 of Flickr30k's 1,000
)
CODES = 16
"""One in so many of the database counts as found: 100 of 1,600."""
SEP = 3
"""[SEP] of a tokenizer that was trained here."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run."""

    recipe: str
    starts_from: str | None = "match"
    """The stage whose weights it begins with."""
    annotations: str = ""
    """End of the name of the file that it learns from."""
    answers: bool = False
    """Whether it learns a closed list of them as classes."""


COOKIE = {
    "towers": Stage(recipe="demo-cookie", starts_from=None),
    "match": Stage(recipe="demo-cookie-views", starts_from="towers"),
    "retrieval": Stage(recipe="demo-cookie-retrieval"),
    "hashing": Stage(recipe="demo-cookie-hashing", annotations="-classes"),
}
"""Stages of a system with recipes of its own: its two of pretraining, and its tasks'."""
SCL = {
    "towers": Stage(recipe="demo-scl", starts_from=None),
    "match": Stage(recipe="demo-scl-match", starts_from="towers"),
    "retrieval": Stage(recipe="demo-scl-retrieval"),
    "qa": Stage(recipe="demo-scl-qa", annotations="-questions", answers=True),
}
STAGES = {
    "towers": Stage(recipe="demo-pictures", starts_from=None),
    "match": Stage(recipe="demo-pictures-match", starts_from="towers"),
    "qa": Stage(recipe="demo-pictures-qa", annotations="-questions"),
    "assignment": Stage(recipe="demo-pictures-assignment"),
    "reasoning": Stage(
        recipe="demo-pictures-reasoning", starts_from="assignment", annotations="-reasoning"
    ),
    "entailment": Stage(recipe="demo-pictures-entailment", annotations="-entailment"),
    "grounding": Stage(recipe="demo-pictures-grounding", annotations="-grounding"),
}
"""By name, in their order."""
SYSTEMS: dict[str, Overrides] = {
    "albef": {stage: () for stage in STAGES},
    "simla": {
        "towers": (
            "model.fusion_layer=0",
            "model.text_num_hidden_layers=3",
            "model.unpaired_layers=2",  # all but the last, of which reasoning has two
            "model.image_vocab_size=128",
            "model.masked_patches=19",  # of 64, as large a share as 75 of 256
            f"model.keyword_excluded_ids=[{SEP}]",
            "model.loss_weights={vtc: 1, vtm: 0, mlm: 0, mim: 0, psl: 0}",
        ),
        "match": (),  # of the losses that a recipe leaves out, each has weight 1
        "qa": (),
        "reasoning": (),
        "entailment": (),
        "grounding": ("model.loss_weights={vtc: 1, vtm: 1, mlm: 0, mim: 0, psl: 0}",),
    },
    "softmask": {
        "towers": (
            "model.mask_layer=2",
            f"model.mask_excluded_ids=[{SEP}]",
            "model.grayscale_rate=0",  # texts name colours
            "model.loss_weights={vtc: 1, vtm: 0, mlm: 0, soft: 0}",
        ),
        "match": (),
        "qa": (),
        "grounding": ("model.loss_weights={vtc: 1, vtm: 1, mlm: 0, soft: 0}",),
    },
    "scl": {stage: () for stage in SCL},
    "cookie": {stage: () for stage in COOKIE},
}
"""The stages of each system, and what it changes in their recipes."""


ALL_STAGES = {*STAGES, *SCL, *COOKIE}
"""Names of the stages of any system."""


def stages_of(system: str) -> dict[str, Stage]:
    """The stages that a system may have, by name."""
    return {"cookie": COOKIE, "scl": SCL}.get(system, STAGES)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and print its table; the exit status."""
    if arguments.motion:
        raise ValueError(f"--motion: is of films, got --system {arguments.system}")
    facts = run_demo(
        arguments.output,
        system=arguments.system,
        seed=arguments.seed,
        overrides=arguments.overrides,
        resume=arguments.resume,
    )
    print(f"\n{render_demo(facts)}")
    return 0


def run_demo(
    output: str | Path = "runs/demo",
    *,
    system: str,
    seed: int = 0,
    overrides: Sequence[str] = (),
    resume: bool = False,
    spec: PictureSpec | None = None,
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the whole demo of a system on pictures.

    Args:
        output: folder for the corpus, all stages and `demo.json`. Those of an earlier demo are
            replaced, and nothing else in it; a folder that is no demo's is refused.
        system: a key of `SYSTEMS`.
        seed: of the training; the corpus stays the same.
        overrides: of the recipes of all stages, such as "optimizer.steps=100", or of one stage,
            "match.model.alpha=0".
        resume: go on with an interrupted demo instead of starting anew.
        spec: what is drawn.
        without: stages to leave out, that no other one starts from.

    Returns:
        What `demo.json` holds: every measured number.
    """
    course, folder, spec = Course(), expand(output, "--output"), spec or PictureSpec()
    recipes = _recipes(folder, system, seed, overrides)  # before anything is removed
    recipes = {name: recipe for name, recipe in recipes.items() if name not in without}
    prepare(folder, resume)
    note(folder / MARKER, system=system, corpus=asdict(spec))
    corpus = folder / "corpus"

    def drawing(scenes: Iterable[Scene]) -> Iterable[Scene]:
        return tqdm(scenes, desc="draw corpus", unit="picture", dynamic_ncols=True)

    with course.part("corpus"):
        if not (corpus / "detections.json").is_file():  # the last file
            build_pictures(corpus, spec, drawing)
        write_tokenizer(corpus, SAID)
    trained = course.train(recipes)
    tasks = {}
    with course.part("evaluation"):
        for name, summary in SUMMARIES.items():
            stage = name if name in trained else PRETRAINED.get(name, "")
            if stage in trained and (name != "text_similarity" or system == "cookie"):
                suffix = SUFFIXES.get(name, stages_of(system)[stage].annotations)
                annotations = corpus / f"test{suffix}.json"
                tasks[name] = summary(evaluate_task(name, trained[stage].folder, annotations))
        if grounded := tasks.get("grounding"):
            found = evaluate_task(
                "grounding", trained["grounding"].folder, corpus / "test-grounding.json", seed
            )
            grounded["untrained"] = _pointing(found)["score"]
    facts = {
        "system": system,
        "tasks": tasks,
        "parameters": sum(
            p.numel() for p in trained["match"].model.parameters() if p.requires_grad
        ),
        "seed": seed,
        "corpus": asdict(spec),
        "overrides": list(overrides),
        **course.facts(),
        "resumed": resume,  # or the seconds are those of what was left to do
    }
    write_text(folder / MARKER, json.dumps(facts, indent=2) + "\n")
    return facts


def _recipes(output: Path, system: str, seed: int, overrides: Sequence[str]) -> dict[str, Recipe]:
    """The recipes of a system's stages."""
    recipes, changes, stages = {}, SYSTEMS[system], stages_of(system)
    for override in overrides:
        named = override.partition(".")[0]
        if named in ALL_STAGES and named not in changes:
            raise ValueError(
                f"override: must name a stage of {system}'s, {', '.join(changes)}, got {override!r}"
            )
    for name, own in changes.items():
        stage = stages[name]
        given = [x.removeprefix(f"{name}.") for x in overrides if _is_for(x, name)]
        check_overrides(given)
        annotations = output / "corpus" / f"train{stage.annotations}.json"
        places = [f"system={system}", f"output={output / name}", f"seed={seed}"]
        places.append(f"data.train.0.annotations={annotations}")
        if stage.answers:
            places.append(f"data.answers={output / 'corpus' / 'answers.json'}")
        if stage.starts_from is None:  # its words are those of all tasks
            places.append("tokenizer.train_vocab_size=null")
            places.append(f"tokenizer.name={output / 'corpus' / TOKENIZER}")
        else:
            start = stage.starts_from if stage.starts_from in changes else "match"
            places.append(f"init.checkpoint={output / start}")
        recipes[name] = load_recipe(stage.recipe, [*places, *own, *given])
    return recipes


def _is_for(override: str, stage: str) -> bool:
    """Whether an override is of a stage's recipe: it names no stage, or this one."""
    named = override.partition(".")[0]
    return named == stage or named not in ALL_STAGES


def evaluate_task(
    task: str, folder: Path, annotations: Path, untrained: int | None = None
) -> dict[str, Any]:
    """What `svitt evaluate` finds for the model of a run, or for one with weights of a seed."""
    kind = load_task(task, Evaluable)
    model, tokenizer, reading, _ = load_for_use(folder, head=kind.HEAD)
    if untrained is not None:
        torch.manual_seed(untrained)
        model = type(model)(model.config)
    corpora = [Corpus(annotations=str(annotations), kind="image")]
    examples = read_corpora(corpora, Data(), "test", getattr(kind, "FORM", CAPTIONED))
    fixed = {"batch_size": 32, "workers": 0, "bf16": False}
    options = {**kind.OPTIONS, **run_values(folder, kind.OPTIONS), **fixed}
    if task == "retrieval":
        options["top_k"] = CANDIDATES
    if task == "hashing":
        database = annotations.with_name(annotations.name.replace("test", "train", 1))
        count = len(json.loads(database.read_text(encoding="utf-8")))
        options |= {"database": [str(database)], "root": None, "top_k": count // CODES or 1}
    if task == "qa":
        options["answers"] = str(annotations.with_name("answers.json"))
    return kind.evaluate(model, tokenizer, examples, reading, argparse.Namespace(**options))


def _retrieval(found: dict[str, Any]) -> dict[str, Any]:
    ways = ("text_to_video", "video_to_text")
    return {
        "score": found["text_to_video"]["R1"],
        "chance": 100 / found["videos"],
        "contrastive": found["contrastive"]["text_to_video"]["R1"],
        "pictures": found["videos"],
        **{way: found[way] for way in ways},
    }


def _accuracy(*facts: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Accuracy beside that of the best constant answer, with some more facts."""

    def summary(found: dict[str, Any]) -> dict[str, Any]:
        rest = {name: found[name] for name in facts}
        return {"score": found["accuracy"], "chance": found["chance"], **rest}

    return summary


def _pointing(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "score": found["pointing"],
        "chance": found["pointing_chance"],
        "box": found["accuracy"],
        "references": found["references"],
    }


def _similarity(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("score", "chance", "pearson", "spearman", "pairs")}


def _hashing(found: dict[str, Any]) -> dict[str, Any]:
    rest = {name: found[name] for name in ("bits", "top_k", "queries", "database")}
    return {"score": found["map"], "chance": found["chance"], **rest}


SUMMARIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "retrieval": _retrieval,
    "qa": _accuracy("by_type", "questions", "answers"),
    "reasoning": _accuracy("by_class", "examples"),
    "entailment": _accuracy("by_class", "examples"),
    "grounding": _pointing,
    "text_similarity": _similarity,
    "hashing": _hashing,
}
"""By task: what `demo.json` says of what `evaluate_task` finds."""
PRETRAINED = {"retrieval": "match", "text_similarity": "match"}
"""Tasks without a stage of their own, and the stage whose model they take."""
SUFFIXES = {"text_similarity": "-similarity"}
"""Ends of the names of files that no stage learns from."""


def rows_of(tasks: Mapping[str, Any]) -> Rows:
    """Name, score and chance of all that is said of tasks, in percent."""
    found: Rows = []
    if one := tasks.get("retrieval"):
        found += [
            ("retrieval: R@1, text to picture", one["score"], one["chance"]),
            ("  before re-ranking", one["contrastive"], one["chance"]),
            ("  R@1, picture to text", one["video_to_text"]["R1"], one["chance"]),
        ]
    if one := tasks.get("qa"):
        found.append(("qa: questions answered rightly", one["score"], one["chance"]))
        found += [(f"  of {name}", x["accuracy"], None) for name, x in one["by_type"].items()]
    for name, what in (("reasoning", "statements judged rightly"), ("entailment", "rightly told")):
        if one := tasks.get(name):
            found.append((f"{name}: {what}", one["score"], one["chance"]))
    if one := tasks.get("grounding"):
        found.append(("grounding: points into the named box", one["score"], one["chance"]))
        found.append(("  the same of an untrained model", one["untrained"], None))
        found.append(("  box of the map", one["box"], None))
    if one := tasks.get("text_similarity"):
        found.append(("text_similarity: correlation", one["score"], one["chance"]))
    if one := tasks.get("hashing"):
        found.append((f"hashing: MAP@{one['top_k']}", one["score"], one["chance"]))
    return found


def render_demo(facts: dict[str, Any]) -> str:
    """The table that the demo ends with."""
    rows: list[tuple[str, ...]] = [("", "score", "chance")]
    for name, score, chance in rows_of(facts["tasks"]):
        rows.append((name, f"{score:.1f} %", "" if chance is None else f"{chance:.1f} %"))
    return "\n".join(
        [
            f"{facts['system']} of {facts['parameters']:,} parameters, on"
            f" {facts['corpus']['test_pictures']} held-out pictures of scenes never trained on",
            "",
            *format_rows(rows),
            "",
            f"All of it took {facts['seconds']['total'] / 60:.1f} minutes.",
        ]
    )

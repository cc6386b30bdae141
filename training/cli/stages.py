"""What demos have in common: a folder that is theirs, and stages that start from each other."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svitt_ops.training.data.paths import output_folder, write_text
from svitt_ops.training.data.text import save_tokenizer, train_tokenizer
from svitt_ops.training.engine.recipes import Recipe
from svitt_ops.training.engine.run import Trained, pretrain

MARKER = "demo.json"
SPLITS = ("train", "validation", "test")
TOKENIZER = "tokenizer"
VOCABULARY = 200  # pieces of the tokenizer at most, enough for every word to be one
OF_A_RUN = ("recipe.yaml", "final", "checkpoint-*", ".partial-*", "tensorboard", "skipped-*.tsv")
OF_FILMS = ("4f", "4f-match", "8f", "qa")
"""Stages of the demo on films."""
OF_PICTURES = (
    *("towers", "match", "qa", "assignment"),
    *("reasoning", "entailment", "grounding", "retrieval", "hashing"),
)
"""Stages of the demos on pictures."""
STAGES = tuple(dict.fromkeys((*OF_FILMS, *OF_PICTURES)))
KINDS = (
    *("", "-questions", "-reasoning", "-entailment", "-grounding"),
    *("-classes", "-similarity"),
)
"""Ends of the names of annotation files."""
OWN = (
    MARKER,
    "survivors.png",
    *(f"corpus/{name}" for name in ("answers.json", "detections.json", TOKENIZER)),
    *(f"corpus/{split}{kind}.json" for split in SPLITS for kind in KINDS),
    *(f"corpus/videos/{split}-*-*-{order}.mp4" for split in SPLITS for order in ("ab", "ba")),
    *(
        f"corpus/pictures/{split}-{'[0-9]' * 5}{crate}.{suffix}"
        for split in SPLITS
        for crate in ("", "-crate")
        for suffix in ("png", "jpg")
    ),
    *(f"{stage}/{name}" for stage in STAGES for name in OF_A_RUN),
)
"""What demos leave in their folder, and the next one removes."""


@dataclass
class Course:
    """How a demo went."""

    begun: float = field(default_factory=time.perf_counter)
    used: float = field(default_factory=time.process_time)
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each part."""
    loads: list[float] = field(default_factory=lambda: [os.getloadavg()[0]])
    """Of the machine, before the first part and after each stage of training."""

    @contextlib.contextmanager
    def part(self, name: str) -> Any:
        """Take the time of a part."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def train(self, recipes: Mapping[str, Recipe]) -> dict[str, Trained]:
        """Train stage after stage."""
        stages = {}
        for name, recipe in recipes.items():
            doing = "pretrain" if recipe.task == "pretrain" else "fine-tune"
            with self.part(name):
                stages[name] = pretrain(recipe, label=f"{doing} {Path(recipe.output).name}")
            self.loads.append(os.getloadavg()[0])
        return stages

    def facts(self) -> dict[str, Any]:
        """What `demo.json` says of it."""
        total = time.perf_counter() - self.begun
        return {
            "seconds": self.seconds | {"total": total},
            "core_seconds": time.process_time() - self.used,  # without those of other programs
            "load": sum(self.loads) / len(self.loads),
        }


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse what is the demo's to say."""
    for override in overrides:
        own = r"(output|seed|task|system)=|(init|tokenizer)\.|data\.(train|annotations)\b"
        if re.match(own, override):
            raise ValueError(
                "override: must leave output, seed, init and the corpus, task, system and tokenizer"
                f" to --output, --seed and the demo, got {override!r}"
            )


def prepare(output: Path, resume: bool) -> None:
    """Make the folder, without an earlier demo unless that is to be resumed."""
    marker = output / MARKER
    if output.is_dir() and any(output.iterdir()) and not marker.is_file():
        raise ValueError(
            f"--output: must be a new folder, or that of a demo, got {str(output)!r},"
            " which holds something that is no demo"
        )
    output_folder(output, "--output")
    if marker.is_file() and not resume:
        for path in [path for pattern in OWN for path in output.glob(pattern)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        for folder in ("corpus/videos", "corpus/pictures", "corpus", *STAGES):
            with contextlib.suppress(OSError):  # it holds something of the user's, or is not there
                (output / folder).rmdir()
    if not marker.is_file():
        write_text(marker, "{}\n")


def note(marker: Path, **wanted: Any) -> None:
    """Say in the marker what the demo is of; refuse to go on with one of something else."""
    facts = json.loads(marker.read_text(encoding="utf-8"))
    for name, value in wanted.items():
        if facts.setdefault(name, value) != value:
            raise ValueError(
                f"--resume: must be the demo's {name}, {facts[name]}, got {value};"
                " without --resume it begins anew"
            )
    write_text(marker, json.dumps(facts, indent=2) + "\n")


def write_tokenizer(corpus: Path, texts: Mapping[str, Iterable[str]]) -> None:
    """Train a tokenizer on what is said in some fields of some annotation files."""
    said: set[str] = set()
    for name, keys in texts.items():
        for entry in json.loads((corpus / f"{name}.json").read_text(encoding="utf-8")):
            for value in (entry[key] for key in keys):
                said.update([value] if isinstance(value, str) else value)
    save_tokenizer(train_tokenizer(said, VOCABULARY), corpus / TOKENIZER)

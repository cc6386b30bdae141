"""`svitt evaluate TASK`: the numbers of a trained model."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import svitt_ops
from svitt_ops.training.cli import MODEL, at_least, check_model
from svitt_ops.training.data.annotations import CAPTIONED
from svitt_ops.training.data.paths import input_file, input_folder, output_file, write_text
from svitt_ops.training.data.places import label
from svitt_ops.training.data.sources import find_source
from svitt_ops.training.engine.checkpoints import model_folder
from svitt_ops.training.engine.protocols import Protocol, load_protocol
from svitt_ops.training.engine.provenance import commit, hashes, weight_files
from svitt_ops.training.engine.recipes import Corpus, Data
from svitt_ops.training.engine.settings import run_values
from svitt_ops.training.engine.task import Evaluable, load_task, task_names

log = logging.getLogger(__name__)
SETTINGS = ("annotations", "root", "kind", "paragraph", "bf16")
OF_SOME_TASKS = {
    *("answer_length", "answers", "clips", "detections", "folds", "layer"),
    *("database", "ensemble", "join", "merge", "metric", "probe", "strided", "top_k"),
}
"""Options that are absent unless they were given."""
OF_ALL_TASKS = {"frames": None, "text_length": None, "resize": None, "paragraph": False}
"""Options that change numbers; the model's own, or the run's, where nothing is said."""
FILES = ("answers", "database", "detections")
"""Options that name a file, or several."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Options that change numbers."""

    values: dict[str, Any]
    sources: dict[str, str]
    """Of each value: an "option", the "protocol", the "run", or the "default"."""
    overridden: dict[str, Any]
    """What the protocol says where an option says otherwise."""


def choose(
    defaults: Mapping[str, Any],
    given: Mapping[str, Any],
    protocol: Protocol | None,
    run: Mapping[str, Any],
) -> Chosen:
    """An option that was given goes before the protocol, and this before the run."""
    ruled = protocol.values if protocol else {}
    values, sources = {}, {}
    for name, default in defaults.items():
        said = {"option": given.get(name), "protocol": ruled.get(name), "run": run.get(name)}
        source, value = next(
            ((source, value) for source, value in said.items() if value is not None),
            ("default", default),
        )
        values[name], sources[name] = value, source
    overridden = {
        name: ruled[name]
        for name, source in sources.items()
        if source == "option" and ruled.get(name) not in (None, values[name])
    }
    return Chosen(values=values, sources=sources, overridden=overridden)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the table, write the numbers; the exit status."""
    name = arguments.task.replace("-", "_")
    if name not in task_names():
        known = ", ".join(task_names()).replace("_", "-")
        raise ValueError(f"TASK must be one of {known}, got {arguments.task!r}")
    at_least(arguments, frames=1, text_length=1, clips=1, top_k=0, batch_size=1, workers=0)
    at_least(arguments, answer_length=2, folds=1, layer=0)
    if arguments.kind == "image":
        for option, one in (("probe", False), ("clips", 1)):
            if getattr(arguments, option, one) != one:
                raise ValueError(f"--{option}: needs videos, got --kind image")
    source = model_folder(arguments.model, MODEL)

    from svitt_ops.models.systems import load_system, system_names
    from svitt_ops.training.engine.build import read_corpora
    from svitt_ops.training.engine.loading import load_for_use

    task = load_task(name, Evaluable)
    for option in sorted(OF_SOME_TASKS & vars(arguments).keys() - task.OPTIONS.keys()):
        raise ValueError(f"--{option.replace('_', '-')}: is no option of {arguments.task}")
    protocol = load_protocol(arguments.protocol) if arguments.protocol else None
    if protocol is not None and protocol.task != name:
        raise ValueError(f"--protocol: {protocol.name} is of {protocol.task}, got {arguments.task}")
    systems = [load_system(system) for system in system_names()]
    kinds = [system.config.model_type for system in systems if task.HEAD in system.models]
    check_model(arguments.model, *kinds)
    named: dict[str, Path] = {}
    for path in arguments.annotations:
        read = find_source(path, "--annotations")
        named |= {path if read.kind == "file" else str(file): file for file in read.files}
    if arguments.root is not None:
        input_folder(arguments.root, "--root")
    numbers = None if arguments.json is None else output_file(arguments.json, "--json")
    found = run_values(source, task.OPTIONS)
    chosen = choose({**OF_ALL_TASKS, **task.OPTIONS}, vars(arguments), protocol, found)
    if arguments.kind == "image" and "clips" in task.OPTIONS:  # which have one, whatever is said
        chosen.values["clips"], chosen.sources["clips"] = 1, "default"
    vars(arguments).update(chosen.values)
    for option in FILES:
        paths = getattr(arguments, option, None) or []
        for path in [paths] if isinstance(paths, str) else paths:
            named[path] = input_file(path, f"--{option}")
    weights = weight_files(source)
    if (second := getattr(arguments, "ensemble", None)) is not None:
        others = weight_files(model_folder(second, "--ensemble: must be the folder of a model"))
        weights |= {f"{second}/{name}": path for name, path in others.items()}

    model, tokenizer, reading, folder = load_for_use(
        arguments.model,
        head=task.HEAD,
        frames=arguments.frames,
        text_length=arguments.text_length,
        resize=arguments.resize,
    )
    if torch.cuda.is_available() and not arguments.cpu:
        model = model.to("cuda")
    corpora = [
        Corpus(
            annotations=path,
            root=arguments.root,
            kind=arguments.kind,
            captions="join" if arguments.paragraph else "each",
        )
        for path in arguments.annotations
    ]
    left_out: list[str] = []
    form = getattr(task, "FORM", CAPTIONED)
    examples = read_corpora(corpora, Data(), "test", form, left_out)
    count = len(examples) + len(left_out)
    facts = task.evaluate(model, tokenizer, examples, reading, arguments)
    print(task.render(facts))
    first = facts.get("normal", facts)
    left_out += first.get("left_out", [])
    if left_out:
        print(f"{len(left_out)} of {count} entries left out, the first: {left_out[0]}")
    for option, value in chosen.overridden.items():
        print(f"not as {arguments.protocol}: {option} {chosen.values[option]}, there {value}")
    if numbers is None:
        return 0
    for found in (facts, *facts.values()):
        if isinstance(found, dict) and "skipped" in found:
            found["skipped"] = {label(name): why for name, why in found["skipped"].items()}
    facts["left_out"] = left_out
    facts["settings"] = {
        "task": name,
        "model": str(folder),
        "frames": model.config.num_frames,
        "text_length": reading.text_length,
        "short_side": reading.short_side,
        "resize": reading.resize,
        "test_sampling": reading.test_sampling,
        **{option: getattr(arguments, option) for option in (*SETTINGS, *task.OPTIONS)},
        "protocol": arguments.protocol,
        "sources": _sources(chosen),
        "overridden": chosen.overridden,
        "entries": count,
        "files": hashes(named),
        "weights": hashes(weights),
        "version": svitt_ops.__version__,
        "commit": commit(),
    }
    write_text(numbers, json.dumps(facts, indent=2) + "\n")
    return 0


def _sources(chosen: Chosen) -> dict[str, str]:
    """Where values are from; what is neither told nor ruled is the model's, or the run's."""
    own = ("frames", "text_length", "resize")
    return {
        name: "run" if source == "default" and name in own else source
        for name, source in chosen.sources.items()
    }

"""`svitt evaluate TASK`: the numbers of a trained model."""

from __future__ import annotations

import argparse
import json

import torch

from svitt_ops.models.systems import load_system, system_names
from svitt_ops.training.cli import at_least, check_model
from svitt_ops.training.data.paths import input_file, input_folder, output_file, write_text
from svitt_ops.training.engine.build import read_corpora
from svitt_ops.training.engine.loading import load_for_use
from svitt_ops.training.engine.recipes import Corpus, Data
from svitt_ops.training.engine.task import Evaluable, load_task

SETTINGS = ("annotations", "root", "kind", "paragraph", "bf16")
OF_SOME_TASKS = {"clips", "merge", "probe", "strided", "top_k"}
"""Options that are absent unless they were given."""


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the table, write the numbers; the exit status."""
    task = load_task(arguments.task.replace("-", "_"), Evaluable)
    at_least(arguments, frames=1, text_length=1, clips=1, top_k=0, batch_size=1, workers=0)
    for name in OF_SOME_TASKS & vars(arguments).keys() - task.OPTIONS.keys():
        raise ValueError(f"--{name.replace('_', '-')}: is no option of {arguments.task}")
    for name, value in task.OPTIONS.items():
        vars(arguments).setdefault(name, value)
    if arguments.kind == "image":
        for name, one in (("probe", False), ("clips", 1)):
            if getattr(arguments, name, one) != one:
                raise ValueError(f"--{name}: needs videos, got --kind image")
    # Every path, before the first file is opened.
    systems = [load_system(name) for name in system_names()]
    kinds = [system.config.model_type for system in systems if task.HEAD in system.models]
    check_model(arguments.model, *kinds)
    for path in arguments.annotations:
        input_file(path, "--annotations")
    if arguments.root is not None:
        input_folder(arguments.root, "--root")
    numbers = None if arguments.json is None else output_file(arguments.json, "--json")

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
    examples = read_corpora(corpora, Data(), "test")
    facts = task.evaluate(model, tokenizer, examples, reading, arguments)
    print(task.render(facts))
    if numbers is not None:
        facts["settings"] = {
            "model": str(folder),
            "frames": model.config.num_frames,
            "text_length": reading.text_length,
            "short_side": reading.short_side,
            "resize": reading.resize,
            **{name: getattr(arguments, name) for name in (*SETTINGS, *task.OPTIONS)},
        }
        write_text(numbers, json.dumps(facts, indent=2) + "\n")
    return 0

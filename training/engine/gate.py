"""What a run needs, looked at before the first file of its data is opened."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import yaml  # a dependency of omegaconf
from omegaconf import OmegaConf

from svitt_ops.models.systems import load_system
from svitt_ops.training.data.annotations import Entry
from svitt_ops.training.data.paths import expand, input_file, input_folder
from svitt_ops.training.data.places import is_there, label
from svitt_ops.training.data.sources import find_source
from svitt_ops.training.data.text import load_tokenizer
from svitt_ops.training.engine.checkpoints import RECIPE, last_checkpoint, model_folder
from svitt_ops.training.engine.folders import check_folder
from svitt_ops.training.engine.recipe_checks import check_config, check_values
from svitt_ops.training.engine.recipes import CORPORA, PATH, Corpus, Recipe, map_paths

log = logging.getLogger(__name__)
LOOKED_FOR = 1000
"""Entries of which one file at least must be there."""


def check_run(recipe: Recipe) -> Recipe:
    """The recipe with whole paths, once everything that it names was found to be there.

    Raises:
        ValueError: names the first key whose value cannot be, what it must be and what it was.
    """
    recipe = copy.deepcopy(recipe)
    check_values(recipe)
    map_paths(recipe, _whole)
    last = last_checkpoint(Path(recipe.output))
    if last:
        _check_output(recipe, last[1])
    if last and recipe.optimizer.steps and last[0] >= recipe.optimizer.steps:
        return recipe  # it is complete, and needs nothing any more
    _check_data(recipe)
    _check_init(recipe)
    if last is None:  # or the tokenizer is that of the checkpoint
        _check_tokenizer(recipe)
    return recipe


def _check_output(recipe: Recipe, checkpoint: Path) -> None:
    """Refuse to go on with the run of another system or task."""
    stored = OmegaConf.create({"system": Recipe.system, "task": Recipe.task})
    with contextlib.suppress(yaml.YAMLError, ValueError, OSError):  # `report_changes` says it
        stored.merge_with(OmegaConf.load(checkpoint / RECIPE))
    for key in ("system", "task"):
        if stored[key] != getattr(recipe, key):
            raise ValueError(
                f"recipe: {key} must be {stored[key]!r}, as that of the run in {recipe.output},"
                f" got {getattr(recipe, key)!r}; another output begins another run"
            )


def check_media(entries: Sequence[Entry], name: str) -> None:
    """Refuse a corpus none of whose files is there, as after a mistake in `root`."""
    paths = [path for entry in entries[:LOOKED_FOR] for path in entry.media]
    if paths and not any(map(is_there, paths)):
        those = "none of its files" if len(entries) <= LOOKED_FOR else "none of its first files"
        first = label(paths[0])
        raise ValueError(f"{name}: must be the folder of the files, {those} is there: {first!r}")


def check_batches(entries: Sequence[Entry], batch_size: int) -> None:
    """Say how many pairs are never trained on; refuse a batch that no kind of pairs fills."""
    pairs: Counter[str] = Counter()
    for entry in entries:
        pairs[entry.kind] += len(entry.media)
    small = {kind: count for kind, count in pairs.items() if count < batch_size}
    if len(small) == len(pairs):
        counts = " and ".join(f"{count} {kind} pairs" for kind, count in pairs.items())
        apart = ", which come in batches of their own" if len(pairs) > 1 else ""
        raise ValueError(
            f"recipe: optimizer.batch_size: must not exceed the pairs of the corpus, got"
            f" {batch_size} for {counts}{apart}"
        )
    for kind, count in small.items():
        log.warning(
            "the %d %s pairs fill no batch of %d, and are never trained on:"
            " a smaller optimizer.batch_size uses them",
            count,
            kind,
            batch_size,
        )


def _whole(key: str, path: str) -> str:
    """A path that means the same from every working folder; names of downloads stay."""
    expanded = expand(path, f"recipe: {key}")
    if key.startswith(("init.", "tokenizer.")) and not expanded.exists():
        return path
    return os.path.abspath(expanded)


def _check_data(recipe: Recipe) -> None:
    if not recipe.data.train:
        raise ValueError("recipe: data.train must list at least one corpus")
    for key in CORPORA:
        for number, corpus in enumerate(getattr(recipe.data, key)):
            _check_corpus(f"recipe: data.{key}.{number}", corpus, getattr(recipe.data, key))
    for entry in fields(recipe.data):
        path = getattr(recipe.data, entry.name)
        if entry.metadata == PATH and path is not None:
            input_file(path, f"recipe: data.{entry.name}")


def _check_corpus(key: str, corpus: Corpus, listed: Sequence[Corpus]) -> None:
    try:
        find_source(corpus.annotations, f"{key}.annotations")
    except ValueError as error:
        if len(listed) == 1:
            raise
        alone = "data.annotations=FILE data.root=FOLDER trains on one corpus alone"
        raise ValueError(f"{error}; {alone}") from None
    if corpus.root is not None:
        input_folder(corpus.root, f"{key}.root")


def _check_init(recipe: Recipe) -> None:
    init = recipe.init
    sources, unread = load_system(recipe.system).sources, []
    if init.checkpoint is not None:
        _check_checkpoint(recipe, Path(init.checkpoint))
    for kind, folder in vars(init).items():
        if folder is None or kind == "checkpoint":
            continue
        is_file = kind in sources and sources[kind].is_file
        if init.checkpoint is not None and not is_file:
            unread.append(f"init.{kind}")
            continue
        if kind not in sources:
            raise ValueError(
                f"recipe: init.{kind} must be null, {recipe.system} does not start from such"
                f" weights, got {folder!r}"
            )
        if is_file:
            input_file(folder, f"recipe: init.{kind}")
            continue
        if sources[kind].takes_files and Path(folder).is_file():
            continue
        advice = f"get it by: hf download {sources[kind].released} --local-dir {folder}"
        check_folder(f"recipe: init.{kind}", folder, (kind, *sources[kind].types), advice)
    if unread:
        log.warning("%s not read: init.checkpoint has all weights", " and ".join(unread))


def _check_checkpoint(recipe: Recipe, start: Path) -> None:
    key = "recipe: init.checkpoint"
    system = load_system(recipe.system)
    if start.is_file() and system.load_official is None:
        raise ValueError(
            f"{key}: must be the folder of a model or of a run, {recipe.system} has no official"
            f" files, got {str(start)!r}"
        )
    if start.is_file():
        return
    folder = model_folder(start, f"{key}: must be the folder of a model or of a run, or a file")
    config = system.config
    check_folder(key, folder, (config.model_type,))
    check_config(recipe, config.from_pretrained(folder))


def _check_tokenizer(recipe: Recipe) -> None:
    wanted, init = recipe.tokenizer, recipe.init
    if wanted.name:
        load_tokenizer(wanted.name)
    elif not wanted.train_vocab_size:
        started = init.checkpoint is not None and Path(init.checkpoint).is_dir()
        if not started and not (init.bert or init.roberta):
            raise ValueError("recipe: tokenizer needs a name or a train_vocab_size")

"""From a recipe to its parts: entries, tokenizer, model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from svitt_ops.models.systems import load_system
from svitt_ops.training.data.annotations import (
    CAPTIONED,
    Entry,
    Example,
    Form,
    read_annotations,
)
from svitt_ops.training.data.processor import VideoTextProcessor
from svitt_ops.training.data.text import append_sep, load_tokenizer, train_tokenizer
from svitt_ops.training.engine.checkpoints import model_folder
from svitt_ops.training.engine.gate import check_media
from svitt_ops.training.engine.recipe_checks import check_model_keys
from svitt_ops.training.engine.recipes import CORPORA, Corpus, Data, Recipe

log = logging.getLogger(__name__)
SHOWN_PROBLEMS = 5


def read_corpora(
    corpora: Sequence[Corpus],
    data: Data,
    name: str,
    form: Form[Example] = CAPTIONED,
    problems: list[str] | None = None,
) -> list[Example]:
    """The entries of all corpora; unusable ones are counted and reported.

    Args:
        corpora: where they are.
        data: how they are read.
        name: the key of `data` that lists the corpora; or what they are, if it is none.
        form: what the entries hold.
        problems: gets why entries were left out.
    """
    if not corpora:
        raise ValueError(f"recipe: data.{name} must list at least one corpus")
    entries: list[Example] = []
    for number, corpus in enumerate(corpora):
        read = read_annotations(
            corpus.annotations,
            root=corpus.root,
            kind="image" if corpus.kind == "image" else "video",
            captions="join" if corpus.captions == "join" else "each",
            keep_together=data.keep_together if name == "train" else None,
            max_words=data.max_words,
            form=form,
            columns=corpus.columns,
            fps=corpus.fps,
        )
        root = f"recipe: data.{name}.{number}.root" if name in CORPORA else "--root"
        check_media(read.entries, root)
        entries += read.entries
        count = len(read.problems) + len(read.entries)
        report_left_out(read.problems, count, corpus.annotations)
        if problems is not None:
            problems += read.problems
    return entries


def report_left_out(problems: Sequence[str], count: int, where: str) -> None:
    """Name the first entries that are left out, and say how many of all they are."""
    for problem in problems[:SHOWN_PROBLEMS]:
        log.warning("left out: %s", problem)
    if problems:
        log.warning("%s: %d of %d entries left out", where, len(problems), count)


def build_tokenizer(recipe: Recipe, entries: Sequence[Entry]) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, train it, or take that of the weights it starts from.

    Texts for an official file end as its authors' do, unless the recipe says otherwise.
    """
    tokenizer, append = _find_tokenizer(recipe, entries), recipe.tokenizer.append_sep
    if append is None and recipe.init.checkpoint and Path(recipe.init.checkpoint).is_file():
        append = load_system(recipe.system).official_sep
    return tokenizer if append is None else append_sep(tokenizer, append)


def _find_tokenizer(recipe: Recipe, entries: Sequence[Entry]) -> PreTrainedTokenizerBase:
    wanted = recipe.tokenizer
    if wanted.train_vocab_size:
        captions = [caption for entry in entries for caption in entry.captions]
        return train_tokenizer(captions, wanted.train_vocab_size)
    if wanted.name:
        return load_tokenizer(wanted.name)
    start = recipe.init.checkpoint
    if start and Path(start).is_dir():
        return load_tokenizer(model_folder(start), "init.checkpoint")
    for key in ("bert", "roberta"):
        if folder := getattr(recipe.init, key):
            return load_tokenizer(folder, f"init.{key}")
    raise ValueError("recipe: tokenizer needs a name or a train_vocab_size")


def build_processor(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any
) -> VideoTextProcessor:
    """What makes inputs of the run's model, as its evaluation does."""
    data = recipe.data
    return VideoTextProcessor(
        tokenizer,
        size=config.image_size,
        num_frames=config.num_frames,
        sampling=data.test_sampling,
        text_length=data.text_length,
        short_side=None if data.resize == "official" else data.short_side,
        resize=data.resize,
        max_words=data.max_words,
    )


def build_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    head: str = "pretraining",
    fields: Mapping[str, Any] | None = None,
) -> Any:
    """The system's model for a head, from the weights that the recipe starts from.

    Frames of an earlier stage are expanded to those of this one, and bias of another resolution is
    interpolated.

    Args:
        recipe: of the run.
        tokenizer: of the texts.
        head: a key of `System.models`.
        fields: of the configuration that the task's data say, besides those of the recipe.
    """
    model = _start_model(recipe, tokenizer, head, fields or {})
    for key, source in load_system(recipe.system).sources.items():
        path = getattr(recipe.init, key)
        if path is not None and (source.is_file or recipe.init.checkpoint is None):
            with _named(f"init.{key}"):
                source.load(model, path)
    return model


def _start_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, head: str, fields: Mapping[str, Any]
) -> Any:
    """The same without what `init` names besides a checkpoint."""
    from svitt_ops.models.parts.expansion import expand_frames

    system, changes = load_system(recipe.system), {**recipe.model, **fields}
    check_model_keys(recipe)
    text: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    start = recipe.init.checkpoint
    if start is None:
        return system.models[head](system.config(**changes, **text))
    if Path(start).is_file():
        config: Any = system.config(**changes, **text)
        with _named("init.checkpoint"):
            assert system.load_official is not None  # `gate.check_run`
            model = system.load_official(start, config, task=head)
        # A head that is missing there starts from random weights, to be trained.
        model.config.loss_weights = config.loss_weights
        frames = changes.get("num_frames", model.config.num_frames)
        return model if frames == model.config.num_frames else expand_frames(model, frames)
    with _named("init.checkpoint"):
        folder = model_folder(start)
        config = system.config.from_pretrained(folder)
    if config.vocab_size != len(tokenizer):
        raise ValueError(
            f"recipe: the tokenizer must have the {config.vocab_size} pieces of"
            f" init.checkpoint, got {len(tokenizer)}"
        )
    for key, value in changes.items():
        setattr(config, key, value)
    config.check()
    refuse_other_shapes(config, folder)
    with _named("init.checkpoint"):
        model = system.models[head].from_pretrained(folder, config=config)
    return model


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Name the recipe's key in the error about what it says."""
    try:
        yield
    except (ValueError, OSError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"recipe: {key}: {line}") from error


def refuse_other_shapes(config: Any, folder: Path, *, also: Sequence[str] = ()) -> None:
    """Raise a ValueError that names the key by which a folder's weights do not fit a model.

    Args:
        config: of the model.
        folder: with the weights and their configuration.
        also: fields that weights can be resized in, but are not here.
    """
    from svitt_ops.models.parts.loading import fixed_fields, in_short

    stored = type(config).from_pretrained(folder)
    for key in (*fixed_fields(stored, config), *also):
        before, after = getattr(stored, key), getattr(config, key)
        if before != after:
            raise ValueError(
                f"recipe: model.{key} must be {in_short(before)!r} as in the weights of {folder},"
                f" got {in_short(after)!r}"
            )

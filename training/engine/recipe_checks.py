"""Which values a recipe may have, key by key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from functools import reduce
from math import inf
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from svitt_ops.models.systems import load_system, system_names
from svitt_ops.training.data import RESIZES, STRONGEST, TEST_SAMPLINGS
from svitt_ops.training.data.paths import expand
from svitt_ops.training.engine.recipes import CORPORA, Data, Recipe, map_paths
from svitt_ops.training.engine.task import Trainable, Validated, load_task

SHORTEST_TEXT = 3  # [CLS], one piece, [SEP]
SMALLEST_VOCABULARY = 6  # BERT's five special pieces, and one
# Of the shape of the weights, or of the tokenizer: not to be changed for loaded weights.
OWN_KEYS = ("vocab_size", "pad_token_id")

Rule = tuple[str, Callable[[Any], bool]]
POSITIVE: Rule = ("positive and finite", lambda x: 0 < x < inf)
NOT_NEGATIVE: Rule = ("at least 0 and finite", lambda x: 0 <= x < inf)
SHARE: Rule = ("0 to 1", lambda x: 0 <= x <= 1)


def _least(number: int) -> Rule:
    return f"at least {number}", lambda x: x >= number


def _one_of(*choices: object) -> Rule:
    return f"one of {', '.join(map(str, choices))}", lambda x: x in choices


RULES: dict[str, Rule] = {
    "seed": ("0 to 2^32 - 1", lambda x: 0 <= x < 2**32),
    "tokenizer.train_vocab_size": _least(SMALLEST_VOCABULARY),
    "data.sampling": ("rand, middle or fpsX with a positive X", lambda mode: _is_sampling(mode)),
    "data.test_sampling": _one_of(*TEST_SAMPLINGS),
    "data.short_side": _least(1),
    "data.text_length": _least(SHORTEST_TEXT),
    "data.pad_to": _one_of("longest", "max"),
    "data.max_words": _least(1),
    "data.crop_scale": ("0 < low <= high <= 1", lambda x: 0 < x[0] <= x[1] <= 1),
    "data.rand_augment": (
        f"how many changes, 1 or more, and their strength, 0 to {STRONGEST}",
        lambda x: x[0] >= 1 and 0 <= x[1] <= STRONGEST,
    ),
    "data.resize": _one_of(*RESIZES),
    "data.positives": _one_of("video", "caption"),
    "data.workers": _least(0),
    "optimizer.lr": POSITIVE,
    "optimizer.bias_lr_scale": POSITIVE,
    "optimizer.lr_scales": (
        "a mapping of beginnings of names to positive numbers",
        lambda x: all(name and 0 < scale < inf for name, scale in x.items()),
    ),
    "optimizer.decay": _one_of("cosine", "linear", "step"),
    "optimizer.drop": POSITIVE,
    "optimizer.drop_at": ("a list of shares, 0 to 1", lambda x: all(0 <= s <= 1 for s in x)),
    "optimizer.min_lr_ratio": SHARE,
    "optimizer.betas": ("two numbers of 0 to less than 1", lambda x: all(0 <= b < 1 for b in x)),
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.epochs": POSITIVE,
    "optimizer.steps": _least(1),
    "optimizer.warmup_epochs": NOT_NEGATIVE,
    "optimizer.warmup_steps": _least(0),
    "optimizer.batch_size": _least(1),
    "optimizer.accumulation": _least(1),
    "optimizer.max_grad_norm": NOT_NEGATIVE,
    "optimizer.mask_probability": SHARE,
    "run.precision": _one_of("bf16", "fp32"),
    "run.save_steps": _least(1),
    "run.evaluate_steps": _least(1),
    "run.keep_checkpoints": _least(0),
    "run.log_steps": _least(1),
    "run.device": _one_of("cpu", "cuda"),
}
"""What a value must be; one that may be missing, and is, is not asked."""
OF_A_CORPUS: dict[str, Rule] = {
    "kind": _one_of("video", "image"),
    "captions": _one_of("each", "join"),
    "columns": (
        "a mapping of fields to what they are called there",
        lambda x: all(name and theirs for name, theirs in x.items()),
    ),
    "fps": POSITIVE,
}


def check_form(kind: Any, value: Any, where: str, key: str = "") -> None:
    """Raise a ValueError that names the first value that is no mapping, list or pair, but must be.

    Args:
        kind: the type that the value stands for, a section of a recipe or the type of its field.
        value: as YAML has it.
        where: what the message begins with.
        key: of the value.
    """
    if isinstance(kind, UnionType):  # with None
        if value is None:
            return
        kind = get_args(kind)[0]
    words, form = "", cast(Any, get_origin(kind) or kind)
    if isinstance(value, str) and "${" in value:  # not known before it is filled in
        return
    if is_dataclass(kind) or form is dict:
        section = f" of {form.__name__}" if is_dataclass(kind) else ""
        words = "" if isinstance(value, dict) else f"a mapping of keys{section}"
    elif form is list:
        words = "" if isinstance(value, list) else "a list"
    elif form is tuple:
        pair = isinstance(value, list) and len(value) == 2
        words = "" if pair and all(map(_is_number, value)) else "a list of two numbers"
    if words:
        raise ValueError(f"{where}{key} must be {words}, got {value!r}")
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        for name, inner in value.items():
            check_form(kinds.get(name), inner, where, f"{key}.{name}" if key else str(name))
    elif form is list:
        for number, inner in enumerate(value):
            check_form(get_args(kind)[0], inner, where, f"{key}.{number}")


def check_values(recipe: Recipe) -> None:
    """Raise a ValueError that names the first key whose value cannot be."""
    system, task = _named(load_system, recipe.system), _named(load_task, recipe.task, Trainable)
    if task.HEAD not in system.models:
        known = [name for name in system_names() if task.HEAD in load_system(name).models]
        raise ValueError(
            f"recipe: system must be one of {', '.join(known)}, which have a model for"
            f" {task.HEAD}, got {recipe.system!r}"
        )
    for key, rule in RULES.items():
        _check(key, reduce(getattr, key.split("."), recipe), rule)
    for key in CORPORA:
        for number, corpus in enumerate(getattr(recipe.data, key)):
            for name, rule in OF_A_CORPUS.items():
                _check(f"data.{key}.{number}.{name}", getattr(corpus, name), rule)
    if recipe.data.validation and not isinstance(task, Validated):
        raise ValueError(
            f"recipe: data.validation must be empty, {recipe.task} is not evaluated as it is"
            f" trained, got {len(recipe.data.validation)} corpora"
        )
    map_paths(recipe, _path)
    optimizer, data = recipe.optimizer, recipe.data
    if optimizer.batch_size % optimizer.accumulation:
        raise ValueError(
            f"recipe: optimizer.batch_size must be a multiple of optimizer.accumulation"
            f" ({optimizer.accumulation}), got {optimizer.batch_size}"
        )
    if data.cache and data.sampling.startswith("fps"):
        raise ValueError(
            f"recipe: data.sampling must be rand or middle with data.cache, which keeps no times,"
            f" got {data.sampling!r}"
        )
    if recipe.tokenizer.name and recipe.tokenizer.train_vocab_size:
        raise ValueError("recipe: tokenizer takes a name or a train_vocab_size, got both")
    _check_trainer(recipe.run.trainer)
    _check_reports(recipe.run.report_to)
    if recipe.model or recipe.data.text_length > Data().text_length:
        check_model_keys(recipe)
        if recipe.init.checkpoint is None:  # or its configuration is the base
            check_config(recipe, system.config())
    if check := getattr(task, "check", None):
        check(recipe)


def check_model_keys(recipe: Recipe) -> None:
    """Raise a ValueError that names a key of the model that is none, or is not the recipe's."""
    from transformers import PreTrainedConfig

    general = PreTrainedConfig().to_dict()  # of no meaning here, such as id2label
    known = [name for name in load_system(recipe.system).config().to_dict() if name not in general]
    for name in recipe.model:
        if name not in known:
            raise ValueError(f"recipe: model has no key {name!r}; {unknown_key(name, known)}")
        if name in OWN_KEYS:
            raise ValueError(f"recipe: model.{name} is the tokenizer's, and not to be set")


def check_config(recipe: Recipe, config: Any) -> None:
    """Raise a ValueError where the recipe's model cannot be, as a change of `config`."""
    for key, value in recipe.model.items():
        setattr(config, key, value)
    try:
        config.check()
    except (TypeError, ValueError) as error:
        message = str(error).removeprefix(f"{type(config).__name__}: ")
        raise ValueError(f"recipe: model.{message}") from error
    longest = config.max_position_embeddings
    if recipe.data.text_length > longest:
        raise ValueError(
            f"recipe: data.text_length must be at most model.max_position_embeddings ({longest}),"
            f" got {recipe.data.text_length}"
        )


def unknown_key(name: str, known: Sequence[str]) -> str:
    """What to say of a key that is not known: one that was perhaps meant, or all."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"


def _check(key: str, value: Any, rule: Rule) -> None:
    words, holds = rule
    if value is not None and not holds(value):
        raise ValueError(f"recipe: {key} must be {words}, got {value!r}")


def _named(load: Callable[..., Any], *name: Any) -> Any:
    try:
        return load(*name)
    except ValueError as error:
        raise ValueError(f"recipe: {error}") from None


def _path(key: str, path: str) -> str:
    expanded = str(expand(path, f"recipe: {key}"))
    if not expanded.isascii() and any("\ud800" <= letter <= "\udfff" for letter in expanded):
        raise ValueError(f"recipe: {key} must be UTF-8, as the recipe itself, got {path!r}")
    return expanded


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return isinstance(value, str) and "${" in value
    return not isinstance(value, bool)


def _is_sampling(mode: str) -> bool:
    rate = re.fullmatch(r"fps(\d+(?:\.\d+)?)", mode)
    return mode in ("rand", "middle") or (rate is not None and 0 < float(rate[1]) < inf)


def _check_reports(names: list[str]) -> None:
    if not names:
        return
    from transformers.integrations import integration_utils

    known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
    for name in names:
        if name not in known:
            raise ValueError(f"recipe: run.report_to must be of {', '.join(known)}, got {name!r}")
        if name not in integration_utils.get_available_reporting_integrations():
            raise ValueError(f"recipe: run.report_to has {name!r}, whose package is not installed")


def _check_trainer(options: dict[str, Any]) -> None:
    if not options:
        return
    from dataclasses import fields

    from transformers import TrainingArguments

    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    known = [*defaults]
    for name, value in options.items():
        if name in defaults and isinstance(defaults[name], int | float):
            wanted = bool if isinstance(defaults[name], bool) else (int, float)
            if isinstance(value, bool) != (wanted is bool) or not isinstance(value, wanted):
                kind = "true or false" if wanted is bool else "a number"
                raise ValueError(f"recipe: run.trainer.{name} must be {kind}, got {value!r}")
        if name == "fp16" and value:
            raise ValueError("recipe: run.trainer.fp16 is not supported; set run.precision=bf16")
        if name == "gradient_accumulation_steps":
            raise ValueError(f"recipe: run.trainer.{name} must be set by optimizer.accumulation")
        if name not in defaults:
            raise ValueError(
                f"recipe: run.trainer has {name!r}, no TrainingArguments has;"
                f" {unknown_key(name, known)}"
            )

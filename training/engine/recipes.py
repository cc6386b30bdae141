"""Recipes: what a run is made of, as YAML files with overrides, checked key by key.

Paths may begin with `~`, may hold `${oc.env:NAME}`, and are relative to the working folder. An
override gives a path as it is, whatever YAML would make of it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svitt_ops.training.data.paths import expand
from svitt_ops.training.data.rows import HUB

PATH = {"path": True}
"""Metadata of a key that holds a path; those of `init` and `tokenizer` may name downloads too."""
PAIRS = ("data.crop_scale.", "data.rand_augment.", "optimizer.betas.")
CORPORA = ("train", "validation")
"""Keys of `data` that list corpora."""


@dataclass
class Corpus:
    """What is learned from: media, and what is said of them."""

    annotations: str = field(default=MISSING, metadata=PATH)
    """File of {video or image, caption}, tar shards or a dataset: `sources.find_source`."""
    root: str | None = field(default=None, metadata=PATH)
    """Folder of the media; default: that of the annotations."""
    kind: str = "video"
    """"video" or "image"."""
    captions: str = "each"
    """What a list of captions means: "each" a text of its own, or "join" to a paragraph."""
    columns: dict[str, str] = field(default_factory=dict)
    """Fields, and what they are called there, such as {video: clip, caption: text}."""
    fps: float | None = None
    """Frames a second of folders of frames whose entries do not say it in a field `fps`."""


@dataclass
class Init:
    """Where the weights start; nothing set: from random ones."""

    checkpoint: str | None = field(default=None, metadata=PATH)
    """Folder of an earlier run (its frames are expanded to this run's), or an official file."""
    beit: str | None = field(default=None, metadata=PATH)
    """Folder, or name of a downloaded Hugging Face BEiT, for the video tower."""
    resnet: str | None = field(default=None, metadata=PATH)
    """Folder, or name of a downloaded Hugging Face ResNet, for COOKIE's; or a file of
    torchvision's names, as ResNeXt's weights are released."""
    vit: str | None = field(default=None, metadata=PATH)
    """Folder, or name of a downloaded Hugging Face ViT or DeiT, for an image tower of ALBEF's."""
    bert: str | None = field(default=None, metadata=PATH)
    """Folder, or name of a downloaded Hugging Face BERT, for the text tower."""
    clip: str | None = field(default=None, metadata=PATH)
    """Folder, or name of a downloaded Hugging Face CLIP, for SCL's image tower."""
    roberta: str | None = field(default=None, metadata=PATH)
    """Folder, or name of a downloaded Hugging Face RoBERTa, for SCL's text tower."""
    dalle: str | None = field(default=None, metadata=PATH)
    """File with the state dict of DALL-E's encoder, as SIMLA's tokenizer of patches while it is
    pretrained; also besides `checkpoint`, which has none. Default: a small one, untrained."""


@dataclass
class TokenizerRecipe:
    """A name or a size; neither: the tokenizer of what `init` names."""

    name: str | None = field(default=None, metadata=PATH)
    """Folder, or name of a downloaded Hugging Face tokenizer."""
    train_vocab_size: int | None = None
    """Train WordPiece on the captions, with at most so many pieces."""
    append_sep: bool | None = None
    """Whether texts end with [SEP]; default: as the tokenizer has it, and as its authors' texts did
    where `init.checkpoint` is an official file."""


@dataclass
class Data:
    """What is read, and how a clip is made."""

    train: list[Corpus] = field(default_factory=list)
    validation: list[Corpus] = field(default_factory=list)
    """What the model is evaluated on while it is trained; its best weights are kept."""
    sampling: str = "rand"
    """Frames of a training clip: "rand", "middle" or "fpsX"."""
    test_sampling: str = "middle"
    """Frames of a clip in evaluation: "middle" of equal chunks, or "ends", from the first frame to
    the last."""
    official_sampling: bool = False
    """Draw "rand" as the released SViTT does, which never takes the last frame of a chunk."""
    short_side: int | None = 256
    """Frames are scaled down to this as they are decoded."""
    text_length: int = 32
    """Tokens of the longest text; longer ones are cut."""
    pad_to: str = "longest"
    """"longest" text of the batch, or "max": always `text_length`."""
    max_words: int | None = None
    """Where captions are cut."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Share of the picture that a random crop keeps."""
    flip: bool = True
    """Mirror half of the clips; never one whose caption speaks of left, right or clockwise."""
    rand_augment: tuple[int, int] | None = None
    """How many changes RandAugment makes to a clip, and their strength, 0 to 10; see
    `data/rand_augment.py`. Default: none."""
    resize: str = "antialias"
    """How pictures are made smaller: "antialias", or "official": as the released SViTT does,
    bicubic without antialiasing, rounded to whole numbers, from frames decoded at full size."""
    positives: str = "video"
    """Pairs with the same "video" or "caption" are positives of each other."""
    keep_together: str | None = None
    """Annotation field: pairs with an equal value share a batch."""
    cache: bool = False
    """Keep every decoded video in memory."""
    workers: int = 4
    """Processes that read ahead, for each training process; 0: none."""


@dataclass
class Optimizer:
    """AdamW, linear warm-up, and a decay that is clipped at a floor."""

    lr: float = 3e-5
    bias_lr_scale: float = 1.0
    """Learning rate of the relative position bias tables, in terms of `lr`."""
    lr_scales: dict[str, float] = field(default_factory=dict)
    """Learning rates of parts of the model, in terms of `lr`, by what the names of their parameters
    begin with, such as {fusion: 5}; of several the longest counts."""
    decay: str = "cosine"
    """What follows the warm-up: "cosine", "linear" to 0, or "step": `drop` at each of `drop_at`."""
    drop: float = 0.1
    """What the learning rate is multiplied by."""
    drop_at: list[float] = field(default_factory=lambda: [0.5])
    """When it is: shares of the run's steps."""
    min_lr_ratio: float = 0.01
    """Floor of the learning rate, as a share of `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.02
    """Of parameters with two dimensions and more."""
    epochs: float = 10
    steps: int | None = None
    """Optimizer steps; overrides `epochs`."""
    warmup_epochs: float = 1
    warmup_steps: int | None = None
    """Overrides `warmup_epochs`."""
    batch_size: int = 512
    """Pairs of one optimizer step, over all processes and accumulated batches."""
    accumulation: int = 1
    """Batches accumulated for a step; the contrastive loss sees each one alone."""
    max_grad_norm: float = 0.0
    """Longer gradients are scaled to this norm; 0: never."""
    mask_probability: float = 0.5
    """Share of tokens masked for masked language modelling, or, of COOKIE's views of texts, masked,
    substituted or deleted."""
    mask_words: bool = False
    """Mask all pieces of a word together, a share of each text, one word at least."""


@dataclass
class Run:
    """How it is run."""

    precision: str = "bf16"
    """"bf16" or "fp32"."""
    gradient_checkpointing: bool = False
    save_steps: int = 1000
    """Optimizer steps between checkpoints."""
    evaluate_steps: int | None = None
    """Optimizer steps between evaluations on `data.validation`; default: those of an epoch."""
    keep_checkpoints: int = 2
    log_steps: int = 10
    """Optimizer steps between TensorBoard points."""
    tensorboard: bool = True
    report_to: list[str] = field(default_factory=list)
    """Where it reports besides, as transformers.Trainer calls them: wandb, mlflow, ..."""
    device: str | None = None
    """"cpu" to leave a GPU alone; default: a GPU if there is one."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """More arguments of transformers.TrainingArguments, such as fsdp: FSDP2, under torchrun."""


@dataclass
class Recipe:
    """A whole run."""

    system: str = "svitt"
    """Whose models: a package of `svitt_ops.models`."""
    task: str = "pretrain"
    """What they learn: a module of `svitt_ops.training.tasks`, which may add keys to these."""
    output: str = field(default="runs/svitt", metadata=PATH)
    """Folder for checkpoints, TensorBoard files and the final model."""
    seed: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    """What to change in the system's configuration, such as `SViTTConfig`."""
    init: Init = field(default_factory=Init)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    run: Run = field(default_factory=Run)


_CORPUS = re.compile(rf"data\.({'|'.join(CORPORA)})\.\d+")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(files("svitt_ops.training") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check every key and value.

    Args:
        source: a YAML file, the name of a shipped recipe, or None for the defaults.
        overrides: "key=value" texts, such as "optimizer.lr=1e-4"; elements of lists are numbered,
            "data.train.0.root=videos". `data.annotations` and the other keys of
            `Corpus` describe one corpus to train on, in place of all that the recipe lists.

    Raises:
        ValueError: a key is unknown, a value has the wrong type or cannot be; the message names it.
    """
    from svitt_ops.training.engine.recipe_checks import check_form, check_values

    kind = Recipe
    try:
        content = _read(source) if source is not None else OmegaConf.create()
        changes = _one_corpus([_split(override) for override in overrides])
        kind = _class_of(dict(changes).get("task", content.get("task")))
        check_form(kind, OmegaConf.to_container(content), f"recipe {source}: ")
        merged: Any = OmegaConf.merge(OmegaConf.structured(kind), content)
        for key, value in changes:
            merged = _override(merged, key, value, kind)
        recipe = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError) as error:
        place = getattr(error, "full_key", None)
        message = str(error).splitlines()[0]
        where = f"{source or 'defaults'}{f': {place}' if place else ''}"
        raise ValueError(f"recipe {where}: {message}{_elsewhere(error, kind)}") from error
    assert isinstance(recipe, Recipe)
    check_values(recipe)
    return recipe


def map_paths(section: Any, change: Callable[[str, str], str], prefix: str = "") -> None:
    """Replace every path of a recipe by what `change(key, path)` makes of it.

    The name of a dataset of the Hub is no path.
    """
    for key in fields(section):
        name, value = prefix + key.name, getattr(section, key.name)
        on_hub = key.name == "annotations" and str(value).startswith(HUB)
        if key.metadata == PATH and value is not None and not on_hub:
            setattr(section, key.name, change(name, value))
        listed = isinstance(value, list)
        for number, inner in enumerate(value if listed else [value]):
            if is_dataclass(inner):
                map_paths(inner, change, f"{name}.{number}." if listed else f"{name}.")


def recipe_text(recipe: Recipe) -> str:
    """The whole recipe as YAML, which `load_recipe` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _read(source: str | Path) -> DictConfig:
    path, shipped = expand(source, "recipe"), shipped_recipes()
    if str(source) in shipped and not path.is_file():
        path = shipped[str(source)]
    if not path.exists():
        near = difflib.get_close_matches(str(source), shipped, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"recipe: must be a YAML file or one of {', '.join(shipped)}, got {str(source)!r}{hint}"
        )
    import yaml  # a dependency of omegaconf, whose errors it lets through

    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise ValueError(f"recipe {path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"recipe {path}: must be a mapping")
    return content


def _class_of(task: object) -> type[Recipe]:
    """The recipes of a task; what is no task's name is refused with the other values."""
    from svitt_ops.training.engine.task import Trainable, load_task

    try:
        return getattr(load_task(str(task).strip("'\""), Trainable), "Recipe", Recipe)
    except ValueError:
        return Recipe


def _split(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override: must be key=value, got {override!r}")
    return re.sub(r"\[(\d+)\]", r".\1", key), value  # lists are indexed in either way


def _one_corpus(overrides: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """`data.annotations` and what belongs to it as the only corpus, before other overrides."""
    names = {f"data.{f.name}": f.name for f in fields(Corpus)}
    given = [(key, value) for key, value in overrides if key in names]
    if not given:
        return list(overrides)
    if not any(key == "data.annotations" for key, _ in given):
        raise ValueError(f"override: {given[0][0]} must stand beside data.annotations=FILE")
    corpus = [(f"data.train.0.{names[key]}", value) for key, value in given]
    none = [(f"data.{key}", "[]") for key in CORPORA]
    return [*none, *corpus, *(pair for pair in overrides if pair[0] not in names)]


def _override(merged: Any, key: str, value: str, kind: type[Recipe]) -> Any:
    parts = key.split(".")
    place = next((k for k, part in enumerate(parts) if part.isdigit()), None)
    if place is not None:
        _append(OmegaConf.select(merged, ".".join(parts[:place])), key, int(parts[place]))
        if key.startswith(PAIRS):
            whole = ".".join(parts[:place])
            raise ValueError(
                f"override: {whole} must be given as a whole, {whole}=[A,B], got {key}"
            )
    if (re.sub(r"\.\d+\b", ".0", key), True) in _keys(kind):
        # As it is: it may hold a colon, brackets, or look like a number.
        OmegaConf.update(merged, key, None if value == "null" else value)
        return merged
    import yaml

    try:
        nested = OmegaConf.from_dotlist([f"{key}={value}"])
    except (yaml.YAMLError, UnicodeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"override: {key} must be YAML, got {value!r}: {reason}") from error
    from svitt_ops.training.engine.recipe_checks import check_form

    if place is not None:  # an element of a list: merge replaces lists
        element = OmegaConf.select(nested, key)
        if _CORPUS.fullmatch(key):
            check_form(Corpus, _plain(element), "override: ", key)
        OmegaConf.update(merged, key, element, merge=True)
        return merged
    check_form(kind, _plain(nested), "override: ")
    return OmegaConf.merge(merged, nested)


def _plain(content: Any) -> Any:
    return OmegaConf.to_container(content) if OmegaConf.is_config(content) else content


def _append(elements: Any, key: str, number: int) -> None:
    """Make room for the element after the last of some corpora."""
    if not _CORPUS.match(key):
        return
    if number > len(elements):
        raise ValueError(
            f"override: {key} must be of a corpus 0 to {len(elements)}, there are {len(elements)}"
        )
    if number == len(elements):
        elements.append(OmegaConf.structured(Corpus))


def _keys(kind: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """The dotted names of all keys, numbers of elements 0, and whether they hold a path."""
    kinds = get_type_hints(kind)
    for key in fields(kind):
        name, inner = prefix + key.name, kinds[key.name]
        yield name, key.metadata == PATH
        if get_origin(inner) is list:
            name, inner = f"{name}.0", get_args(inner)[0]
        if is_dataclass(inner):
            yield from _keys(inner, f"{name}.")


def _elsewhere(error: Exception, kind: type[Recipe]) -> str:
    """Where a key that is unknown at its place is known."""
    key = str(getattr(error, "key", None) or "")
    if " not in " not in str(error) or "Did you mean" in str(error):
        return ""
    names = [name for name, _ in _keys(kind)]
    known = [name for name in names if name.rpartition(".")[2] == key]
    near = known or difflib.get_close_matches(key, names, n=1)
    return f". Did you mean: {near[0]!r}?" if near else ""

"""Recipes: what a run is made of, as YAML files with overrides, checked key by key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

RESIZES = ("antialias", "official")


@dataclass
class Corpus:
    """One annotation file and the media it speaks of."""

    annotations: str = MISSING
    """JSON list of {video or image, caption}."""
    root: str | None = None
    """Folder of the media; default: that of the annotations."""
    kind: str = "video"
    """"video" or "image"."""
    captions: str = "each"
    """What a list of captions means: "each" a text of its own, or "join" to a paragraph."""


@dataclass
class Init:
    """Where the weights start; nothing set: from random ones."""

    checkpoint: str | None = None
    """Folder of an earlier run (its frames are expanded to this run's), or an official file."""
    beit: str | None = None
    """Folder of a Hugging Face BEiT, for the video tower."""
    bert: str | None = None
    """Folder of a Hugging Face BERT, for the text tower."""


@dataclass
class TokenizerRecipe:
    """A name or a size; neither: the tokenizer of `init.checkpoint`, or of `init.bert`."""

    name: str | None = None
    """Folder, or name of a downloaded Hugging Face tokenizer."""
    train_vocab_size: int | None = None
    """Train WordPiece on the captions, with at most so many pieces."""
    append_sep: bool | None = None
    """Whether texts end with [SEP]; default: as the tokenizer has it, and not where
    `init.checkpoint` is an official file, whose texts did not."""


@dataclass
class Data:
    """What is read, and how a clip is made."""

    train: list[Corpus] = field(default_factory=list)
    sampling: str = "rand"
    """Frames of a training clip: "rand", "middle" or "fpsX"."""
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
    """Mirror half of the clips."""
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
    """AdamW, linear warm-up, cosine decay that is clipped at a floor."""

    lr: float = 3e-5
    bias_lr_scale: float = 1.0
    """Learning rate of the relative position bias tables, in terms of `lr`."""
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
    """Share of tokens masked for masked language modelling."""


@dataclass
class Run:
    """How it is run."""

    precision: str = "bf16"
    """"bf16" or "fp32"."""
    gradient_checkpointing: bool = False
    save_steps: int = 1000
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = 2
    log_steps: int = 10
    """Optimizer steps between TensorBoard points."""
    tensorboard: bool = True
    device: str | None = None
    """"cpu" to leave a GPU alone; default: a GPU if there is one."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """More arguments of transformers.TrainingArguments, such as fsdp: FSDP2, under torchrun."""


@dataclass
class Recipe:
    """A whole run."""

    output: str = "runs/svitt"
    """Folder for checkpoints, TensorBoard files and the final model."""
    seed: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    """What to change in `SViTTConfig`."""
    init: Init = field(default_factory=Init)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    run: Run = field(default_factory=Run)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(files("svitt_ops.training") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        source: a YAML file, or the name of a shipped recipe; None: the defaults.
        overrides: such as "optimizer.lr=1e-4" or "data.train.0.root=/videos".

    Raises:
        ValueError: the file is missing or is no YAML mapping; a key is unknown, which is
            named; a value has a wrong type.
    """
    schema = OmegaConf.structured(Recipe)
    try:
        merged = OmegaConf.merge(schema, _read(source)) if source is not None else schema
        for override in overrides:
            merged = _override(merged, override)
        recipe = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError) as error:
        key = getattr(error, "full_key", None)
        message = str(error).splitlines()[0]
        where = f"{source or 'defaults'}{': ' + key if key else ''}"
        raise ValueError(f"recipe {where}: {message}") from error
    assert isinstance(recipe, Recipe)
    _check_values(recipe)
    return recipe


def recipe_text(recipe: Recipe) -> str:
    """The whole recipe as YAML, which `load_recipe` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _read(source: str | Path) -> DictConfig:
    path = Path(source)
    if not path.exists():
        shipped = shipped_recipes()
        if str(source) not in shipped:
            raise ValueError(
                f"recipe: must be a YAML file or one of {', '.join(shipped)}, got {str(source)!r}"
            )
        path = shipped[str(source)]
    import yaml  # a dependency of omegaconf, whose errors it lets through

    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"recipe {path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"recipe {path}: must be a mapping")
    return content


def _override(merged: Any, override: str) -> Any:
    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override: must be key=value, got {override!r}")
    nested = OmegaConf.from_dotlist([override])
    if any(part.isdigit() for part in key.split(".")):  # an element of a list: merge replaces lists
        OmegaConf.update(merged, key, OmegaConf.select(nested, key), merge=True)
        return merged
    return OmegaConf.merge(merged, nested)


def _check_values(recipe: Recipe) -> None:
    optimizer, run, data = recipe.optimizer, recipe.run, recipe.data
    choices = [
        ("run.precision", run.precision, ("bf16", "fp32")),
        ("data.pad_to", data.pad_to, ("longest", "max")),
        ("data.positives", data.positives, ("video", "caption")),
        ("data.resize", data.resize, RESIZES),
    ]
    for corpus in data.train:
        choices.append(("data corpus kind", corpus.kind, ("video", "image")))
        choices.append(("data corpus captions", corpus.captions, ("each", "join")))
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"recipe: {name} must be one of {', '.join(known)}, got {value!r}")
    positive = {
        "optimizer.lr": optimizer.lr,
        "optimizer.bias_lr_scale": optimizer.bias_lr_scale,
        "optimizer.epochs": optimizer.epochs,
        "optimizer.batch_size": optimizer.batch_size,
        "optimizer.accumulation": optimizer.accumulation,
        "data.text_length": data.text_length,
        "run.save_steps": run.save_steps,
        "run.log_steps": run.log_steps,
    }
    for name, number in positive.items():
        if number <= 0:
            raise ValueError(f"recipe: {name} must be positive, got {number}")
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"recipe: data.crop_scale must be 0 < low <= high <= 1, got {low}, {high}")
    if optimizer.batch_size % optimizer.accumulation:
        raise ValueError(
            f"recipe: optimizer.batch_size must be a multiple of optimizer.accumulation"
            f" ({optimizer.accumulation}), got {optimizer.batch_size}"
        )
    if recipe.tokenizer.name and recipe.tokenizer.train_vocab_size:
        raise ValueError("recipe: tokenizer takes a name or a train_vocab_size, got both")

"""What of a model's weights fits, and how it is said: for folders, official files, BEiT and BERT.

Frames and grids of patches are resized to the configuration's. Whatever else shapes the weights
must agree with it, and a difference is one line that names the field and both values.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedConfig

from svitt_ops.models.parts.expansion import change_image_size, expand_frames

if TYPE_CHECKING:
    from svitt_ops.models.parts.configuration import TwoTowersConfig, VideoConfig
    from svitt_ops.models.parts.two_towers import TwoTowers

log = logging.getLogger(__name__)

FIXED = (
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "text_hidden_size",
    "text_num_hidden_layers",
    "fusion_layer",
    "text_num_attention_heads",
    "text_intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "projection_dim",
)
"""Fields of a configuration that weights have, and cannot be changed in."""
PARTS = (
    ("match_head.", "the match head starts"),
    ("rank_head.", "the rank head starts"),
    ("token_head.", "the head for masked tokens starts"),
    ("decoder.", "the answer decoder starts"),
    ("class_head.", "the class head starts"),
    ("video_pool.", "the pooling of images starts"),
    ("text_pool.", "the pooling of texts starts"),
    ("hash_layer.", "the hash layer starts"),
    ("assignment_head.", "the head of text assignment starts"),
    ("video_projection.", "the embeddings of clips start"),
    ("text_projection.", "the embeddings of texts start"),
    ("temperature", "the temperature starts"),
    ("temporal.", "the layers over time start"),
    ("fusion.", "the fusion layers start"),
    ("text.", "the text tower starts"),
    ("video", "the video tower starts"),
    ("", "what they are of starts"),
)
"""Beginnings of the model's names, and what starts untrained without them."""
DECODES = "ForQuestionAnswering"
"""End of the names of classes that have an answer decoder."""
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
SHOWN = 6


def fixed_fields(stored: TwoTowersConfig, wanted: TwoTowersConfig) -> list[str]:
    """Fields of a configuration that weights of another one cannot be changed in."""
    scaled = stored.layer_scale_init_value and wanted.layer_scale_init_value
    decodes = any(name.endswith(DECODES) for name in stored.architectures or ())
    return [
        *(name for name in FIXED if hasattr(stored, name)),
        *([] if scaled else ["layer_scale_init_value"]),  # 0 leaves the scales out
        *(["decoder_layers"] if decodes else []),
        *stored.own_fixed,
    ]


def check_fixed(who: str, found: Mapping[str, Any], config: VideoConfig, source: object) -> None:
    """Refuse weights whose fields, where ``found`` tells them, are not the configuration's."""
    for field, value in found.items():
        wanted = getattr(config, field)
        if value != wanted:
            raise ValueError(
                f"{who}: {field} must be {in_short(value)}, that of the weights in {source}, "
                f"got {in_short(wanted)}"
            )


def in_short(value: object) -> object:
    """A value as messages have it: of a long list its beginning."""
    return [*value[:SHOWN], "..."] if isinstance(value, list) and len(value) > SHOWN else value


def check_finite(who: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that are NaN or infinite."""
    for name, value in tensors:
        if value.is_floating_point() and not value.is_meta and not value.isfinite().all():
            raise ValueError(f"{who}: {name} must be finite, got NaN or infinity")


def say_left_out(source: object, names: Sequence[str]) -> None:
    """Warn of tensors that the model has no place for."""
    if names:
        what = _listed(names)
        log.warning("%s has no counterpart for: %s; the model computes without", source, what)


def say_missing(source: object, names: Sequence[str]) -> None:
    """Warn of the model's parts that found no weights, part by part."""
    left = list(names)
    for prefix, what in PARTS:
        here = [name for name in left if name.startswith(prefix)]
        left = [name for name in left if not name.startswith(prefix)]
        if here:
            why = f"{what} from random or initial weights"
            log.warning("%s has nothing for: %s; %s", source, _listed(here), why)


def load_folder(
    load: Callable[..., Any],
    kind: type[TwoTowers],
    source: Any,
    config: TwoTowersConfig | str | None,
    **options: Any,
) -> Any:
    """Weights of a folder, resized to the frames and the resolution of a configuration.

    Args:
        load: transformers' `from_pretrained` of ``kind``.
        kind: the class of the model.
        source: folder or name.
        config: of the model, or where it is; default: the folder's with the fields in ``options``.
        options: of `from_pretrained`.
    """
    who = kind.__name__
    hub = {name: options[name] for name in HUB if name in options}
    raw, _ = PreTrainedConfig.get_config_dict(source, **hub)
    if raw.get("model_type", kind.config_class.model_type) != kind.config_class.model_type:
        raise ValueError(
            f"{who}: {source} must hold a model of type {kind.config_class.model_type!r}, "
            f"got {raw['model_type']!r}"
        )
    stored = kind.config_class.from_pretrained(source, **hub)
    wanted: Any = config
    if not isinstance(config, PreTrainedConfig):
        wanted = kind.config_class.from_pretrained(source if config is None else config, **hub)
        for name in (set(wanted.to_dict()) - {"dtype"}) & set(options):
            setattr(wanted, name, options.pop(name))
    wanted.check()
    lenient = options.pop("ignore_mismatched_sizes", False)
    if not lenient:
        fixed = fixed_fields(stored, wanted)
        check_fixed(who, {field: getattr(stored, field) for field in fixed}, wanted, source)
    own = copy.deepcopy(wanted)
    own.image_size, own.num_frames = stored.image_size, stored.num_frames
    as_asked = options.pop("output_loading_info", False)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _without_report():
            model, info = load(source, config=own, **options)
    except Exception as error:
        if not of_safetensors(error):
            raise
        raise ValueError(
            f"{who}: the weights in {source} cannot be read: {first_line(error)}"
        ) from error
    for name, found, shape in () if lenient else sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{who}: {name} of {source} must have shape {tuple(shape)}, that of its config.json, "
            f"got {tuple(found)}"
        )
    model.freeze()  # transformers makes all trainable
    state, absent = model.state_dict(), info["missing_keys"]
    names = [name for name in state if not name.startswith(model.training_only)]
    missing = model.start_missing([name for name in state if name in absent])
    derived = {name for name in names if name.startswith(model.derived)} - set(missing)
    info["missing_keys"] = {name for name in absent if name in names} - derived
    check_share(who, len(names) - len(missing), len(missing), source)
    say_left_out(source, sorted(info["unexpected_keys"]))
    say_missing(source, missing)
    check_finite(f"{who}: {source}", model.named_parameters())
    if wanted.image_size != stored.image_size:
        change_image_size(model, wanted.image_size)
    if wanted.num_frames != stored.num_frames:
        expand_frames(model, wanted.num_frames)
    return (model, info) if as_asked else model


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of what is missing, which knows no `start_missing`."""
    theirs = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    theirs.addFilter(other)
    try:
        yield
    finally:
        theirs.removeFilter(other)


def check_share(who: str, loaded: int, missing: int, source: object) -> None:
    """Refuse weights that more than half of a model's tensors are missing from."""
    if missing > loaded:
        raise ValueError(
            f"{who}: {source} must hold the weights of such a model, "
            f"got {loaded} of its {loaded + missing} tensors"
        )


def of_safetensors(error: BaseException) -> bool:
    """Whether safetensors, which only transformers imports here, found a file damaged."""
    return type(error).__name__ == "SafetensorError"


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _listed(names: Sequence[str]) -> str:
    """Names in a line; of many, the first ones and how many there are."""
    if len(names) <= SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} more"

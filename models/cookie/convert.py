"""Weights of a ResNet for COOKIE's: transformers' ones, and files with torchvision's names.

There is no released checkpoint of COOKIE itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from svitt_ops.models.parts.conversion import Conversion, convert_into, read_transformers
from svitt_ops.models.parts.key_maps import Rules
from svitt_ops.models.parts.loading import check_fixed, check_share
from svitt_ops.models.parts.two_towers import TwoTowers
from svitt_ops.models.parts.unpickling import read_tensors

_STEM = "video.cnn.embedder.embedder"


def _torchvision() -> Iterable[tuple[str, str]]:
    yield r"conv1\.(.+)", rf"{_STEM}.convolution.\1"
    yield r"bn1\.(.+)", rf"{_STEM}.normalization.\1"
    for stage in range(1, 5):
        layer = rf"video.cnn.encoder.stages.{stage - 1}.layers.\1"
        begin = rf"layer{stage}\.(\d+)\."
        for number in range(1, 4):
            inner = rf"{layer}.layer.{number - 1}"
            yield begin + rf"conv{number}\.(.+)", rf"{inner}.convolution.\2"
            yield begin + rf"bn{number}\.(.+)", rf"{inner}.normalization.\2"
        yield begin + r"downsample\.0\.(.+)", rf"{layer}.shortcut.convolution.\2"
        yield begin + r"downsample\.1\.(.+)", rf"{layer}.shortcut.normalization.\2"


RULES: Rules = (
    (r"(?:resnet\.)?((?:embedder|encoder)\..+)", r"video.cnn.\1"),
    (r"(?:classifier|fc)\..+", ""),
    *_torchvision(),
)
"""Names of transformers' ResNet and of torchvision's, whose ResNeXt has the same."""


def load_resnet(
    model: TwoTowers, source: str | Path | nn.Module | Mapping[str, Tensor]
) -> Conversion:
    """Take over the weights of a ResNet, or of a ResNeXt, as those below the transformer layers.

    Args:
        model: changed in place; its `cnn_...` fields are those of the weights.
        source: a transformers' ResNet, or the folder of one; or a file with the state dict of
            torchvision's, as the weakly supervised ResNeXt-101 is released, which is read without
            running anything that it contains; or the tensors of either by name.

    Raises:
        ValueError: the source holds no ResNet, or one of other sizes than the model.
    """
    name: object = type(source).__name__
    if isinstance(source, Mapping) or (
        not isinstance(source, nn.Module) and Path(source).is_file()
    ):
        tensors = read_tensors(source)
        name = "the mapping" if isinstance(source, Mapping) else source
    else:
        from transformers import ResNetForImageClassification

        tensors, _ = read_transformers(ResNetForImageClassification, source, "load_resnet")
        name = name if isinstance(source, nn.Module) else source
    tensors = {key.removeprefix("module."): x for key, x in tensors.items()}
    depths = _depths(tensors)
    if not depths:
        raise ValueError(
            f"load_resnet: {name} must hold the layers of a ResNet, got {len(tensors)} other"
            f" tensors: {', '.join(list(tensors)[:5])}"
        )
    check_fixed("load_resnet", {"cnn_depths": depths}, model.config, name)
    found = convert_into(model, tensors, RULES, parts=("video.cnn.",))
    missing = tuple(x for x in found.missing if not x.endswith("num_batches_tracked"))
    told = replace(found, missing=missing)
    check_share("load_resnet", len(told.loaded), len(told.missing), name)
    told.report("ResNet")
    return told


def _depths(tensors: Mapping[str, Any]) -> list[int]:
    """Layers of each stage, by the names of its tensors."""
    found: dict[int, int] = {}
    for name in tensors:
        theirs = re.match(r"layer(\d+)\.(\d+)\.", name)
        ours = re.match(r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.", name)
        if match := theirs or ours:
            stage = int(match[1]) - (theirs is not None)
            found[stage] = max(found.get(stage, 0), int(match[2]) + 1)
    return [found[stage] for stage in sorted(found)]

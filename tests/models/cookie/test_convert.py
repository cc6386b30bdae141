"""Weights of a ResNet and of a BERT, in COOKIE's streams."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from svitt_ops.models import COOKIEConfig, COOKIEForHashing, COOKIEForPreTraining
from svitt_ops.models.convert import load_bert
from svitt_ops.models.cookie import load_resnet

Make = Callable[..., COOKIEConfig]
SIZES: dict[str, Any] = {"depths": [1, 2], "hidden_sizes": [16, 32], "embedding_size": 8}


@pytest.fixture(scope="module")
def resnet() -> ResNetForImageClassification:
    """With statistics as if trained."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(**SIZES)).eval()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape) + ("var" in name))
    return model


def torchvision_names(model: ResNetForImageClassification) -> dict[str, Tensor]:
    found = {}
    for name, x in model.state_dict().items():
        name = name.removeprefix("resnet.")
        name = re.sub(r"embedder\.embedder\.convolution", "conv1", name)
        name = re.sub(r"embedder\.embedder\.normalization", "bn1", name)
        name = re.sub(r"encoder\.stages\.(\d)\.layers", lambda m: f"layer{int(m[1]) + 1}", name)
        for part, short in (("convolution", "conv"), ("normalization", "bn")):
            name = re.sub(
                rf"\.layer\.(\d)\.{part}",
                lambda m, short=short: f".{short}{int(m[1]) + 1}",  # type: ignore[misc]
                name,
            )
        name = name.replace("shortcut.convolution", "downsample.0")
        name = name.replace("shortcut.normalization", "downsample.1")
        found[name.replace("classifier.1", "fc")] = x
    return found


@pytest.mark.parametrize("form", ["model", "folder", "file", "mapping"])
@pytest.mark.parametrize("kind", [COOKIEForPreTraining, COOKIEForHashing])
def test_a_resnet(
    form: str, kind: Any, resnet: Any, make: Make, tmp_path: Path, caplog: Any
) -> None:
    model = kind(make(image_mean=[0.5] * 3, image_std=[0.5] * 3)).eval()
    theirs = torchvision_names(resnet)
    assert "layer1.0.conv3.weight" in theirs and "layer2.0.downsample.1.running_mean" in theirs
    source: Any = resnet.resnet if form == "model" else theirs
    if form == "folder":
        resnet.save_pretrained(tmp_path)
        source = tmp_path
    if form == "file":
        without = {k: x for k, x in theirs.items() if "num_batches_tracked" not in k}
        source = tmp_path / "resnext.pth"
        torch.save(without, source)
    found = load_resnet(model, source)
    assert not caplog.messages and not found.unknown and not found.missing
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = resnet.resnet(pixels).last_hidden_state
        torch.testing.assert_close(model.video.features(pixels), wanted)
        if kind is COOKIEForHashing:
            codes = model.hash_layer(resnet.resnet(pixels).pooler_output.flatten(1))
            torch.testing.assert_close(model.encode_video(pixels).embeds, codes)


def test_pixels_have_the_mean_that_the_weights_want(resnet: Any, make: Make) -> None:
    model = COOKIEForPreTraining(make()).eval()
    load_resnet(model, resnet)
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (model.config.image_mean, model.config.image_std)
    )
    with torch.no_grad():
        wanted = resnet.resnet((pixels - mean) / std).last_hidden_state
        torch.testing.assert_close(
            model.video.features(pixels * 2 - 1), wanted, rtol=1e-4, atol=1e-4
        )


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_file_runs_nothing(resnet: Any, make: Make, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    content = {"state_dict": torchvision_names(resnet), "extra": Attack(f"touch {flag}")}
    torch.save(content, tmp_path / "resnet.pth")
    load_resnet(COOKIEForPreTraining(make()), tmp_path / "resnet.pth")
    assert not flag.exists()


def test_what_is_no_such_resnet(resnet: Any, make: Make, tmp_path: Path) -> None:
    deeper = ResNetModel(ResNetConfig(**{**SIZES, "depths": [1, 3]}))
    wider = ResNetModel(ResNetConfig(**{**SIZES, "hidden_sizes": [16, 48]}))
    broken = torchvision_names(resnet)
    broken = {
        k: torch.full_like(x, torch.nan) if k == "conv1.weight" else x for k, x in broken.items()
    }
    BertModel(
        BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    ).save_pretrained(tmp_path)
    sources: list[tuple[Any, str]] = [
        (deeper, r"cnn_depths must be \[1, 3\], that of the weights in ResNetModel, got \[1, 2\]"),
        (wider, r"must have shape \(32, 16, 1, 1\), got \(48, 16, 1, 1\)"),
        (broken, "conv1.weight must be finite"),
        ({"a": torch.ones(1)}, "must hold the layers of a ResNet, got 1 other tensors: a"),
        (tmp_path, "must be the folder of a model of type 'resnet', got 'bert'"),
        (tmp_path / "none", "get one by: hf download microsoft/resnet-50"),
    ]
    for source, message in sources:
        with pytest.raises(ValueError, match=message):
            load_resnet(COOKIEForPreTraining(make()), source)


def test_a_bert(make: Make, caplog: Any) -> None:
    torch.manual_seed(0)
    model = COOKIEForPreTraining(make()).eval()
    bert = BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=20,
        )
    ).eval()
    load_bert(model, bert)
    assert not caplog.messages
    ids = torch.randint(1, 50, (2, 7))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        wanted = bert(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(model.text(ids, mask), wanted, rtol=1e-4, atol=1e-5)

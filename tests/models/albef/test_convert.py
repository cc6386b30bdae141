"""ALBEF's checkpoints: every tensor accounted for, and what a task starts from."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import FOLDER, Case
from momentum_cases import official
from torch import Tensor
from transformers import ViTConfig, ViTModel

from svitt_ops.models import ALBEFConfig, ALBEFForPreTraining
from svitt_ops.models.albef import load_official
from svitt_ops.models.parts.conversion import load_vit

TASKS = {
    "pretrain": "pretraining",
    "retrieval": "retrieval",
    "vqa": "question_answering",
    "nlvr": "visual_reasoning",
    "nlvr_pretrain": "text_assignment",
    "ve": "visual_entailment",
}


def deep(**changes: Any) -> ALBEFConfig:
    """As many layers as the authors' models, which their names of weights depend on."""
    fields = Case("albef/pretrain").fields()
    return ALBEFConfig(**{**fields, "text_num_hidden_layers": 12, "fusion_layer": 6, **changes})


def released(config: ALBEFConfig) -> dict[str, Tensor]:
    """A pretraining checkpoint of new values, with as many text layers as wanted."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, value in Case("albef/pretrain").state().items():
        match = re.search(r"encoder\.layer\.(\d)\.", name)
        layers = range(12) if match else [0]
        for layer in layers:
            fuses = layer >= config.fusion_layer
            if match and int(match[1]) != (3 if fuses else 0):
                continue
            new = re.sub(r"encoder\.layer\.\d\.", f"encoder.layer.{layer}.", name)
            tensors[new] = torch.rand(value.shape, generator=generator).to(value.dtype)
    return tensors


@pytest.mark.parametrize(("name", "task"), TASKS.items())
def test_every_tensor_is_used(name: str, task: str, caplog: pytest.LogCaptureFixture) -> None:
    """The cases compare them all; here, that none was left out or made up."""
    model = load_official(Case(f"albef/{name}").state(), Case(f"albef/{name}").config(), task=task)
    unused = ["temp"] if name == "nlvr_pretrain" else []  # that loss has a constant
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        f"the mapping has no counterpart for: {key}" for key in unused
    ]
    assert not model.training


@pytest.mark.parametrize(
    ("name", "task", "new"),
    [
        ("retrieval, grounding", "retrieval", ()),
        ("vqa", "question_answering", ()),
        ("ve", "visual_entailment", ("class_head",)),
        ("nlvr_pretrain", "text_assignment", ("assignment_head",)),
    ],
)
def test_what_a_task_starts_from(
    name: str, task: str, new: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """`key_maps.json`: which weight of pretraining the authors' model for a task receives."""
    given = json.loads((FOLDER / "albef" / "key_maps.json").read_text())["tasks"][name]
    tensors = released(deep())
    model = load_official(tensors, deep(), task=task)
    lacking = [r.getMessage() for r in caplog.records if "has nothing for" in r.getMessage()]
    assert len(lacking) == len(new) and all(map(str.__contains__, lacking, new))
    state, count = model.state_dict(), 0
    for downstream, pretraining in given["loaded"].items():
        if re.search(r"position_ids$|predictions\.decoder\.", downstream):  # a buffer, and tied
            continue
        if (task, downstream) == ("text_assignment", "temp"):  # its loss has a constant
            continue
        found = official(paired(downstream, task), model, state.__getitem__)
        wanted = tensors[pretraining]
        found = found.T if downstream in ("image_queue", "text_queue") else found
        assert torch.equal(found.flatten(), wanted.flatten()), downstream
        count += 1
    assert count > 25


def paired(name: str, task: str) -> str:
    """A name of a doubled layer, as the first or the second of its pair."""
    match = re.match(r"(text_encoder\.)encoder\.layer\.(\d+)\.(.+)", name)
    if task != "text_assignment" or not match or int(match[2]) < 6:
        return name
    pair, second = divmod(int(match[2]) - 6, 2)
    own = not re.match(r"crossattention\.self\.(key|value)", match[3])
    return f"{match[1]}" + (
        f"second.{pair}.{match[3]}" if second and own else f"encoder.layer.{6 + pair}.{match[3]}"
    )


def test_a_twin_starts_from_what_was_loaded() -> None:
    """Also where a checkpoint, as that of text assignment, has none."""
    tensors = {name: x for name, x in released(deep()).items() if "_m." not in name}
    model = load_official(tensors, deep(), task="visual_reasoning")
    own = dict(model.named_parameters())
    for name, x in model.teacher.named_parameters():
        assert torch.equal(x, own[name]), name
    first = model.fusion.layers[5].cross_attention
    assert model.fusion.second[5].cross_attention.key is first.key


def test_a_checkpoint_of_another_resolution() -> None:
    tensors = released(deep())
    model = load_official(tensors, deep(image_size=48))
    assert model.video.patch_positions.shape == (1, 36, 32)
    found = official("visual_encoder.pos_embed", model, model.get_parameter)
    assert torch.equal(found[:, :1], tensors["visual_encoder.pos_embed"][:, :1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "grounding"}, "task must be one of pretraining, retrieval, .*, got 'grounding'"),
        ({"compat": "svitt-official"}, "compat must be one of .*, got 'svitt-official'"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_official(Case("albef/pretrain").state(), Case("albef/pretrain").config(), **change)


def test_files_that_are_no_albef() -> None:
    with pytest.raises(
        ValueError, match=r"must have visual_encoder.pos_embed of shape .*, got none"
    ):
        load_official({"x": torch.zeros(2)})
    state, config = Case("albef/pretrain").state(), Case("albef/pretrain").config(vocab_size=63)
    with pytest.raises(
        ValueError, match="vocab_size must be 64, that of the weights in the mapping"
    ):
        load_official(state, config)
    state["temp"] = torch.tensor(torch.nan)
    with pytest.raises(ValueError, match="temp must be finite"):
        load_official(state, Case("albef/pretrain").config())


def test_a_vit_of_transformers(tmp_path: Path) -> None:
    """The tower of the same weights has the same states; it starts the recipe's `init.vit`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    given = ViTConfig(
        **sizes, patch_size=8, intermediate_size=128, layer_norm_eps=1e-6, initializer_range=0.3
    )
    vit = ViTModel(given).eval()
    model = ALBEFForPreTraining(deep()).eval()
    assert not load_vit(model, vit).missing
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = vit(images).last_hidden_state
        torch.testing.assert_close(model.encode_video(images).states, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.teacher.video_norm.weight, model.video_norm.weight)
    vit.save_pretrained(tmp_path)
    other = ALBEFForPreTraining(deep(image_size=48))
    assert not load_vit(other, tmp_path).missing
    assert torch.equal(other.video.cls_token, model.video.cls_token)
    assert other.video.patch_positions.shape == (1, 36, 32)
    with pytest.raises(ValueError, match="load_vit: patch_size must be 8, that of the weights in"):
        load_vit(ALBEFForPreTraining(deep(patch_size=16)), vit)

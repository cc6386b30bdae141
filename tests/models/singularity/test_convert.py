"""Singularity's checkpoints: every tensor accounted for, and what they say of the model."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import OFFICIAL, Case
from torch import Tensor

from svitt_ops.models import SingularityConfig, convert
from svitt_ops.models.singularity import load_official
from svitt_ops.models.singularity.convert import RULES

TASKS = {"pretrain_temporal": "pretraining", "retrieval": "retrieval", "vqa": "question_answering"}
TIED = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}


def released(name: str) -> dict[str, Tensor]:
    """The names of a golden case with new values, tied as the authors tie them."""
    case, generator = Case(f"singularity/{name}"), torch.Generator().manual_seed(0)
    tensors = {
        name: value if value.dtype == torch.int64 else torch.randn(value.shape, generator=generator)
        for name, value in case.state().items()
    }
    for name in tensors:
        if name.endswith("cls.predictions.decoder.weight"):
            words = "bert.embeddings.word_embeddings.weight"
            tensors[name] = tensors[name.replace("cls.predictions.decoder.weight", words)]
        if name.endswith("cls.predictions.decoder.bias"):
            tensors[name] = tensors[name.replace("decoder.bias", "bias")]
    return tensors


@pytest.mark.parametrize(("name", "task"), TASKS.items())
def test_every_tensor_is_accounted_for(
    name: str, task: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = released(name)
    model = load_official(tensors, Case(f"singularity/{name}").config(), task=task)
    unused = [] if name == "pretrain_temporal" else ["temporal_embeddings"]
    assert [r.getMessage().split(";")[0] for r in caplog.records] == [
        f"the mapping has no counterpart for: {key}" for key in unused
    ]
    found = convert.convert_into(model, tensors, RULES)
    assert list(found.unknown) == unused and found.missing == ()
    assert sorted((*found.loaded, *found.dropped, *found.unknown)) == sorted(tensors)
    assert len(found.loaded) == len(model.state_dict())
    for key in found.dropped:
        assert re.search(r"relative_position_index$|position_ids$|cls\.predictions\.decoder\.", key)
    state, case = model.state_dict(), Case(f"singularity/{name}")
    for key in found.loaded:
        target = case.target(key, model.config)
        assert target is not None
        assert torch.equal(state[target].flatten(), tensors[key].flatten()), key


def config(**changes: Any) -> SingularityConfig:
    return Case("singularity/pretrain").config(**changes)  # type: ignore[no-any-return]


def test_the_second_stage_from_a_file_of_the_first(caplog: pytest.LogCaptureFixture) -> None:
    """Its embeddings of frames, unused there, are the start; the layers are new."""
    tensors = released("pretrain")
    model = load_official(tensors, config(temporal_layers=2, num_frames=4))
    assert (model.config.num_frames, len(model.temporal.layers)) == (1, 2)
    assert torch.equal(model.temporal.embeddings, tensors["temporal_embeddings"])
    assert "the layers over time start from random or initial weights" in caplog.text
    assert "no counterpart" not in caplog.text
    tensors.pop("temporal_embeddings")
    model = load_official(tensors, config(temporal_layers=2, num_frames=4))
    assert model.config.num_frames == 4 and not model.temporal.embeddings.any()


@pytest.mark.parametrize("name", ["pretrain", "pretrain_temporal"])
def test_a_recipe_starts_from_a_file(name: str, tmp_path: Path) -> None:
    pytest.importorskip("omegaconf")
    from svitt_ops.training.engine.build import build_model
    from svitt_ops.training.engine.recipes import Recipe

    class Pieces:
        """As much of a tokenizer as a model asks for."""

        pad_token_id = 0

        def __len__(self) -> int:
            return 64

    torch.save({"model": released(name)}, tmp_path / "file.pth")
    fields = Case(f"singularity/{name}").fields() | {"num_frames": 4, "temporal_layers": 2}
    del fields["vocab_size"]  # the tokenizer's
    recipe = Recipe(system="singularity", model=fields)
    recipe.init.checkpoint = str(tmp_path / "file.pth")
    model = build_model(recipe, Pieces(), "question_answering")  # type: ignore[arg-type]
    assert (model.config.num_frames, model.config.temporal_layers) == (4, 2)
    assert model.temporal.embeddings.shape == (1, 4, 1, 32)


def test_files_that_are_of_another_model() -> None:
    tensors = released("pretrain_temporal")
    with pytest.raises(ValueError, match=r"^load_official: temporal_layers must be 2, .*, got 3$"):
        load_official(tensors, config(temporal_layers=3))
    for shape in ((3, 32), (1, 0, 1, 32)):
        odd = tensors | {"temporal_embeddings": torch.zeros(shape)}
        with pytest.raises(ValueError, match=r"must have shape \(1, frames, 1, hidden_size\), got"):
            load_official(odd, config())
    table = next(name for name in tensors if name.endswith("bias_table"))
    joint = {k: v for k, v in tensors.items() if not k.endswith("index")}
    joint[table] = torch.zeros(3 * 49 + 3, 2)  # of two frames
    with pytest.raises(ValueError, match="bias of single frames, got that of 2: it is no Singular"):
        load_official(joint, config())
    with pytest.raises(ValueError, match=r"compat must be one of .*singularity-official"):
        load_official(tensors, config(), compat=OFFICIAL)
    with pytest.raises(ValueError, match=r"task must be one of pretraining, .*got 'hashing'"):
        load_official(tensors, config(), task="hashing")
    with pytest.raises(ValueError, match=r"models\.singularity\.load_official"):
        convert.load_official(tensors, Case("svitt/pretrain").config())

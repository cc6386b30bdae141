"""SCL's checkpoints: every tensor accounted for, read without running what they hold."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from scl_cases import FIELDS, state
from torch import Tensor

from svitt_ops.models import SCLConfig, SCLForPreTraining
from svitt_ops.models.parts.key_maps import placed, rename
from svitt_ops.models.scl import load_official
from svitt_ops.models.scl.convert import rules_of, unpack
from svitt_ops.models.systems import load_system

HEADS = ("vqa_classifier.", "nlvr2_classifier.", "rank_output.")


def released(*heads: str, clips: bool = False) -> dict[str, Tensor]:
    """As the authors' code writes it for one task: with two types, and what models here lack."""
    without = tuple(head for head in HEADS if head not in heads)
    found = {k: x for k, x in state(clips=clips).items() if not k.startswith(without)}
    if "nlvr2_classifier." not in heads:
        found["token_type_embeddings.weight"] = found["token_type_embeddings.weight"][:2]
    more = {
        "text_transformer.pooler.dense.weight": (32, 32),
        "vision_transformer.decoder_embed.weight": (8, 32),
        "vision_transformer.visual.proj": (32, 20),
    }
    found |= {name: torch.zeros(shape) for name, shape in more.items()}
    return found | {"text_transformer.embeddings.position_ids": torch.arange(14)[None]}


PAIRS = {"itm_score", "cl_temp", "vision_proj", "language_proj"}
"""What models of questions and of statements have no place for."""


@pytest.mark.parametrize(
    ("task", "heads", "clips", "unknown"),
    [
        ("pretraining", (), False, set()),
        ("pretraining", (), True, set()),
        ("retrieval", ("rank_output.",), True, {"mlm_score"}),
        ("question_answering", ("vqa_classifier.",), False, {"mlm_score", *PAIRS}),
        ("visual_reasoning", ("nlvr2_classifier.",), False, {"mlm_score", *PAIRS}),
    ],
)
def test_every_tensor_is_accounted_for(
    task: str,
    heads: tuple[str, ...],
    clips: bool,
    unknown: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The cases compare them all; here, that none was left out or made up."""
    answers = [str(k) for k in range(13)] if task == "question_answering" else None
    config = SCLConfig(**FIELDS, answers=answers, num_frames=3 if clips else 1)
    tensors = released(*heads, clips=clips)
    model = load_official(tensors, config, task=task)
    assert len(caplog.messages) == bool(unknown) and not model.training
    assert all("has no counterpart for" in text for text in caplog.messages)
    names, ours = unpack(tensors, config), model.state_dict()
    targets = {name: placed(rename(name, rules_of(task)), config) for name in names}
    found = {name.partition(".")[0] for name, x in targets.items() if x != "" and x not in ours}
    assert found == unknown
    assert set(ours) <= {*targets.values()}


@pytest.mark.parametrize(
    ("task", "new"),
    [("retrieval", ""), ("question_answering", "class_head"), ("visual_reasoning", "class_head")],
)
def test_what_a_task_starts_from(task: str, new: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of a file of pretraining: the rank head from the match head, one type from the other."""
    config = SCLConfig(**FIELDS, answers=["a"] if task == "question_answering" else None)
    model = load_official(released(), config, task=task)
    lacking = [text for text in caplog.messages if "has nothing for" in text]
    assert len(lacking) == bool(new) and all(new in text for text in lacking)
    if task == "retrieval":
        assert torch.equal(model.rank_head.weight, state()["rank_output.weight"])
    if task == "visual_reasoning":
        assert torch.equal(model.second_type[0], model.types.weight[1])


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_file_runs_nothing(tmp_path: Path) -> None:
    """As Lightning writes it, with objects beside the weights."""
    bait = tmp_path / "bait"
    content = {"state_dict": released(), "hyper_parameters": {"config": Attack(f"touch {bait}")}}
    torch.save({**content, "callbacks": {Path: 1}}, tmp_path / "file.ckpt")
    model = load_official(tmp_path / "file.ckpt", SCLConfig(**FIELDS))
    assert not bait.exists() and isinstance(model, SCLForPreTraining)
    assert torch.equal(model.match_head.weight, state()["itm_score.fc.weight"])
    torch.load(tmp_path / "file.ckpt", weights_only=False)
    assert bait.exists()  # so the attack is a real one


def test_a_file_of_another_resolution() -> None:
    model = load_official(released(), SCLConfig(**{**FIELDS, "image_size": 36}))
    assert model.video.patch_positions.shape == (1, 36, 32)
    places = state()["vision_transformer.visual.positional_embedding"]
    assert torch.equal(model.video.cls_position[0, 0], places[0])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cl_temp", lambda x: x * torch.nan, "cl_temp must be finite, got NaN or infinity"),
        ("itm_score.fc.weight", lambda x: x[:, :3], r"itm_score.* must have shape \(2, 64\)"),
        (
            "text_transformer.embeddings.word_embeddings.weight",
            lambda x: x[:50],
            "vocab_size must be 50, that of the weights in the mapping, got 97",
        ),
        (
            "language_proj.3.weight",
            lambda x: x[:100],
            "projection_dim must be 100, that of the weights in the mapping, got 512",
        ),
        (
            "vision_transformer.visual.transformer.resblocks.0.attn.in_proj_bias",
            lambda x: x[:2],
            r"in_proj_bias must have rows of queries, keys and values, got \(2,\)",
        ),
        (
            "vision_transformer.visual.positional_embedding",
            lambda x: x[0],
            r"positional_embedding must have shape \(rows, dim\), got \(32,\)",
        ),
        (
            "vision_transformer.visual.positional_embedding",
            lambda x: x[:8],
            r"positions must have shape \(frames, side \* side, dim\), got \(1, 7, 32\)",
        ),
        (
            "text_transformer.embeddings.position_embeddings.weight",
            lambda x: x.sum(),
            r"position_embeddings.weight must have shape \(rows, dim\), got \(\)",
        ),
        (
            "token_type_embeddings.weight",
            lambda x: x.sum(),
            r"token_type_embeddings.weight must have shape \(rows, dim\), got \(\)",
        ),
    ],
)
def test_what_is_refused(name: str, change: Any, message: str) -> None:
    tensors = released()
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=message):
        load_official(tensors, SCLConfig(**FIELDS))


def test_fewer_fusion_layers_than_asked_for() -> None:
    fields = {**FIELDS, "text_num_hidden_layers": 5}
    with pytest.raises(ValueError, match="text_num_hidden_layers must be 4, that of the weights"):
        load_official(released(), SCLConfig(**fields))


def test_a_recipe_starts_from_a_file(tmp_path: Path) -> None:
    """And its texts end as the authors' do."""
    pytest.importorskip("omegaconf")
    from svitt_ops.training.data.text import append_sep, save_tokenizer, train_tokenizer
    from svitt_ops.training.engine.build import build_model, build_tokenizer
    from svitt_ops.training.engine.recipes import Recipe

    torch.save({"state_dict": released()}, tmp_path / "file.ckpt")
    save_tokenizer(append_sep(train_tokenizer(["a b"], 97), False), tmp_path / "tokenizer")
    fields = {**FIELDS, "num_frames": 3}
    del fields["vocab_size"]  # the tokenizer's
    recipe = Recipe(system="scl", model=fields)
    recipe.init.checkpoint = str(tmp_path / "file.ckpt")
    recipe.tokenizer.name = str(tmp_path / "tokenizer")
    tokenizer = build_tokenizer(recipe, [])
    assert tokenizer("a")["input_ids"][-1] == tokenizer.sep_token_id

    class Pieces:
        """As much of a tokenizer as a model asks for."""

        pad_token_id = 1

        def __len__(self) -> int:
            return 97

    model = build_model(recipe, Pieces(), "question_answering", {"answers": ["a", "b"]})  # type: ignore[arg-type]
    assert model.config.answers == ["a", "b"] and model.config.num_frames == 3
    assert model.video.frame_positions.shape == (8, 32)
    assert load_system("scl").official_sep and not load_system("albef").official_sep

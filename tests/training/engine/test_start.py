"""Where the weights of a run start: earlier runs, official files, BEiT and BERT folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BeitConfig, BeitModel

from svitt_ops.models import SViTTConfig, SViTTForPreTraining
from svitt_ops.models.parts.expansion import resize_bias_table
from svitt_ops.training.data.text import save_tokenizer, train_tokenizer
from svitt_ops.training.engine.build import build_model
from svitt_ops.training.engine.recipes import load_recipe
from svitt_ops.training.tasks.pretrain import build_dataset

TABLE = "video.layers.0.attention.bias.table"


@pytest.fixture
def tokenizer() -> Any:
    return train_tokenizer(["a red square then a blue circle", "a green cross"], 60)


@pytest.fixture
def run(make_recipe: Any, tokenizer: Any, tmp_path: Path) -> tuple[SViTTForPreTraining, Path]:
    """A model of 4 frames of 16 pixels, and its folder."""
    torch.manual_seed(0)
    model = build_model(make_recipe(tmp_path), tokenizer)
    model.save_pretrained(tmp_path / "run")
    save_tokenizer(tokenizer, tmp_path / "run")
    return model, tmp_path / "run"


@pytest.mark.parametrize(("pixels", "frames"), [(24, 4), (32, 8), (8, 2), (16, 8)])
def test_a_run_of_another_resolution(
    make_recipe: Any,
    run: tuple[SViTTForPreTraining, Path],
    tokenizer: Any,
    tmp_path: Path,
    pixels: int,
    frames: int,
) -> None:
    first, folder = run
    recipe = make_recipe(tmp_path / "next", f"init.checkpoint={folder}")
    recipe.model |= {"image_size": pixels, "num_frames": frames}
    model = build_model(recipe, tokenizer)
    assert (model.config.image_size, model.config.num_frames) == (pixels, frames)
    table = resize_bias_table(first.state_dict()[TABLE], pixels // 8, frames, source_grid=2)
    assert torch.equal(model.state_dict()[TABLE], table)
    assert model(
        torch.randn(2, frames, 3, pixels, pixels),
        **{name: torch.ones(2, 3, dtype=torch.int64) for name in ("input_ids", "attention_mask")},
        mlm_input_ids=torch.ones(2, 3, dtype=torch.int64),
        mlm_labels=torch.ones(2, 3, dtype=torch.int64),
    ).loss.isfinite()


def test_what_cannot_be_is_one_line(
    make_recipe: Any, run: tuple[SViTTForPreTraining, Path], tokenizer: Any, tmp_path: Path
) -> None:
    _, folder = run
    (tmp_path / "page.pth").write_text("<html>404</html>")
    (tmp_path / "empty").mkdir()
    wrong = [
        ("checkpoint", tmp_path / "page.pth", {}, "page.pth cannot be read as a checkpoint"),
        ("beit", tmp_path / "none", {}, "source must be the folder of a beit model"),
        ("bert", tmp_path / "empty", {}, "source must be the folder of a bert model"),
        ("bert", folder, {}, "of a model of type 'bert', got 'svitt'"),
    ]
    for key, source, changes, message in wrong:
        recipe = make_recipe(tmp_path / "next", f"init.{key}={source}", **changes)
        with pytest.raises(ValueError, match=rf"^recipe: init\.{key}: .*{message}") as caught:
            build_model(recipe, tokenizer)
        assert "\n" not in str(caught.value)
    for changes, message in (
        ({"hidden_size": 32}, "hidden_size must be 16 as in the weights of .*, got 32"),
        ({"patch_size": 4}, "patch_size must be 8 as in the weights of .*, got 4"),
    ):
        recipe = make_recipe(tmp_path / "next", f"init.checkpoint={folder}", **changes)
        with pytest.raises(ValueError, match=rf"^recipe: model\.{message}$"):
            build_model(recipe, tokenizer)


def test_a_beit_of_another_resolution(make_recipe: Any, tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    beit = BeitModel(
        BeitConfig(
            image_size=24, patch_size=8, hidden_size=16, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=32, use_relative_position_bias=True,
        )
    )  # fmt: skip
    name = next(name for name in beit.state_dict() if name.endswith("bias_table"))
    torch.nn.init.normal_(beit.get_parameter(name))
    beit.save_pretrained(tmp_path / "beit")
    recipe = make_recipe(tmp_path / "next", f"init.beit={tmp_path / 'beit'}", num_frames=2)
    model = build_model(recipe, tokenizer)
    wanted = resize_bias_table(beit.state_dict()[name], 2, 2, source_grid=3)
    assert torch.equal(model.state_dict()[TABLE], wanted)


def test_official_resize_reads_whole_frames(make_recipe: Any, tmp_path: Path) -> None:
    options = ("data.resize=official", "data.short_side=256")
    dataset = build_dataset(make_recipe(tmp_path, *options), [], SViTTConfig(num_frames=2))
    assert dataset.spec.short_side is None
    with pytest.raises(ValueError, match=r"data\.resize must be one of antialias, official, got"):
        make_recipe(tmp_path, "data.resize=nearest")


def test_recipes_of_the_paper() -> None:
    for name in ("pretrain-4f", "pretrain-8f", "pretrain-16f"):
        assert load_recipe(name).model["text_dropout"] == 0.1
    assert load_recipe("pretrain-4f").tokenizer.append_sep is False

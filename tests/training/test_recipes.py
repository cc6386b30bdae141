"""Recipes: the shipped ones, overrides, and what is refused."""

from pathlib import Path

import pytest

from svitt_ops.training.recipes import load_recipe, recipe_text, shipped_recipes


@pytest.mark.parametrize(
    ("name", "frames", "keep", "lr", "batch"),
    [
        ("pretrain-4f", 4, 0.7, 3e-5, 512),
        ("pretrain-8f", 8, 0.6, 1e-5, 336),
        ("pretrain-16f", 16, 0.5, 5e-6, 192),
    ],
)
def test_stages_of_the_paper(name: str, frames: int, keep: float, lr: float, batch: int) -> None:
    recipe = load_recipe(name)
    assert recipe.model["num_frames"] == frames
    assert recipe.model["keep_rate"] == keep
    assert recipe.model["multimodal_keep_rate"] == 0.1
    assert (recipe.model["num_local"], recipe.model["num_random"]) == (1, 3)
    assert recipe.model["block_size"] == 56
    assert (recipe.optimizer.lr, recipe.optimizer.batch_size) == (lr, batch)
    assert (recipe.optimizer.epochs, recipe.optimizer.warmup_epochs) == (10, 1)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.min_lr_ratio) == (0.02, 0.01)
    assert recipe.data.text_length == 32
    assert (recipe.init.checkpoint is None) == (frames == 4)


def test_every_shipped_recipe_reads_back(tmp_path: Path) -> None:
    assert len(shipped_recipes()) >= 5
    for name in shipped_recipes():
        recipe = load_recipe(name)
        path = tmp_path / f"{name}.yaml"
        path.write_text(recipe_text(recipe))
        assert load_recipe(path) == recipe


def test_overrides() -> None:
    overrides = [
        "optimizer.lr=1e-4",
        "data.train.0.root=/videos",
        "model.num_frames=2",
        "run.trainer.fsdp=full_shard",
    ]
    recipe = load_recipe("pretrain-4f", overrides)
    assert recipe.optimizer.lr == 1e-4
    assert recipe.data.train[0].root == "/videos"
    assert recipe.data.train[1].root == "images/cc3m"
    assert recipe.model["num_frames"] == 2
    assert recipe.model["keep_rate"] == 0.7
    assert recipe.run.trainer == {"fsdp": "full_shard"}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.lrr=3", "optimizer.lrr"),
        ("optimiser.lr=3", "optimiser"),
        ("data.train.0.rot=3", "rot"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.lr", "key=value"),
        ("run.precision=fp8", "run.precision"),
        ("data.positives=all", "data.positives"),
        ("data.train.0.kind=audio", "kind"),
        ("optimizer.batch_size=0", "optimizer.batch_size"),
        ("optimizer.accumulation=3", "optimizer.accumulation"),
        ("data.crop_scale=[0.9,0.5]", "data.crop_scale"),
        ("tokenizer.train_vocab_size=100", "tokenizer"),
    ],
)
def test_wrong_overrides_are_named(override: str, named: str) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe("pretrain-4f", [override])
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optim: {lr: 3}", "optim"),
        ("data: {train: [{annotation: x}]}", "annotation"),
        ("optimizer: {lr: 3", "YAML"),
        ("- a\n- b", "mapping"),
        ("optimizer: 3", "Optimizer"),
        ("data: {train: {annotations: x}}", "container"),
        ("data: {train: [{root: x}]}", "annotations"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_recipe(path)
    assert named in str(error.value)
    assert "recipe" in str(error.value)


def test_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match="pretrain-4f"):
        load_recipe("pretrain-5f")

"""What a run needs is looked at before its first file is opened."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from svitt_ops.models import SViTTConfig
from svitt_ops.training.data.annotations import Entry
from svitt_ops.training.data.text import load_tokenizer
from svitt_ops.training.engine import gate
from svitt_ops.training.engine.folders import check_folder
from svitt_ops.training.engine.recipes import load_recipe, recipe_text
from svitt_ops.training.engine.run import pretrain


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def model_folder(folder: Path, kind: str, *, weights: bool = True) -> Path:
    """A folder as Hugging Face's, with one small tensor."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    if weights:
        save_file({"x": torch.zeros(3)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def no_file_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("annotations were opened")

    monkeypatch.setattr("svitt_ops.training.engine.build.read_annotations", refuse)


@pytest.mark.usefixtures("no_file_is_opened")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.0.annotations=no.json", r"data\.train\.0\.annotations: must be a file, got"),
        ("data.train.0.annotations=~/no.json", "home/no.json', which cannot be read: No such file"),
        ("data.train.0.annotations=folder", "folder'"),
        ("data.train.0.root=~/no", r"data\.train\.0\.root: must be a folder, got .*home/no'"),
        ("data.train.0.root=file", r"data\.train\.0\.root: must be a folder, .*it is no folder"),
        ("data.train.0.root=~nobody-here/v", r"data\.train\.0\.root: must be a path"),
        ("output=file", r"output: must be a folder to write to, .* file of that name"),
        ("output=file/run", r"output: must be a folder to write to, got .*Not a directory"),
        (
            "init.checkpoint=no",
            r"init\.checkpoint: must be the folder of a model or of a run, or a",
        ),
        ("init.checkpoint=bert", r"init\.checkpoint: .*bert', which holds a bert model"),
        ("init.checkpoint=empty", r"init\.checkpoint: .* which has a config\.json but no weights"),
        ("init.beit=no", r"init\.beit: must be a folder .*; get it by: hf download microsoft/beit"),
        ("init.bert=~/no", r"init\.bert: must be a folder .*; get it by: hf download google-bert/"),
        ("init.beit=bert", r"init\.beit: .*bert', which holds a bert model; get it by"),
        ("init.beit=file", r"init\.beit: .*which is a file"),
        ("init.beit=beit", r"init\.beit: .*beit', which has a config\.json but no weights"),
        ("init.bert=corrupt", r"init\.bert: .*whose model\.safetensors cannot be read: "),
        ("init.bert=shards", r"init\.bert: .*whose b\.safetensors is missing"),
        ("init.bert=strange", r"init\.bert: .*whose config\.json cannot be read"),
        ("tokenizer={name: no, train_vocab_size: null}", r"tokenizer\.name: must be a folder with"),
        ("tokenizer={name: bert, train_vocab_size: null}", r"tokenizer\.name: must "),
        ("tokenizer={train_vocab_size: null}", "tokenizer needs a name or a train_vocab_size"),
        ("data.text_length=33", r"at most model\.max_position_embeddings \(32\), got 33"),
        ("data.train=[]", r"data\.train must list at least one corpus"),
        (
            "run.trainer.accelerator_config={x: 1}",
            r"^recipe: run\.trainer must be .*TypeError: .*'x'",
        ),
        (
            "run.trainer.save_strategy=foo",
            r"^recipe: run\.trainer must be .*foo is not a valid Save",
        ),
        ("run.trainer.fp16=true", r"run\.trainer\.fp16 is not supported; set run\.precision"),
        ("run.trainer.gradient_accumulation_steps=2", r"must be set by optimizer\.accumulation"),
    ],
)
def test_what_is_not_there_is_named(
    make_recipe: Any, tmp_path: Path, override: str, message: str
) -> None:
    Path("file").touch()
    Path("folder").mkdir()
    model_folder(tmp_path / "bert", "bert")
    model_folder(tmp_path / "beit", "beit", weights=False)
    model_folder(tmp_path / "empty", "svitt", weights=False)
    corrupt = model_folder(tmp_path / "corrupt", "bert") / "model.safetensors"
    corrupt.write_bytes(corrupt.read_bytes()[:-5])
    shards = model_folder(tmp_path / "shards", "bert")
    (shards / "model.safetensors").rename(shards / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    strange = model_folder(tmp_path / "strange", "bert")
    (strange / "config.json").write_text("{oh")
    with pytest.raises(ValueError, match=message) as error:
        pretrain(make_recipe(tmp_path / "run", override))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_file_is_opened")
def test_the_model_is_checked_with_the_checkpoint_s_configuration(
    make_recipe: Any, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "small", "svitt")
    SViTTConfig(text_num_hidden_layers=3, fusion_layer=1).save_pretrained(folder)
    recipe = make_recipe(tmp_path / "run", "init.checkpoint=small")
    recipe.model = {"fusion_layer": 4}
    with pytest.raises(ValueError, match=r"recipe: model\.fusion_layer must be 0 to 3, got 4"):
        pretrain(recipe)
    recipe.model = {"text_num_hidden_layers": 4}
    assert gate.check_run(recipe).model == recipe.model


def test_one_missing_corpus_of_two_is_told_how_to_do_without() -> None:
    Path("my.json").touch()
    given = ["data.train.0.annotations=my.json", "data.train.0.root=null"]
    with pytest.raises(ValueError, match=r"cc3m_train\.json.*; data\.annotations=FILE data\.root="):
        gate.check_run(load_recipe("pretrain-4f", given))


def test_paths_become_whole(make_recipe: Any, corpus: Path, home: Path) -> None:
    (home / "corpus").symlink_to(corpus)
    recipe = make_recipe(
        Path("runs/x"),
        "data.train.0.annotations=~/corpus/train.json",
        "data.train.0.root=home/corpus",
        "optimizer.steps=1",
    )
    trained = pretrain(recipe)
    assert trained.folder == home.parent / "runs" / "x" / "final"
    written = load_recipe(home.parent / "runs" / "x" / "recipe.yaml")
    assert written.output == str(home.parent / "runs" / "x")
    assert written.data.train[0].annotations == str(home / "corpus" / "train.json")
    assert written.data.train[0].root == str(home / "corpus")
    assert recipe.output == "runs/x"  # that of the caller stays as it is
    assert recipe_text(gate.check_run(written)) == recipe_text(written)


def test_a_wrong_root_is_named_before_training(make_recipe: Any, home: Path) -> None:
    (home / "videos").mkdir()
    with pytest.raises(
        ValueError, match=r"data\.train\.0\.root: must be the folder of the files, n"
    ):
        pretrain(make_recipe(home / "run", f"data.train.0.root={home / 'videos'}"))


def test_epochs_that_make_no_step(make_recipe: Any, home: Path) -> None:
    options = ("optimizer.steps=null", "optimizer.epochs=0.1")
    with pytest.raises(ValueError, match=r"optimizer\.epochs must make at least one step, of 2 an"):
        pretrain(make_recipe(home / "run", *options))


def test_pairs_that_fill_no_batch_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    entries = [
        Entry(media=("a.mp4", "b.mp4"), captions=("x",), kind="video"),
        Entry(media=("c.mp4",), captions=("x",), kind="video"),
        Entry(media=("d.jpg",), captions=("x",), kind="image"),
    ]
    with caplog.at_level(logging.WARNING):
        gate.check_batches(entries, 3)
    assert "the 1 image pairs fill no batch of 3, and are never trained on" in caplog.text
    assert "video" not in caplog.text
    with pytest.raises(ValueError, match=r"got 4 for 3 video pairs and 1 image pairs, which"):
        gate.check_batches(entries, 4)


def test_weights_that_are_not_read_are_named(
    make_recipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_folder(tmp_path / "small", "svitt")
    SViTTConfig(max_position_embeddings=32).save_pretrained(tmp_path / "small")
    recipe = make_recipe(tmp_path / "run", "init.checkpoint=small", "init.bert=no")
    recipe.model = {}
    gate.check_run(recipe)
    assert "init.bert not read: init.checkpoint has all weights" in caplog.text


def test_folders_of_models(tmp_path: Path) -> None:
    model_folder(tmp_path / "good", "bert")
    check_folder("x", tmp_path / "good", ("bert",))
    check_folder("x", "~/../good", ("bert",))
    with pytest.raises(
        ValueError, match=r"x: must be a folder with a svitt model, .*no config\.json"
    ):
        check_folder("x", tmp_path, ("svitt",))
    with pytest.raises(ValueError, match="which is not on this machine"):
        check_folder("x", "somebody/some-model", ("bert",))


@pytest.mark.parametrize("content", ["{oh", "{}", "[]", ""])
def test_broken_tokenizers_are_named(tmp_path: Path, content: str) -> None:
    folder = model_folder(tmp_path / "words", "bert")
    with pytest.raises(ValueError, match="model: must have a vocabulary"):
        load_tokenizer(folder, "model")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="model: must") as error:
        load_tokenizer(folder, "model")
    assert "\n" not in str(error.value)

"""Protocols and recipes of tasks: their values, and what goes before what."""

import json
from pathlib import Path
from typing import Any

import pytest

from svitt_ops.training import cli
from svitt_ops.training.cli.evaluate import OF_ALL_TASKS, choose
from svitt_ops.training.corpora.pictures import build_pictures
from svitt_ops.training.corpora.scenes import PictureSpec
from svitt_ops.training.data.text import save_tokenizer
from svitt_ops.training.engine.protocols import load_protocol, shipped_protocols
from svitt_ops.training.engine.recipes import load_recipe, shipped_recipes
from svitt_ops.training.engine.task import Evaluable, load_task

NAMES = ["agqa", "anet", "anet-qa", "charades", "didemo", "lsmdc"]
NAMES += ["sts", "coco-hashing"]
NAMES += ["flickr30k", "coco-1k", "coco-5k", "vqa2", "nlvr2", "snli-ve", "refcoco-plus"]
NAMES += ["msrvtt-1ka", "msrvtt-7k", "msrvtt-mc", "msrvtt-qa", "ssv2-label", "ssv2-template"]
TABLE_A4 = {  # text, batch, rate, epochs, multimodal keep rate
    "retrieval-msrvtt": (32, 48, 1e-5, 15, 0.1),
    "retrieval-didemo": (64, 48, 1e-5, 15, 0.1),
    "retrieval-charades": (32, 48, 1e-5, 15, 0.1),
    "retrieval-ssv2-label": (32, 48, 1e-5, 15, 0.1),
    "retrieval-ssv2-template": (32, 48, 1e-5, 15, 0.1),
    "qa-msrvtt": (25, 128, 5e-5, 5, 0.5),
    "qa-anet": (25, 128, 5e-5, 5, 0.5),
    "qa-agqa": (25, 128, 5e-5, 1, 0.5),
}


def test_every_protocol_rules_what_its_task_knows() -> None:
    assert sorted(shipped_protocols()) == sorted(NAMES)
    for name in NAMES:
        protocol = load_protocol(name)
        task = load_task(protocol.task, Evaluable)
        told = {"answers", "database", "detections", "ensemble", "probe"}  # files, another question
        assert protocol.values.keys() == (OF_ALL_TASKS.keys() | task.OPTIONS.keys()) - told, name
        for key, value in protocol.values.items():
            default = task.OPTIONS.get(key)
            assert value is None or default is None or type(value) is type(default), (name, key)


def test_protocols_of_pictures() -> None:
    values = {name: load_protocol(name).values for name in NAMES}
    assert [values[f"coco-{k}k"]["folds"] for k in (1, 5)] == [5, 1]
    tops = [values[name]["top_k"] for name in ("flickr30k", "coco-1k", "coco-5k", "vqa2")]
    assert tops == [128, 256, 256, 128]
    assert values["vqa2"]["metric"] == "vqa"
    assert values["refcoco-plus"]["layer"] == 8
    assert [load_protocol(name).task for name in ("nlvr2", "snli-ve")] == [
        "reasoning",
        "entailment",
    ]


@pytest.mark.parametrize("name", TABLE_A4)
def test_recipes_have_the_paper_s_values(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert name in shipped_recipes()
    recipe: Any = load_recipe(name)
    optimizer = recipe.optimizer
    found = (recipe.data.text_length, optimizer.batch_size, optimizer.lr, optimizer.epochs)
    assert (*found, recipe.model["multimodal_keep_rate"]) == TABLE_A4[name]
    assert (recipe.model["num_frames"], recipe.model["keep_rate"]) == (8, 0.6)
    assert (optimizer.min_lr_ratio, optimizer.warmup_epochs) == (0.1, 0)
    assert recipe.evaluation.clips == 3
    assert cli.main(["finetune", "--config", name, "--show"]) == 0
    assert f"task: {recipe.task}\n" in capsys.readouterr().out


def test_an_option_goes_before_the_protocol_and_this_before_the_run() -> None:
    protocol = load_protocol("msrvtt-mc")
    defaults = {"frames": None, "clips": 1, "merge": "mean", "strided": True, "probe": False}
    found = choose(defaults, {"clips": 2, "merge": None}, protocol, {"clips": 9, "probe": True})
    assert found.values == {
        "frames": None,
        "clips": 2,
        "merge": "logsumexp",
        "strided": False,
        "probe": True,
    }
    wanted = ["default", "option", "protocol", "protocol", "run"]
    assert list(found.sources.values()) == wanted
    assert found.overridden == {"clips": 3}
    same = choose(defaults, {"clips": 3}, protocol, {})
    assert (same.overridden, same.sources["clips"]) == ({}, "option")


def test_what_the_numbers_were_measured_with(
    trained: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, _ = trained
    model.save_pretrained(tmp_path / "run")
    save_tokenizer(tokenizer, tmp_path / "run")
    target = tmp_path / "found.json"
    words = ["evaluate", "retrieval", str(tmp_path / "run"), "--cpu", "--workers", "0"]
    words += ["--annotations", str(corpus / "test.json"), "--protocol"]
    assert cli.main([*words, "charades", "--top-k", "4", "--json", str(target)]) == 0
    assert "not as charades: top_k 4, there 128" in capsys.readouterr().out
    settings = json.loads(target.read_text())["settings"]
    assert settings["protocol"] == "charades"
    assert settings["overridden"] == {"top_k": 128}
    assert (settings["clips"], settings["top_k"], settings["text_length"]) == (3, 4, 32)
    sources = settings["sources"]
    assert (sources["clips"], sources["top_k"], sources["frames"]) == ("protocol", "option", "run")
    assert cli.main([*words, "didemo"]) == 2  # longer texts than the model takes
    assert "--text-length: must be 3 to 32 tokens" in capsys.readouterr().err
    assert cli.main([*words, "agqa"]) == 2
    assert "--protocol: agqa is of qa, got retrieval" in capsys.readouterr().err
    assert cli.main([*words, "charade"]) == 2
    assert "did you mean 'charades'?" in capsys.readouterr().err
    assert cli.main([*words, "charades", "--no-strided", "--no-paragraph"]) == 0


def test_pictures_are_searched_in_parts(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, _ = trained
    model.save_pretrained(tmp_path / "run")
    save_tokenizer(tokenizer, tmp_path / "run")
    spec = PictureSpec(train_pictures=10, validation_pictures=10, test_pictures=20, size=32)
    annotations = build_pictures(tmp_path, spec)["test"]
    target = tmp_path / "found.json"
    words = ["evaluate", "retrieval", str(tmp_path / "run"), "--cpu", "--workers", "0"]
    words += ["--annotations", str(annotations), "--kind", "image", "--json", str(target)]
    assert cli.main([*words, "--protocol", "coco-1k"]) == 0
    assert "40 texts, 20 videos, the mean of 5 parts" in capsys.readouterr().out
    parts = json.loads(target.read_text())
    assert (parts["settings"]["folds"], parts["settings"]["sources"]["folds"]) == (5, "protocol")
    assert parts["video_to_text"]["R10"] == 100  # of eight texts
    assert cli.main([*words, "--protocol", "coco-5k"]) == 0
    whole = json.loads(target.read_text())
    assert parts["mean"] > whole["mean"]
    assert cli.main([*words, "--folds", "21"]) == 2
    assert "--folds: must be 1 to 20, the number of videos, got 21" in capsys.readouterr().err

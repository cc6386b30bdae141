"""A system and a task that are files beside the others: trained, evaluated and refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import svitt_ops.models
from svitt_ops.models import frozen
from svitt_ops.training import cli, tasks
from svitt_ops.training.engine.loading import load_trained
from svitt_ops.training.engine.recipes import load_recipe, recipe_text
from svitt_ops.training.engine.run import pretrain

SYSTEM = '''
"""A system that differs from its parent by name."""
from svitt_ops.models.frozen import FrozenConfig, FrozenForRetrieval
from svitt_ops.models.parts.system import System

class OwnConfig(FrozenConfig):
    model_type = "own"

class OwnForPreTraining(FrozenForRetrieval):
    config_class = OwnConfig

SYSTEM = System(config=OwnConfig, models={"pretraining": OwnForPreTraining})
'''
TASK = '''
"""Pretraining on the first pairs, and how many there are."""
from dataclasses import dataclass, field
from svitt_ops.training.engine import recipes
from svitt_ops.training.tasks import pretrain
from svitt_ops.training.tasks.pretrain import HEAD, build_collator, build_dataset, model_inputs

OPTIONS = {"clips": 3}

@dataclass
class Recipe(recipes.Recipe):
    first: int = 8
    answers: str | None = field(default=None, metadata=recipes.PATH)

def check(recipe):
    if recipe.first < 1:
        raise ValueError(f"recipe: first must be at least 1, got {recipe.first}")

def read_examples(recipe):
    return pretrain.read_examples(recipe)[: recipe.first]

def evaluate(model, tokenizer, examples, reading, options):
    return {"examples": len(examples), "kind": model.config.model_type}

def render(facts):
    return f"{facts['examples']} examples"
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, name, text in (
        (svitt_ops.models, "own_system", SYSTEM),
        (tasks, "own_task", TASK),
    ):
        folder = tmp_path / name
        module = folder / name / "__init__.py" if name == "own_system" else folder / f"{name}.py"
        module.parent.mkdir(parents=True)
        module.write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])


@pytest.mark.usefixtures("own")
def test_they_are_trained_and_evaluated(
    make_recipe: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "own.yaml"
    stored.write_text("system: own_system\ntask: own_task\nfirst: 10\n")
    mine = load_recipe(stored, ["answers=~/a: b"])
    assert "first: 10\n" in recipe_text(mine)
    assert mine.answers == str(Path.home() / "a: b")  # type: ignore[attr-defined]
    recipe = make_recipe(
        tmp_path / "run",
        "system=own_system",
        "task=own_task",
        "first=9",
        "optimizer.steps=2",
        fusion_layer=3,
        multimodal_prune_layers=[],
    )
    trained = pretrain(recipe)
    assert type(trained.model).__name__ == "OwnForPreTraining"
    assert {name for name in trained.history[0] if name.startswith("loss")} == {"loss", "loss_vtc"}
    assert type(load_trained(tmp_path / "run")[0]) is type(trained.model)

    words = ["evaluate", "own-task", str(tmp_path / "run"), "--annotations"]
    words += [str(corpus / "test.json"), "--cpu", "--json", str(tmp_path / "found.json")]
    assert cli.main(words) == 0
    assert "8 examples" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["kind"], found["settings"]["clips"]) == ("own", 3)
    assert "merge" not in found["settings"]
    assert cli.main([*words, "--merge", "max"]) == 2
    assert "--merge: is no option of own-task" in capsys.readouterr().err
    assert cli.main(["evaluate", "retrieval", *words[2:]]) == 2
    assert "model: must be a folder with a albef or " in capsys.readouterr().err


@pytest.mark.usefixtures("own")
def test_their_values_are_checked() -> None:
    with pytest.raises(ValueError, match="recipe: first must be at least 1, got 0"):
        load_recipe(None, ["task=own_task", "first=0"])
    with pytest.raises(ValueError, match="first"):
        load_recipe(None, ["first=3"])
    with pytest.raises(ValueError, match="has no key 'fusion_layers'; did you mean 'fusion_layer'"):
        load_recipe(None, ["system=own_system", "model.fusion_layers=3"])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("task=none", "recipe: task must be one of .*pretrain.*, got 'none'"),
        ("task=parts", "recipe: task must be one of .*pretrain.*, got 'parts'"),
        ("system=parts", "recipe: system must be one of albef, .*svitt.*, got 'parts'"),
    ],
)
def test_a_name_that_is_none(override: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        load_recipe("small", [override])


def test_a_system_without_a_model_for_the_task() -> None:
    line = (
        "system must be one of .*svitt.*, which have a model for question_answering, got 'frozen'"
    )
    with pytest.raises(ValueError, match=line):
        load_recipe(None, ["system=frozen", "task=qa"])


def test_frozen_is_trained_by_the_same_engine(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"fusion_layer": 3, "multimodal_prune_layers": []}
    recipe = make_recipe(tmp_path, "system=frozen", "optimizer.steps=2", **options)
    trained = pretrain(recipe)
    assert trained.model.config.model_type == "svitt-frozen"
    beit = make_recipe(tmp_path / "b", "system=frozen", f"init.beit={tmp_path}", **options)
    with pytest.raises(ValueError, match=r"init\.beit must be null, frozen does not start from"):
        pretrain(beit)
    official = tmp_path / "official.pth"
    official.write_bytes(b"")
    start = make_recipe(tmp_path / "o", "system=frozen", f"init.checkpoint={official}", **options)
    monkeypatch.setattr(frozen, "SYSTEM", replace(frozen.SYSTEM, load_official=None))
    with pytest.raises(ValueError, match=r"init\.checkpoint: must be .*has no official files, got"):
        pretrain(start)
    for more in ((), ("optimizer.steps=9",)):  # complete, and to be gone on with
        other = make_recipe(tmp_path, "optimizer.steps=2", *more)
        with pytest.raises(ValueError, match="recipe: system must be 'frozen', as that of the run"):
            pretrain(other)

"""`svitt demo --system S`: demos on pictures that are over in seconds."""

import json
from functools import partial
from pathlib import Path

import pytest

from svitt_ops.training import cli
from svitt_ops.training.cli import demo_pictures
from svitt_ops.training.cli.stages import prepare
from svitt_ops.training.corpora.scenes import PictureSpec
from svitt_ops.training.engine.recipes import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread", "small")
TASKS = {
    "albef": ["retrieval", "qa", "reasoning", "entailment", "grounding"],
    "simla": ["retrieval", "qa", "reasoning", "entailment", "grounding"],
    "softmask": ["retrieval", "qa", "grounding"],
    "scl": ["retrieval", "qa"],
    "cookie": ["retrieval", "text_similarity", "hashing"],
}
SHORT = ["optimizer.steps=2", "optimizer.batch_size=8", "run.tensorboard=false"]
FEW = {"train_pictures": 24, "validation_pictures": 10, "test_pictures": 10}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pictures."""
    monkeypatch.setattr(demo_pictures, "PictureSpec", partial(PictureSpec, **FEW))


@pytest.mark.parametrize("system", TASKS)
def test_demo(system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    words = ["demo", "--system", system, "--output", str(folder)]
    assert cli.main([*words, "--seed", "1", *SHORT]) == 0
    out, err = capsys.readouterr()
    last = "fine-tune qa" if "qa" in TASKS[system] else "fine-tune hashing"
    for phase in ("draw corpus", "pretrain towers", "pretrain match", last):
        assert phase in err
    facts = json.loads((folder / "demo.json").read_text())
    assert (facts["system"], facts["seed"], facts["overrides"]) == (system, 1, SHORT)
    assert list(facts["tasks"]) == TASKS[system]
    for name, task in facts["tasks"].items():
        least = -100 if name == "text_similarity" else 0
        assert least <= task["score"] <= 100 and 0 <= task["chance"] <= 100
        assert bool(task["chance"]) == (name != "text_similarity")
    assert facts["tasks"]["retrieval"]["chance"] == 10
    if "grounding" in TASKS[system]:
        assert 0 <= facts["tasks"]["grounding"]["untrained"] <= 100
    assert facts["corpus"]["test_pictures"] == facts["tasks"]["retrieval"]["pictures"] == 10
    assert set(facts["seconds"]) == {
        *demo_pictures.SYSTEMS[system],
        *("corpus", "evaluation", "total"),
    }
    assert facts["load"] >= 0 and not facts["resumed"]
    assert demo_pictures.render_demo(facts) in out
    for task in TASKS[system]:
        assert f"{task}: " in out
    goes_on_with_the_same_alone(words, folder, capsys)
    if system == "softmask":
        leaves_nothing(folder)


def goes_on_with_the_same_alone(
    words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((folder / "demo.json").read_text())
    other = "simla" if "albef" in words else "albef"
    assert cli.main([*words, "--system", other, "--resume", *SHORT]) == 2
    assert "--resume: must be the demo's system" in capsys.readouterr().err
    assert cli.main([*words, "--seed", "1", "--resume", *SHORT]) == 0
    assert "draw corpus" not in capsys.readouterr().err
    after = json.loads((folder / "demo.json").read_text())
    assert after["tasks"] == before["tasks"] and after["resumed"]


def leaves_nothing(folder: Path) -> None:
    """Of a demo, to the next one; what is the user's stays."""
    mine = [folder / "corpus" / "pictures" / "holiday.png", folder / "match" / "b.txt"]
    for path in mine:
        path.write_text(path.name)
    prepare(folder, resume=False)
    left = [path for path in folder.rglob("*") if path.is_file()]
    assert sorted(left) == sorted([*mine, folder / "demo.json"])


def test_a_stage_alone_is_overridden() -> None:
    given = ["optimizer.steps=7", "match.optimizer.steps=3", "match.model.alpha=0.1"]
    recipes = demo_pictures._recipes(Path("unused"), "albef", 4, given)
    steps = {name: recipe.optimizer.steps for name, recipe in recipes.items()}
    assert steps == dict.fromkeys(recipes, 7) | {"match": 3}
    assert [name for name, x in recipes.items() if x.model.get("alpha") == 0.1] == ["match"]
    assert {recipe.seed for recipe in recipes.values()} == {4}


@pytest.mark.parametrize("system", TASKS)
def test_each_stage_starts_from_an_earlier_one(system: str) -> None:
    folder = Path("unused").absolute()
    recipes = demo_pictures._recipes(folder, system, 0, [])
    seen: list[str] = []
    for name, recipe in recipes.items():
        assert (recipe.system, Path(recipe.output)) == (system, folder / name)
        start = recipe.init.checkpoint
        assert start is None if not seen else Path(str(start)).name in seen
        seen.append(name)
    assert {*TASKS[system]} - {"retrieval", "text_similarity"} <= {*seen}


def test_recipes_stand_alone() -> None:
    for system in ("albef", "scl", "cookie"):
        for stage in demo_pictures.stages_of(system).values():
            recipe = load_recipe(stage.recipe)
            assert recipe.system == system and recipe.data.train[0].kind == "image"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--system=simla", "--motion"], "--motion: is of films, got --system simla"),
        (["--system=softmask", "reasoning.seed=1"], "a stage of softmask's, towers, match, qa"),
        (["--system=albef", "match.init.checkpoint=x"], "must leave output, seed, init"),
        (["--system=albef", "qa.optimizer.lr=-1"], "optimizer.lr"),
    ],
)
def test_refusals(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", f"--output={tmp_path / 'new'}", *words]) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

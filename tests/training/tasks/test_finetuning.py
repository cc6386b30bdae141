"""Every task is trained from a pretrained model, evaluated, killed, resumed, shared among ranks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from running import DENSE, ENOUGH, losses, run_killed, write

from svitt_ops.training import cli
from svitt_ops.training.engine.checkpoints import checkpoints
from svitt_ops.training.engine.loading import load_trained
from svitt_ops.training.engine.recipes import load_recipe
from svitt_ops.training.engine.run import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
CHOICE = "multiple_choice"
FILES = {"retrieval": "", "qa": "_qa", CHOICE: "_multiple_choice"}
MODELS = {"retrieval": "Retrieval", "qa": "QuestionAnswering", "multiple_choice": "MultipleChoice"}
NUMBERS = {"retrieval": "mean", "qa": "accuracy", "multiple_choice": "accuracy"}
OF_SYSTEMS = {"svitt": {}, "singularity": {**DENSE, "temporal_layers": 1}}
PREFIXES = {"svitt": "SViTT", "singularity": "Singularity"}
CASES = [(system, task) for system in OF_SYSTEMS for task in FILES]
LONG = [(system, task) for system, task in CASES if (system, task) != ("singularity", CHOICE)]
"""Those with code of their own, of what takes several processes."""


@pytest.fixture(scope="module")
def pretrained(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each system."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pretrained")
    return {
        system: pretrain(
            make_recipe(folder / system, f"system={system}", "optimizer.steps=2", **model)
        ).folder
        for system, model in OF_SYSTEMS.items()
    }


@pytest.fixture
def make(make_recipe: Any, corpus: Path, pretrained: dict[str, Path]) -> Any:
    """Recipes of a task that start from the pretrained model."""

    def recipe(task: str, output: Path, *overrides: str, system: str, **model: Any) -> Any:
        files = {split: corpus / f"{split}{FILES[task]}.json" for split in ("train", "test")}
        found = make_recipe(
            output,
            f"system={system}",
            f"task={task}",
            f"init.checkpoint={pretrained[system]}",
            "tokenizer.train_vocab_size=null",
            f"data.train=[{{annotations: {files['train']}}}]",
            f"data.validation=[{{annotations: {files['test']}}}]",
            *([f"data.answers={corpus / 'answers.json'}"] if task == "qa" else []),
            *overrides,
        )
        found.model = model
        return found

    return recipe


@pytest.mark.parametrize(("system", "task"), CASES)
def test_from_a_pretrained_model_to_numbers(
    system: str,
    task: str,
    make: Any,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make(task, tmp_path / "run", "evaluation.clips=2", system=system, num_frames=2)
    path = write(recipe, tmp_path / "recipe.yaml")
    assert cli.main(["finetune", "--config", str(path)]) == 0
    output = capsys.readouterr()
    assert f"model: {tmp_path / 'run' / 'final'}\nbest:  {tmp_path / 'run' / 'best'}" in output.out
    assert f"{task}: step 6: score" in output.err
    model, _, _ = load_trained(tmp_path / "run")
    assert type(model).__name__ == f"{PREFIXES[system]}For{MODELS[task]}"
    assert model.config.num_frames == 2
    best = json.loads((tmp_path / "run" / "best" / "validation.json").read_text())

    target = tmp_path / "found.json"
    words = ["evaluate", task.replace("_", "-"), str(tmp_path / "run" / "best"), "--annotations"]
    words += [str(corpus / f"test{FILES[task]}.json"), "--cpu", "--workers", "0"]
    assert cli.main([*words, "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found[NUMBERS[task]] == best["score"]
    settings = found["settings"]
    assert (settings["clips"], settings["frames"], settings["text_length"]) == (2, 2, 12)
    assert settings["sources"]["clips"] == settings["sources"]["frames"] == "run"
    assert settings["sources"]["strided"] == "run"
    words += ["--probe", "--clips", "1", "--frames", "4", "--text-length", "9"]
    assert cli.main([*words, "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert {"normal", "shuffled", "reversed", "frozen", "delta"} < set(found)
    settings = found["settings"]
    assert (settings["clips"], settings["frames"], settings["text_length"]) == (1, 4, 9)
    assert [settings["sources"][k] for k in ("clips", "frames", "merge")] == ["option"] * 2 + [
        "run"
    ]
    assert "normal - shuffled" in capsys.readouterr().out


@pytest.mark.parametrize(("system", "task"), LONG)
def test_killed_and_resumed(system: str, task: str, make: Any, tmp_path: Path) -> None:
    options = ("optimizer.steps=9", "run.save_steps=2", "run.evaluate_steps=3")
    random = {"system": system, "text_dropout": 0.1}
    whole = losses(pretrain(make(task, tmp_path / "whole", *options, **random)))
    recipe = make(task, tmp_path / "killed", *options, **random)
    path = write(recipe, tmp_path / "killed.yaml")
    run_killed(6, "finetune", "--config", str(path))
    assert [step for step, _ in checkpoints(tmp_path / "killed")] == [2, 4]
    resumed = pretrain(recipe)
    assert resumed.began_at == 4
    assert losses(resumed) == {step: parts for step, parts in whole.items() if step > 4}
    stored = [tmp_path / name / "best" / "validation.json" for name in ("whole", "killed")]
    assert stored[0].read_text() == stored[1].read_text()


@pytest.mark.parametrize(("system", "task"), LONG)
def test_two_ranks_equal_one_process(
    system: str, task: str, make: Any, two_ranks: Any, tmp_path: Path
) -> None:
    # Matching draws its negatives from the pairs of a process.
    model: dict[str, Any] = {"system": system}
    if task != "qa":
        model["loss_weights"] = {"vtc": 1, "vtm": 0, "mlm": 0}
    options = ["optimizer.steps=3", "run.save_steps=3"]
    if task == "multiple_choice":  # by a match head
        options.append("data.validation=[]")
    recipe = make(task, tmp_path / "two", *options, **model)
    path = write(recipe, tmp_path / "two.yaml")
    process = two_ranks("finetune", "--config", str(path))
    one = pretrain(make(task, tmp_path / "one", *options, **model))
    assert process.wait(timeout=ENOUGH) == 0
    state = json.loads((tmp_path / "two" / "checkpoint-3" / "trainer_state.json").read_text())
    two = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    wanted = {step: parts[0] for step, parts in losses(one).items()}
    assert all(map(math.isfinite, wanted.values()))
    assert two == pytest.approx(wanted, rel=1e-5)


def test_what_is_not_pretrained(make: Any, tmp_path: Path, capsys: Any) -> None:
    recipe = make("qa", tmp_path / "run", "init.checkpoint=null", system="svitt")
    path = write(recipe, tmp_path / "recipe.yaml")
    assert cli.main(["finetune", "--config", str(path)]) == 2
    assert "init.checkpoint must be the folder of a pretrained model" in capsys.readouterr().err
    assert cli.main(["finetune", "--config", str(path), "--show"]) == 0
    assert load_recipe(path).task == "qa"


def test_a_model_that_was_not_trained_for_it(
    pretrained: dict[str, Path], corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "qa", str(pretrained["svitt"]), "--cpu", "--workers", "0"]
    words += ["--annotations", str(corpus / "test_qa.json"), "--answers"]
    assert cli.main([*words, str(corpus / "answers.json")]) == 2
    message = "model: must be trained for question_answering, "
    assert message in capsys.readouterr().err

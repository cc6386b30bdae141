"""Evaluation while a model is trained: what it finds, what is kept, and that training goes on."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ENOUGH, StopAt, losses, run, write
from transformers import PreTrainedModel

from svitt_ops.training.engine.checkpoints import checkpoints
from svitt_ops.training.engine.loading import load_trained
from svitt_ops.training.engine.publishing import Publisher
from svitt_ops.training.engine.recipes import load_recipe
from svitt_ops.training.engine.run import pretrain
from svitt_ops.training.engine.settings import RunSettings, run_settings
from svitt_ops.training.engine.validation import Validation, best_score
from svitt_ops.training.tasks.retrieval import read_validation

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = {"loss_weights": {"vtc": 1, "vtm": 1, "mlm": 0}, "text_dropout": 0.1}


@pytest.fixture
def make(make_recipe: Any, corpus: Path) -> Any:
    """Recipes of retrieval, evaluated every second step."""

    def recipe(output: Path, *overrides: str, **model: Any) -> Any:
        validation = f"data.validation=[{{annotations: {corpus / 'test.json'}}}]"
        options = ("task=retrieval", validation, "run.evaluate_steps=2", "evaluation.clips=2")
        return make_recipe(output, *options, *overrides, **(PAIRS | model))

    return recipe


def scores(trained: Any) -> dict[int, float]:
    return {entry["step"]: entry["eval_score"] for entry in trained.history if "eval_best" in entry}


def test_training_does_not_notice(make: Any, tmp_path: Path, capsys: Any) -> None:
    recipe = make(tmp_path / "run", "run.tensorboard=true", eval_pattern_seed=None)
    trained = pretrain(recipe)
    found = scores(trained)
    assert list(found) == [2, 4, 6]
    assert "retrieval: step 4: score " in capsys.readouterr().err
    best = json.loads((tmp_path / "run" / "best" / "validation.json").read_text())
    assert best["score"] == max(found.values()) == trained.history[-2]["eval_best"]
    assert found[best["step"]] == best["score"]
    assert best["step"] == min(step for step in found if found[step] == best["score"])
    assert trained.best == tmp_path / "run" / "best"
    model, _, _ = load_trained(trained.best, "retrieval")
    if best["step"] == 6:
        assert torch.equal(model.temperature, trained.model.temperature)
    assert run_settings(trained.best) == RunSettings(text_length=12, short_side=None)
    recipe = make(tmp_path / "blind", "data.validation=[]", eval_pattern_seed=None)
    blind = pretrain(recipe)
    assert losses(blind) == losses(trained)
    assert (scores(blind), blind.best) == ({}, None)
    assert pretrain(make(tmp_path / "run")).best == trained.best  # complete


def test_points_of_evaluations(make: Any, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pretrain(make(tmp_path / "run", "run.tensorboard=true", "optimizer.steps=2"))
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    found = reader.EventAccumulator(str(events))
    found.Reload()
    assert [event.step for event in found.Scalars("eval/text_to_video_R1")] == [2]
    assert {"eval/score", "eval/best"} <= set(found.Tags()["scalars"])


@pytest.mark.parametrize("evaluate_steps", [None, 4])
def test_when_it_is_due(make: Any, tmp_path: Path, evaluate_steps: int | None) -> None:
    recipe = make(tmp_path, "optimizer.accumulation=2")
    recipe.run.evaluate_steps = evaluate_steps
    every = Validation(
        recipe=recipe,
        validate=lambda model: {"score": 0.0},
        publisher=Publisher(recipe=recipe, tokenizer=None),
        batches_per_epoch=5,  # an epoch is two steps and a half
        steps=11,
    )
    due = [step for step in range(1, 12) if every.is_due(step)]
    assert due == ([4, 8, 11] if evaluate_steps else [3, 5, 8, 10, 11])


def test_killed_while_the_best_are_replaced(make: Any, tmp_path: Path) -> None:
    whole = pretrain(make(tmp_path / "whole", "run.save_steps=3"))
    recipe = make(tmp_path / "killed", "run.save_steps=3")
    path = write(recipe, tmp_path / "killed.yaml")
    dying = """
import os, signal, sys
from pathlib import Path
from svitt_ops.training.engine import checkpoints, validation
run = validation.Validation.run
def better(self, model, step):
    self.validate = lambda model: {"score": float(step)}
    return run(self, model, step)
validation.Validation.run = better
rename = Path.rename
def die(self, target):
    if self.name == ".partial-best" and (self.parent / ".partial-old-best").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = die
from svitt_ops.training.cli import main
main(["pretrain", "--config", sys.argv[1]])
"""
    process = run(sys.executable, "-c", dying, str(path))
    assert process.wait(timeout=ENOUGH) == -signal.SIGKILL
    output = tmp_path / "killed"
    assert [step for step, _ in checkpoints(output)] == [3]
    assert not (output / "best").exists()
    resumed = pretrain(recipe, callbacks=[StopAt(5)])
    assert resumed.began_at == 3
    assert {k: v for k, v in losses(whole).items() if 3 < k < 6} == losses(resumed)
    kept = json.loads((output / "best" / "validation.json").read_text())
    # Those of step 2 were put back, and are the best until a true score is higher than theirs.
    assert kept["step"] == 2 if scores(resumed)[4] <= 2 else kept["score"] == scores(resumed)[4]
    assert not list(output.glob(".partial-*"))


def test_best_of_another_run_is_forgotten(make: Any, tmp_path: Path, caplog: Any) -> None:
    first = pretrain(make(tmp_path / "run", "optimizer.steps=2"))
    assert first.best is not None
    for _, path in checkpoints(tmp_path / "run"):
        shutil.rmtree(path)
    stored = first.best / "validation.json"
    stored.write_text(json.dumps({"step": 2, "score": 101}))
    again = pretrain(make(tmp_path / "run", "optimizer.steps=2"))
    assert "is of an earlier run, and removed" in caplog.text
    assert best_score(again.best or tmp_path) == scores(again)[2]
    stored.write_text("{}")
    assert best_score(first.best) is None
    assert "validation.json: cannot be read" in caplog.text


@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_find_what_one_does(
    make: Any, two_ranks: Any, tmp_path: Path, sharded: bool
) -> None:
    contrastive = {"loss_weights": {"vtc": 1, "vtm": 0, "mlm": 0}, "text_dropout": 0.0}
    options = ("optimizer.steps=4", "run.save_steps=4")
    more = ("run.trainer.fsdp=true",) if sharded else ()
    path = write(make(tmp_path / "two", *options, *more, **contrastive), tmp_path / "two.yaml")
    process = two_ranks("pretrain", "--config", str(path))
    one = pretrain(make(tmp_path / "one", *options, **contrastive))
    assert process.wait(timeout=ENOUGH) == 0
    state = json.loads((tmp_path / "two" / "checkpoint-4" / "trainer_state.json").read_text())
    history = state["log_history"]
    two = {entry["step"]: entry["eval_score"] for entry in history if "eval_score" in entry}
    assert two.keys() == scores(one).keys()
    assert two == pytest.approx(scores(one), abs=15)  # of 8 texts one may change its rank
    wanted = {step: parts[0] for step, parts in losses(one).items()}
    assert {e["step"]: e["loss"] for e in history if "loss" in e} == pytest.approx(wanted, rel=1e-4)
    best = json.loads((tmp_path / "two" / "best" / "validation.json").read_text())
    assert best["score"] == max(two.values())
    model, _, _ = load_trained(tmp_path / "two" / "best", "retrieval")
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_full_disk_leaves_the_best_as_it_was(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pretrain(make(tmp_path / "run", "optimizer.steps=2"))
    best = first.best
    assert best is not None
    (best / "validation.json").write_text(json.dumps({"step": 2, "score": 1.0}))
    before = {path.name: path.read_bytes() for path in best.iterdir()}
    save = PreTrainedModel.save_pretrained

    def full(self: Any, folder: Any, **options: Any) -> None:
        save(self, folder, **options)
        if "best" in str(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(ValueError, match=r"best: cannot be written: No space .* last checkpoint"):
        pretrain(make(tmp_path / "run", "optimizer.steps=4"))
    assert {path.name: path.read_bytes() for path in best.iterdir()} == before


def test_held_out_entries_need_not_stay_together(make: Any, corpus: Path, tmp_path: Path) -> None:
    entries = json.loads((corpus / "test.json").read_text())
    alone = [{"video": str(corpus / e["video"]), "caption": e["caption"]} for e in entries]
    (tmp_path / "test.json").write_text(json.dumps(alone))
    recipe = make(tmp_path, f"data.validation=[{{annotations: {tmp_path / 'test.json'}}}]")
    assert recipe.data.keep_together == "scene"
    assert len(read_validation(recipe).videos) == 8


def test_what_cannot_be(make: Any, make_recipe: Any, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.validation must be empty, pretrain is not"):
        make_recipe(tmp_path, f"data.validation=[{{annotations: {corpus / 'test.json'}}}]")
    with pytest.raises(ValueError, match=r"run\.evaluate_steps must be at least 1, got 0"):
        make(tmp_path, "run.evaluate_steps=0")
    with pytest.raises(ValueError, match="evaluation: clips must be at least 1, got 0"):
        make(tmp_path, "evaluation.clips=0")
    with pytest.raises(ValueError, match=r"data\.validation\.0\.kind must be one of"):
        make(tmp_path, "data.validation.0.kind=audio")
    with pytest.raises(ValueError, match=r"data\.validation\.0\.annotations: .*none\.json"):
        pretrain(make(tmp_path, "data.validation=[{annotations: none.json}]"))
    stored = write(make(tmp_path), tmp_path / "stored.yaml")
    assert load_recipe(stored, ["data.annotations=a.json"]).data.validation == []
    second = make(tmp_path, "data.validation.1.annotations=b.json")
    assert [Path(c.annotations).name for c in second.data.validation] == ["test.json", "b.json"]

"""Runs over shards and over datasets go as over files: on two ranks, and killed and resumed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("webdataset")
pytest.importorskip("datasets")

from packing import write_dataset, write_shards
from running import ENOUGH, losses, run_killed, write

from svitt_ops.training import cli
from svitt_ops.training.engine.checkpoints import checkpoints
from svitt_ops.training.engine.recipes import Recipe, load_recipe
from svitt_ops.training.engine.run import Trained, pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
PACK: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "shards": (write_shards, ""),
    "dataset": (write_dataset, ", columns: {video: clip, caption: text}"),
}
# Matching draws its negatives from the pairs of a process.
MODEL = {"loss_weights": {"vtc": 1, "vtm": 0, "mlm": 0}}
OPTIONS = ("optimizer.steps=4", "run.save_steps=2", "run.keep_checkpoints=9")


@pytest.fixture(scope="module")
def over_files(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    return pretrain(make_recipe(tmp_path_factory.mktemp("files") / "run", *OPTIONS, **MODEL))


def over(form: str, tmp_path: Path, corpus: Path, make_recipe: Any) -> Recipe:
    pack, columns = PACK[form]
    source = pack(tmp_path / form, corpus / "train.json")
    where = f"data.train=[{{annotations: {source}{columns}}}]"
    return make_recipe(tmp_path / "run", *OPTIONS, where, "data.workers=1", **MODEL)


@pytest.mark.parametrize("form", PACK)
def test_killed_and_resumed_by_one_process_and_by_two(
    form: str,
    make_recipe: Any,
    corpus: Path,
    over_files: Trained,
    two_ranks: Any,
    tmp_path: Path,
) -> None:
    recipe = over(form, tmp_path, corpus, make_recipe)
    run_killed(4, "pretrain", "--config", str(write(recipe, tmp_path / "run.yaml")))
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [2]
    shutil.copytree(tmp_path / "run", tmp_path / "two")
    words = ("pretrain", "--config", str(tmp_path / "run.yaml"), f"output={tmp_path / 'two'}")
    both = two_ranks(*words)
    resumed = pretrain(recipe)
    assert resumed.began_at == 2
    assert not resumed.skipped.reasons
    wanted = {step: parts for step, parts in losses(over_files).items() if step > 2}
    assert losses(resumed) == wanted
    assert both.wait(timeout=ENOUGH) == 0
    state = json.loads((tmp_path / "two" / "checkpoint-4" / "trainer_state.json").read_text())
    found = {x["step"]: x["loss"] for x in state["log_history"] if x.get("loss") and x["step"] > 2}
    assert found == pytest.approx({step: parts[0] for step, parts in wanted.items()}, rel=1e-5)


def test_questions_of_shards_are_those_of_a_file(
    corpus: Path, tmp_path: Path, make_recipe: Any
) -> None:
    """Another task, whose fields are those of the JSON beside each film."""
    from svitt_ops.training.tasks import qa

    source = write_shards(tmp_path / "shards", corpus / "train_qa.json")
    answers = f"data.answers={corpus / 'answers.json'}"
    read = {}
    for name, path in (("file", corpus / "train_qa.json"), ("shards", source)):
        recipe: Any = load_recipe(
            None, ["task=qa", f"data.annotations={path}", answers, "optimizer.batch_size=8"]
        )
        read[name] = [
            {k: v for k, v in vars(e).items() if k not in ("media", "place")}
            for e in qa.read_examples(recipe)
        ]
    assert read["shards"] == read["file"]


def test_evaluated_on_shards_as_on_files(
    over_files: Trained, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_shards(tmp_path / "shards", corpus / "test.json")
    found = []
    for path in (corpus / "test.json", source):
        words = ["evaluate", "retrieval", str(over_files.folder), "--cpu", "--workers", "0"]
        facts = tmp_path / "facts.json"
        words += ["--annotations", str(path), "--json", str(facts)]
        assert cli.main(words) == 0
        found.append(json.loads(facts.read_text()))
    assert found[0]["rsum"] == found[1]["rsum"]
    assert {Path(name).suffix for name in found[1]["settings"]["files"]} == {".tar"}
    capsys.readouterr()


def test_recipes_about_sources(
    tmp_path: Path,
) -> None:
    name = "hf://user/data?split=train"
    words = [f"data.annotations={name}", "data.columns={video: clip}", "data.fps=5"]
    recipe = load_recipe("small", words)
    (only,) = recipe.data.train
    assert (only.annotations, only.columns, only.fps) == (name, {"video": "clip"}, 5)
    wrong = {
        "data.train.0.fps must be positive and finite, got -1": "data.fps=-1",
        "columns: Cannot assign str to": "data.columns=video",
        "data.train.0.columns must be a mapping of fields": "data.columns={video: ''}",
        "data.train.0.annotations: must be a file, or a folder with": None,
    }
    for message, override in wrong.items():
        words = [f"data.annotations={tmp_path}", f"output={tmp_path / 'run'}"]
        with pytest.raises(ValueError, match=message):
            pretrain(load_recipe("small", [*words, *([override] if override else [])]))
    assert not (tmp_path / "run").exists()

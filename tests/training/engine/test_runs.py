"""A run's folder: who trains into it, what it goes on from, and what a failing disk leaves."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from running import StopAt, losses
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from svitt_ops.training.engine import checkpoints as module
from svitt_ops.training.engine import publishing
from svitt_ops.training.engine.changes import report_changes
from svitt_ops.training.engine.checkpoints import checkpoints, fault, newest_whole, write_whole
from svitt_ops.training.engine.loading import load_trained
from svitt_ops.training.engine.lock import LOCK, own_folder
from svitt_ops.training.engine.recipes import load_recipe, recipe_text
from svitt_ops.training.engine.run import Trained, _arguments, pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def original(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Six steps, with checkpoints after each second."""
    output = tmp_path_factory.mktemp("runs") / "run"
    options = ("run.save_steps=2", "run.keep_checkpoints=9", "run.tensorboard=true")
    torch.set_num_threads(1)
    return pretrain(make_recipe(output, *options))


@pytest.fixture
def output(original: Trained, tmp_path: Path) -> Path:
    """A copy of that run's folder."""
    shutil.copytree(original.folder.parent, tmp_path / "run")
    return tmp_path / "run"


def stored(output: Path) -> Any:
    """The recipe that it was trained with, of the copy."""
    return load_recipe(output / "recipe.yaml", [f"output={output}"])


def cut(name: str) -> Change:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size // 2)


def lacks(name: str) -> Change:
    return lambda path: (path / name).unlink()


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def flip(path: Path) -> None:
    content = bytearray((path / "optimizer.pt").read_bytes())
    middle = len(content) // 2  # with the padding between two tensors
    content[middle : middle + 200] = bytes(x ^ 255 for x in content[middle : middle + 200])
    (path / "optimizer.pt").write_bytes(content)


def poison(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["match_head.bias"][1] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def garble(path: Path) -> None:
    (path / "trainer_state.json").write_text("{")


BROKEN = {
    "cut weights": (cut("model.safetensors"), "model.safetensors cannot be read"),
    "no weights": (lacks("model.safetensors"), "model.safetensors is missing"),
    "nan": (poison, "match_head.bias is not finite"),
    "cut moments": (cut("optimizer.pt"), "optimizer.pt cannot be read"),
    "flipped moments": (flip, "optimizer.pt"),
    "no moments": (lacks("optimizer.pt"), "optimizer.pt is missing"),
    "no schedule": (lacks("scheduler.pt"), "scheduler.pt is missing"),
    "cut random state": (cut("rng_state.pth"), "rng_state.pth cannot be read"),
    "no state": (lacks("trainer_state.json"), "trainer_state.json is missing"),
    "garbled state": (garble, "trainer_state.json cannot be read"),
    "cut tokenizer": (cut("tokenizer.json"), "tokenizer.json cannot be read"),
    "empty": (empty, "trainer_state.json is missing"),
}


@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_recognised(output: Path, change: Change, words: str) -> None:
    assert fault(output / "checkpoint-6") is None
    change(output / "checkpoint-6")
    found, broken = newest_whole(output)
    assert found == (4, output / "checkpoint-4")
    assert list(broken) == [output / "checkpoint-6"]
    assert words in broken[output / "checkpoint-6"]


@pytest.mark.parametrize("change", [cut("model.safetensors"), poison, empty])
def test_goes_on_from_the_checkpoint_before(
    output: Path, original: Trained, change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    change(output / "checkpoint-6")
    recipe = stored(output)
    recipe.run.keep_checkpoints = 1
    again = pretrain(recipe)
    assert again.began_at == 4
    assert losses(again) == {s: x for s, x in losses(original).items() if s > 4}
    assert [step for step, _ in checkpoints(output)] == [6]
    assert (output / "broken-checkpoint-6").is_dir()
    said = [r.getMessage() for r in caplog.records if "checkpoint-6" in r.getMessage()]
    assert len(said) == 1
    assert "going on from checkpoint-4, and it is renamed to broken-checkpoint-6" in said[0]


def test_no_checkpoint_is_whole(output: Path) -> None:
    for _, path in checkpoints(output):
        (path / "optimizer.pt").unlink()
    before = sorted(output.rglob("*"))
    with pytest.raises(ValueError, match=r"none of its 3 checkpoints can be resumed") as caught:
        pretrain(stored(output))
    assert "(checkpoint-6: optimizer.pt is missing)" in str(caught.value)
    assert sorted(output.rglob("*")) == before


def test_a_complete_run_given_again(
    output: Path, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = stored(output)
    text = (output / "recipe.yaml").read_text()
    recipe.data.train[0].annotations = str(corpus / "test.json")
    recipe.seed = 5
    recipe.data.train[0].annotations = "gone.json"
    recipe.init.checkpoint = "gone"
    shutil.rmtree(output / "final")  # killed before it was written
    again = pretrain(recipe)
    assert [r.getMessage() for r in caplog.records] == [f"already trained 6 of 6 steps: {output}"]
    assert again.began_at == 6
    assert (output / "recipe.yaml").read_text() == text
    assert (output / "final" / "recipe.yaml").read_text() == text
    model, _, _ = load_trained(output / "final")
    wanted = load_file(output / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(x, wanted[name]) for name, x in model.state_dict().items())


def test_a_complete_run_by_its_epochs(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = stored(output)
    recipe.optimizer.steps = None
    recipe.optimizer.epochs = 3
    assert pretrain(recipe).began_at == 6
    assert [r.getMessage() for r in caplog.records] == [f"already trained 6 of 6 steps: {output}"]


def test_more_steps_go_on(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = stored(output)
    recipe.optimizer.steps = 8
    again = pretrain(recipe)
    assert (again.began_at, sorted(losses(again))) == (6, [7, 8])
    said = [r.getMessage() for r in caplog.records]
    assert said == ["resuming with a changed recipe: optimizer.steps: 6 -> 8"]
    assert (output / "recipe.yaml").read_text() == recipe_text(recipe)
    assert (output / "final" / "recipe.yaml").read_text() == recipe_text(recipe)
    assert (output / "checkpoint-8" / "recipe.yaml").read_text() == recipe_text(recipe)


def test_changes_are_reported_by_key(
    make_recipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(make_recipe(tmp_path / "a", keep_rate=0.7)))
    changed = make_recipe(tmp_path / "b", keep_rate=0.6, num_frames=8)
    report_changes(path, make_recipe(tmp_path / "moved", keep_rate=0.7))
    assert not caplog.records
    changed.data.train = [*changed.data.train, *changed.data.train]
    changed.data.crop_scale = (0.25, 1.0)
    changed.init.beit = "some/folder"
    report_changes(path, changed)
    corpus = changed.data.train[0]
    assert sorted(r.getMessage().partition(": ")[2] for r in caplog.records) == [
        "data.crop_scale.0: 0.5 -> 0.25",
        f"data.train.1.annotations: nothing -> {corpus.annotations}",
        "data.train.1.captions: nothing -> each",
        "data.train.1.columns: nothing -> {}",
        "data.train.1.fps: nothing -> None",
        "data.train.1.kind: nothing -> video",
        "data.train.1.root: nothing -> None",
        "init.beit: None -> some/folder",
        "model.keep_rate: 0.7 -> 0.6",
        "model.num_frames: nothing -> 8",
    ]
    caplog.clear()
    older = OmegaConf.load(path)
    older.optimizer.pop("accumulation")  # newer than the file: its default
    older.optimizer.lr = 0.5
    OmegaConf.save(older, path)
    report_changes(path, make_recipe(tmp_path / "a", keep_rate=0.7))
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == [
        "optimizer.lr: 0.5 -> 0.001"
    ]
    caplog.clear()
    path.write_bytes(b"\xff: [")
    report_changes(path, changed)
    assert "cannot be read, what changed is not known" in caplog.text


def test_weights_of_another_shape(output: Path, make_recipe: Any, tmp_path: Path) -> None:
    text = (output / "recipe.yaml").read_text()
    recipe = stored(output)
    recipe.model = {**recipe.model, "hidden_size": 32, "keep_rate": 0.9}
    recipe.optimizer.steps = 9
    wrong = r"^recipe: model.hidden_size must be 16 as in the weights of .*, got 32$"
    with pytest.raises(ValueError, match=wrong):
        pretrain(recipe)
    assert (output / "recipe.yaml").read_text() == text
    start = make_recipe(tmp_path / "next", f"init.checkpoint={output}")
    start.tokenizer.train_vocab_size = None
    start.model = {"keep_rate": 0.9, "num_frames": 8, "text_hidden_size": 24}
    wrong = r"^recipe: model.text_hidden_size must be 16 as in the weights of .*final, got 24$"
    with pytest.raises(ValueError, match=wrong):
        pretrain(start)
    assert not (tmp_path / "next").exists()


def test_two_runs_in_one_folder(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run", "optimizer.steps=2")
    said = []

    class Second(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            with pytest.raises(ValueError, match="another process") as caught:
                pretrain(recipe)
            said.append(str(caught.value))

    pretrain(recipe, callbacks=[Second()])
    assert len(said) == 2
    assert said[0].startswith(f"another process (process {os.getpid()} on ")
    assert f"trains into {tmp_path / 'run'};" in said[0]
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """Also where a child that it forked lives on, and where the file stays behind."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # takes the lock, forks, and dies
        handle = own_folder(tmp_path)
        handle.__enter__()
        if os.fork() == 0:
            os.close(writing)
            os.read(reading, 1)  # until the test is over
            os._exit(0)
        os._exit(0)
    os.close(reading)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / LOCK).exists()
    with own_folder(tmp_path):
        pass
    os.close(writing)


def test_an_output_that_is_no_folder(make_recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"^recipe: output: must be a folder to write to, got"):
            pretrain(make_recipe(output))


def test_without_locks_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with own_folder(tmp_path):
        pass
    assert "has no locks; train into it once at a time" in caplog.text


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond fails, as on a full disk; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("kib", "words"), [(50, "File too large"), (120, "the disk is full, or a file too large")]
)
def test_a_full_disk_while_saving(output: Path, kib: int, words: str) -> None:
    """In the middle of the weights, and in the middle of the moments."""
    recipe = stored(output)
    recipe.optimizer.steps = 8
    recipe.run.keep_checkpoints = 1
    recipe.run.tensorboard = False
    with largest_file(kib * 1024), pytest.raises(ValueError, match=words) as caught:
        pretrain(recipe)
    message = str(caught.value)
    assert message.startswith(f"{output / 'checkpoint-8'}: cannot be written: ")
    assert message.endswith(f"; the last checkpoint is {output / 'checkpoint-6'}")
    assert "\n" not in message
    assert [step for step, _ in checkpoints(output)] == [2, 4, 6]
    assert not list(output.glob(".*"))
    assert pretrain(recipe).began_at == 6


def test_a_full_disk_at_the_end(
    output: Path, original: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final model of before stays, as does a recipe."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = load_file(output / "final" / "model.safetensors")
    recipe = stored(output)
    recipe.optimizer.steps = 7
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "model_card", full)
        with pytest.raises(ValueError) as caught:
            pretrain(recipe)
    assert str(caught.value) == (f"{output / 'final'}: cannot be written: No space left on device")
    after = load_file(output / "final" / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not list(output.glob(".*"))
    monkeypatch.setattr(module, "_sync", full)
    with pytest.raises(ValueError, match=r"recipe.yaml: cannot be written: No space left"):
        write_whole(output / "recipe.yaml", "")
    assert not list(output.glob(".*"))
    assert (output / "recipe.yaml").read_text() == recipe_text(recipe)


def test_tensorboard_keeps_the_point_of_the_checkpoint(output: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step in (4, 6):
        shutil.rmtree(output / f"checkpoint-{step}")
    pretrain(stored(output), callbacks=[StopAt(5)])
    points = EventAccumulator(str(output / "tensorboard")).Reload().Scalars("train/loss_vtc")
    assert [point.step for point in points] == [1, 2, 3, 4, 5]
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    wanted = {x["step"]: x["loss_vtc"] for x in state["log_history"]}
    assert points[1].value == pytest.approx(wanted[2])


def test_training_goes_on_without_space_for_points(
    make_recipe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    recipe = make_recipe(tmp_path / "run", "optimizer.steps=2", "run.tensorboard=true")
    assert sorted(losses(pretrain(recipe))) == [1, 2]
    folder = tmp_path / "run" / "tensorboard"
    wanted = f"{folder}: no more points are written here: No space left on device"
    assert [r.getMessage() for r in caplog.records] == [wanted]


def test_several_gpus_without_torchrun(
    original: Trained, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    recipe = stored(original.folder.parent)
    recipe.run.device = None
    arguments = _arguments(recipe, 1)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == recipe.optimizer.batch_size
    assert "2 GPUs, of which one is used" in caplog.text
    assert "torchrun --nproc-per-node 2 -m svitt_ops.training pretrain" in caplog.text


def test_fp16_is_refused(make_recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^recipe: run.trainer.fp16 is not supported"):
        pretrain(make_recipe(tmp_path / "run", "run.trainer.fp16=true"))


def test_arguments_without_effect_are_named(
    make_recipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("run.trainer={optim: foo, logging_first_step: true}", "optimizer.steps=7")
    arguments = _arguments(make_recipe(tmp_path / "run", *options), 1)
    assert arguments.logging_first_step and arguments.max_steps == 7
    said = ["run.trainer.optim has no effect: the optimizer is AdamW, with the values of `optimize"]
    assert [r.getMessage()[: len(said[0])] for r in caplog.records] == said


def test_goes_on_from_a_scalar_temperature(output: Path, original: Trained) -> None:
    """Weights and moments of earlier versions."""
    shutil.rmtree(output / "checkpoint-6")
    folder = output / "checkpoint-4"
    tensors = load_file(folder / "model.safetensors")
    tensors["temperature"] = tensors["temperature"].reshape(())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    state = torch.load(folder / "optimizer.pt")
    moments = [x for x in state["state"].values() if x["exp_avg"].shape == (1,)]
    assert len(moments) == 1
    moments[0].update({k: x.reshape(()) for k, x in moments[0].items()})
    torch.save(state, folder / "optimizer.pt")
    again = pretrain(stored(output))
    assert again.began_at == 4
    assert losses(again) == {s: x for s, x in losses(original).items() if s > 4}

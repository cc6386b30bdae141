"""Training: resuming after real kills, ranks under torchrun, precision, accumulation."""

import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from running import DENSE, ENOUGH, LONG, StopAt, losses, run, run_killed, torchrun, write
from transformers import TrainerCallback

from svitt_ops.training.data.text import train_tokenizer
from svitt_ops.training.engine.build import build_model
from svitt_ops.training.engine.checkpoints import checkpoints, last_checkpoint, model_folder
from svitt_ops.training.engine.loading import load_trained
from svitt_ops.training.engine.run import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")  # as `run` gives: sums depend on it


def test_trains_saves_and_loads(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run", "run.tensorboard=true", "run.save_steps=2")
    trained = pretrain(recipe)
    found = losses(trained)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert all(len(parts) == 4 and all(map(math.isfinite, parts)) for parts in found.values())
    for parts in found.values():
        assert parts[0] == pytest.approx(sum(parts[1:]), rel=1e-4)
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [4, 6]  # the last two are kept
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert model_folder(tmp_path / "run") == tmp_path / "run" / "final"
    model, tokenizer, folder = load_trained(tmp_path / "run")
    assert folder == trained.folder
    assert len(tokenizer) == model.config.vocab_size
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    again = pretrain(recipe)  # complete: nothing is trained
    assert again.began_at == 6
    assert again.history == []
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_compiled_run_resumes(make_recipe: Any, tmp_path: Path) -> None:
    """By names of weights that a run without a compiler knows too."""
    options = ("optimizer.steps=3", "run.save_steps=2")
    eager = losses(pretrain(make_recipe(tmp_path / "eager", *options)))
    backend = ("run.trainer.torch_compile=true", "run.trainer.torch_compile_backend=aot_eager")
    recipe = make_recipe(tmp_path / "run", *options, *backend)
    assert losses(pretrain(recipe, callbacks=[StopAt(2)])) == {
        step: pytest.approx(parts, rel=1e-3) for step, parts in eager.items() if step <= 2
    }
    trained = pretrain(make_recipe(tmp_path / "run", *options))
    assert trained.began_at == 2
    assert losses(trained)[3] == pytest.approx(eager[3], rel=1e-3)


def test_killed_at_any_time_and_resumed(make_recipe: Any, tmp_path: Path) -> None:
    options = (f"optimizer.steps={LONG}", "run.save_steps=3")
    random = {"text_dropout": 0.1}  # what is dropped is drawn alike after a restart
    whole = make_recipe(tmp_path / "whole", *options, **random)
    whole = losses(pretrain(whole, callbacks=[StopAt(12)]))
    recipe = make_recipe(tmp_path / "killed", *options, **random)
    path = write(recipe, tmp_path / "killed.yaml")
    run_killed(9, "pretrain", "--config", str(path))
    output = tmp_path / "killed"
    assert [step for step, _ in checkpoints(output)] == [3, 6]
    assert list(output.glob(".partial-*"))
    trained = pretrain(recipe, callbacks=[StopAt(12)])
    assert trained.began_at == 6
    assert not list(output.glob(".partial-*"))
    resumed = losses(trained)
    assert resumed == {step: parts for step, parts in whole.items() if step > 6}


def test_killed_from_outside_and_resumed(make_recipe: Any, tmp_path: Path) -> None:
    options = (f"optimizer.steps={LONG}", "run.save_steps=5", "run.keep_checkpoints=1")
    recipe = make_recipe(tmp_path / "killed", *options)
    path = write(recipe, tmp_path / "killed.yaml")
    process = run(sys.executable, "-m", "svitt_ops.training", "pretrain", "--config", str(path))
    end = time.monotonic() + ENOUGH
    while last_checkpoint(tmp_path / "killed") is None and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    last = last_checkpoint(tmp_path / "killed")
    assert last is not None
    stop = last[0] + 3
    resumed = pretrain(recipe, callbacks=[StopAt(stop)])
    assert resumed.began_at == last[0]
    whole = pretrain(make_recipe(tmp_path / "whole", *options), callbacks=[StopAt(stop)])
    wanted = losses(whole)
    assert losses(resumed) == {step: wanted[step] for step in range(last[0] + 1, stop + 1)}


def test_two_ranks_equal_one_process(make_recipe: Any, tmp_path: Path) -> None:
    options = ("optimizer.steps=4", "run.save_steps=4")
    model = {"loss_weights": {"vtc": 1, "vtm": 0, "mlm": 0}}
    recipe = make_recipe(tmp_path / "two", *options, **model)
    path = write(recipe, tmp_path / "two.yaml")
    process = torchrun("-m", "svitt_ops.training", "pretrain", "--config", str(path))
    one = pretrain(make_recipe(tmp_path / "one", *options, **model))
    assert process.wait(timeout=ENOUGH) == 0
    state = json.loads((tmp_path / "two" / "checkpoint-4" / "trainer_state.json").read_text())
    two = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    wanted = {step: parts[0] for step, parts in losses(one).items()}
    assert two == pytest.approx(wanted, rel=1e-5)
    other, _, _ = load_trained(tmp_path / "two")
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_bf16_checkpointing_accumulation_workers(make_recipe: Any, tmp_path: Path) -> None:
    plain = losses(pretrain(make_recipe(tmp_path / "plain", "optimizer.steps=2")))
    options = {
        "checkpointing": ("run.gradient_checkpointing=true",),
        "workers": ("data.workers=1",),
        "bf16": ("run.precision=bf16",),
        "accumulated": ("optimizer.accumulation=2",),
    }
    for name, overrides in options.items():
        recipe = make_recipe(tmp_path / name, "optimizer.steps=2", *overrides)
        found = losses(pretrain(recipe))
        assert set(found) == {1, 2}
        if name == "bf16":
            assert found[1] == pytest.approx(plain[1], rel=0.05)
        elif name != "accumulated":
            assert found == {step: pytest.approx(parts, rel=1e-4) for step, parts in plain.items()}


def test_broken_files_are_counted_not_fatal(
    make_recipe: Any, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = json.loads((corpus / "train.json").read_text())
    for entry in entries:
        entry["video"] = str(corpus / entry["video"])
    (tmp_path / "empty.mp4").write_bytes(b"")
    entries[3]["video"] = "empty.mp4"
    entries[5] = {"video": "no caption.mp4", "scene": "x"}
    (tmp_path / "train.json").write_text(json.dumps(entries))
    recipe = make_recipe(tmp_path / "run", f"data.train.0.annotations={tmp_path / 'train.json'}")
    trained = pretrain(recipe)
    assert list(trained.skipped.reasons) == [str(tmp_path / "empty.mp4")]
    assert "1 unusable file skipped" in trained.skipped.summary()
    assert "empty.mp4" in (tmp_path / "run" / "skipped-0.tsv").read_text()
    assert "entry 5: has no field 'caption'" in caplog.text


def test_bias_tables_have_a_rate_of_their_own(make_recipe: Any, tmp_path: Path) -> None:
    groups: list[dict[str, Any]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            groups.extend(optimizer.param_groups)

    options = ("optimizer.steps=1", "optimizer.bias_lr_scale=20", "optimizer.weight_decay=0.1")
    trained = pretrain(make_recipe(tmp_path / "run", *options), callbacks=[Watch()])
    rates = {p: (g["initial_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert rates.keys() == set(trained.model.parameters())
    for name, parameter in trained.model.named_parameters():
        rate = 0.02 if name.endswith("bias.table") else 0.001
        decay = 0.1 if parameter.ndim > 1 else 0.0
        assert rates[parameter] == (pytest.approx(rate), decay), name


def test_rates_by_name_and_in_steps(make_recipe: Any, tmp_path: Path) -> None:
    """The longest beginning counts; the decay is of the same parameters; rates fall together."""
    groups: list[dict[str, Any]] = []
    rates: list[list[float]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            groups.extend(optimizer.param_groups)

        def on_step_end(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    options = (
        "optimizer.lr_scales={text.: 0.1, text.embeddings.: 5, match_head.weight: 5}",
        *("optimizer.decay=step", "optimizer.drop=0.5", "optimizer.drop_at=[0.5]"),
        *("optimizer.warmup_steps=0", "optimizer.weight_decay=0.1", "optimizer.steps=4"),
    )
    trained = pretrain(make_recipe(tmp_path / "run", *options), callbacks=[Watch()])
    found = {p: (g["initial_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == set(trained.model.parameters())
    assert sum(len(group["params"]) for group in groups) == len(found)
    for name, parameter in trained.model.named_parameters():
        scale = 0.1 if name.startswith("text.") else 1
        scale = 5 if name.startswith(("text.embeddings.", "match_head.weight")) else scale
        decay = 0.1 if parameter.ndim > 1 else 0.0
        assert found[parameter] == (pytest.approx(1e-3 * scale), decay), name
    first = [group["initial_lr"] for group in groups]
    # After a step, the rate of the next one.
    assert rates[0] == pytest.approx(first)
    assert rates[1] == rates[2] == pytest.approx([rate / 2 for rate in first])
    with pytest.raises(ValueError, match=r"lr_scales: keys must begin names of .*, got 'vision'"):
        pretrain(make_recipe(tmp_path / "other", "optimizer.lr_scales={vision: 2, text: 2}"))


@pytest.mark.parametrize(
    ("system", "model", "changes"),
    [
        ("svitt", {}, {"num_frames": 8, "keep_rate": 0.6}),
        ("singularity", {**DENSE, "num_frames": 1}, {"num_frames": 4, "temporal_layers": 2}),
        ("scl", {**DENSE, "num_frames": 1}, {"num_frames": 4}),
    ],
)
def test_next_stage_starts_from_the_last_and_sees_more_frames(
    system: str, model: dict[str, Any], changes: dict[str, Any], make_recipe: Any, tmp_path: Path
) -> None:
    options = (f"system={system}", "optimizer.steps=1", "run.gradient_checkpointing=true")
    first = pretrain(make_recipe(tmp_path / "first", *options, **model))
    recipe = make_recipe(tmp_path / "next", f"init.checkpoint={tmp_path / 'first'}", *options)
    recipe.tokenizer.train_vocab_size = None
    recipe.model = changes
    second = pretrain(recipe)
    assert type(second.model) is type(first.model)
    for key, value in changes.items():
        assert getattr(second.model.config, key) == value
    assert second.model.config.hidden_size == first.model.config.hidden_size
    assert all(map(math.isfinite, losses(second)[1]))


def test_the_next_stage_is_another_run(make_recipe: Any, tmp_path: Path) -> None:
    options = ("system=singularity", "run.save_steps=1")
    pretrain(make_recipe(tmp_path / "run", *options, "optimizer.steps=1", **DENSE))
    recipe = make_recipe(tmp_path / "run", *options, **DENSE, temporal_layers=1)
    with pytest.raises(ValueError, match=r"model\.temporal_layers must be 0 as in .*, got 1"):
        pretrain(recipe)


def test_recipes_that_cannot_be(make_recipe: Any, tmp_path: Path) -> None:
    wrong = {
        "batch_size: must not exceed": ("optimizer.batch_size=64",),
        "run.trainer has 'colour'": ("run.trainer.colour=red",),
        "data.train must list": ("data.train=[]",),
        "cannot be read": ("data.train=[{annotations: none.json}]",),
        "checkpoint: must be the folder": ("init.checkpoint=none",),
    }
    for message, overrides in wrong.items():
        with pytest.raises(ValueError, match=message):
            pretrain(make_recipe(tmp_path / "run", *overrides))
    tokenizer = train_tokenizer(["a"], 50)
    with pytest.raises(ValueError, match="model has no key 'wide'"):
        build_model(make_recipe(tmp_path / "run", wide=3), tokenizer)
    with pytest.raises(ValueError, match=r"model\.vocab_size is the tokenizer's"):
        build_model(make_recipe(tmp_path / "run", vocab_size=3), tokenizer)

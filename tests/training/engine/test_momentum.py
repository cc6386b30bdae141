"""A model with a momentum twin in the engine: killed and resumed, and what it leaves."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from running import DENSE, OF_PICTURES, StopAt, losses
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from svitt_ops.models.simla.tokenizer import TokenEncoder
from svitt_ops.training.engine.loading import load_trained
from svitt_ops.training.engine.run import pretrain
from svitt_ops.training.engine.saving import TRAINING_STATE

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = {
    **DENSE,
    "bias_init_std": 0.0,
    "num_frames": 1,
    "queue_size": 12,
    "momentum": 0.5,
    "alpha_warmup_steps": 5,
    "text_dropout": 0.1,
}


@pytest.fixture
def make(make_recipe: Any, tmp_path: Path) -> Any:
    options = ("run.save_steps=3", "optimizer.lr=1e-2")

    def recipe(name: str, *more: str, system: str = "albef") -> Any:
        model = MODEL | OF_PICTURES[system]
        return make_recipe(tmp_path / name, f"system={system}", *options, *more, **model)

    return recipe


@pytest.mark.parametrize("system", OF_PICTURES)
def test_stopped_and_resumed(system: str, make: Any, tmp_path: Path) -> None:
    """The twin, the queues and the share of the twin go on as they were."""
    whole = pretrain(make("whole", system=system))
    assert len(losses(whole)) == 6 and all(len(parts) == 4 for parts in losses(whole).values())
    stopped = pretrain(make("stopped", system=system), callbacks=[StopAt(3)])
    assert len(losses(stopped)) == 3
    resumed = pretrain(make("stopped", system=system))
    assert resumed.began_at == 3
    assert losses(resumed) == {step: x for step, x in losses(whole).items() if step > 3}
    one, other = (
        load_file(tmp_path / name / "checkpoint-6" / TRAINING_STATE)
        for name in ("whole", "stopped")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert int(one["steps"]) == 6 and int(one["queue.next"]) == 6 * 8 % 12


def test_what_a_run_leaves(make: Any, tmp_path: Path) -> None:
    """One copy of the model for use, and none of the twin in the optimizer."""
    trained = pretrain(make("run"))
    run, model = tmp_path / "run", trained.model
    for folder in (run / "final", run / "checkpoint-6"):
        stored = load_file(folder / "model.safetensors")
        assert not any(name.startswith(model.training_only) for name in stored)
    assert not (run / "final" / TRAINING_STATE).exists()
    optimizer = torch.load(run / "checkpoint-6" / "optimizer.pt", weights_only=True)
    learned = [p for p in model.parameters() if p.requires_grad]
    assert len(optimizer["state"]) == len(learned) < len(list(model.parameters()))
    twin, own = (m.fusion.layers[0].mlp.up.weight for m in (model.teacher, model))
    assert not torch.equal(twin, own)


class Watch(TrainerCallback):
    """What the twin and its share are at the end of each step, and the weights."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.weights: list[tuple[Tensor, Tensor]] = []

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        self.shares.append(model.alpha)
        modules = (model, model.teacher)
        own, twin = (m.fusion.layers[0].mlp.up.weight.detach().clone() for m in modules)
        self.weights.append((own, twin))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_step_of_several_batches_moves_the_twin_once(make: Any, accumulation: int) -> None:
    """Its share grows through the first epoch, two steps here, also of a run that is resumed."""
    watch = Watch()
    recipe = make("run", f"optimizer.accumulation={accumulation}")
    recipe.model["alpha_warmup_steps"] = None
    pretrain(recipe, callbacks=[watch, StopAt(3)])
    trained = pretrain(recipe, callbacks=[watch])
    assert trained.began_at == 3
    assert watch.shares == pytest.approx([0, 0.2, 0.4, 0.4, 0.4, 0.4])
    assert int(trained.model.steps) == 6 and int(trained.model.queue.next) == 6 * 8 % 12
    moved = zip(watch.weights, watch.weights[1:], strict=False)
    for number, ((own, twin), (_, after)) in enumerate(moved):
        torch.testing.assert_close(after, (own + twin) / 2, msg=str(number))
        assert not torch.equal(own, twin)


def test_a_checkpoint_without_the_twin_is_refused(make: Any, tmp_path: Path) -> None:
    pretrain(make("run"), callbacks=[StopAt(3)])
    (tmp_path / "run" / "checkpoint-3" / TRAINING_STATE).unlink()
    with pytest.raises(ValueError, match=r"training_state.safetensors: must hold the \d+ tensors"):
        pretrain(make("run"))


def test_dalle_s_tokenizer(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a file that a recipe names: kept by checkpoints, and read besides a checkpoint."""
    tensors = {}
    encoder = TokenEncoder(8, 4, 1)
    for name, x in encoder.state_dict().items():
        group = re.match(r"groups\.(\d)\.0\.(.+)", name)
        path = name.replace("stem", "blocks.input").replace("head", "blocks.output.conv")
        if group:
            inner = re.sub(
                r"convolutions\.(\d)", lambda m: f"res_path.conv_{int(m[1]) + 1}", group[2]
            )
            inner = inner.replace("shortcut", "id_path")
            path = f"blocks.group_{int(group[1]) + 1}.block_1.{inner}"
        tensors[path.replace("weight", "w").replace("bias", "b")] = x
    file = tmp_path / "dalle.pt"
    torch.save(tensors, file)
    options = (f"init.dalle={file}",)
    whole = pretrain(make("whole", *options, system="simla"))
    stopped = pretrain(make("stopped", *options, system="simla"), callbacks=[StopAt(3)])
    resumed = pretrain(make("stopped", *options, system="simla"))
    assert losses(resumed) == {step: x for step, x in losses(whole).items() if step > 3}
    state = load_file(tmp_path / "whole" / "checkpoint-6" / TRAINING_STATE)
    assert torch.equal(state["tokenizer.encoder.stem.weight"], encoder.stem.weight)
    more = ("tokenizer.train_vocab_size=null", f"init.checkpoint={stopped.folder}")
    on = make("on", *options, *more, system="simla")
    on.model = {}
    assert torch.equal(pretrain(on).model.tokenizer.encoder.stem.weight, encoder.stem.weight)
    for options, system, message in (
        ((f"init.dalle={tmp_path}",), "simla", r"recipe: init\.dalle: must be a file, got "),
        ((f"init.dalle={file}",), "albef", r"recipe: init\.dalle must be null, albef does not"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain(make("bad", *options, system=system))
    torch.save({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"recipe: init\.dalle: load_dalle: source must be DALL-E"):
        pretrain(make("bad", f"init.dalle={file}", system="simla"))


def test_retrieval_from_a_pretrained_model(make: Any, corpus: Path, tmp_path: Path) -> None:
    start = pretrain(make("start"))
    recipe = make(
        "tuned",
        "task=retrieval",
        f"init.checkpoint={start.folder}",
        "tokenizer.train_vocab_size=null",
        f"data.validation=[{{annotations: {corpus / 'test.json'}}}]",
    )
    recipe.model = {"momentum": 0.9, "queue_size": 5}
    tuned = pretrain(recipe)
    assert type(tuned.model).__name__ == "ALBEFForRetrieval" and len(tuned.model.queue.ids) == 5
    assert tuned.best is not None
    assert not any(p.requires_grad for p in tuned.model.teacher.parameters())
    model, _, _ = load_trained(tuned.folder)
    for name, x in tuned.model.named_parameters():
        if not name.startswith("teacher."):
            assert torch.equal(model.get_parameter(name), x)

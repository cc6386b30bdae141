"""Reasoning and entailment are trained by the engine, validated, evaluated by the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from running import write
from torch import Tensor, nn
from transformers.utils import ModelOutput

from svitt_ops.models.svitt import SYSTEM, SViTTModel
from svitt_ops.training import cli
from svitt_ops.training.corpora.pictures import build_pictures
from svitt_ops.training.corpora.scenes import PictureSpec
from svitt_ops.training.engine.run import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


class Classifier(SViTTModel):
    """The towers, the fusion layers and a class head on their [CLS]; pairs are clips of two."""

    classes = 2

    def build(self, config: Any) -> None:
        super().build(config)
        self.class_head = nn.Linear(config.text_hidden_size, self.classes)

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        video = self.encode_video(pixel_values).states
        text = self.encode_text(input_ids, attention_mask).states
        logits = self.class_head(self.fuse(text, attention_mask, video).states[:, 0])
        if labels is None:
            return ModelOutput(logits=logits)
        loss = F.cross_entropy(logits, labels)
        return ModelOutput(loss=loss, loss_class=loss, logits=logits)


class ThreeWays(Classifier):
    """The same with three classes."""

    classes = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    spec = PictureSpec(size=32, train_pictures=20, validation_pictures=10, test_pictures=10)
    build_pictures(folder, spec)
    return folder


@pytest.mark.parametrize(
    ("task", "kind", "frames"), [("reasoning", Classifier, 2), ("entailment", ThreeWays, 1)]
)
def test_from_a_pretrained_model_to_numbers(
    task: str,
    kind: Any,
    frames: int,
    make_recipe: Any,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(SYSTEM.models, task, kind)  # type: ignore[arg-type]
    train = f"data.train=[{{annotations: {folder / 'train.json'}, kind: image}}]"
    keep = ("data.keep_together=null", "data.positives=video")
    model = {"num_frames": frames, "keep_rate": 1.0}
    start = pretrain(
        make_recipe(tmp_path / "start", train, *keep, "optimizer.steps=2", **model)
    ).folder
    recipe = make_recipe(
        tmp_path / "run",
        f"task={task}",
        f"init.checkpoint={start}",
        "tokenizer.train_vocab_size=null",
        "data.text_length=20",
        f"data.train=[{{annotations: {folder / f'train-{task}.json'}}}]",
        f"data.validation=[{{annotations: {folder / f'test-{task}.json'}}}]",
        *keep,
    )
    recipe.model = {}
    assert cli.main(["finetune", "--config", str(write(recipe, tmp_path / "recipe.yaml"))]) == 0
    assert f"{task}: step 6: score" in capsys.readouterr().err
    best = json.loads((tmp_path / "run" / "best" / "validation.json").read_text())
    target = tmp_path / "found.json"
    words = ["evaluate", task, str(tmp_path / "run" / "best"), "--cpu", "--workers", "1"]
    words += ["--annotations", str(folder / f"test-{task}.json"), "--json", str(target)]
    assert cli.main(words) == 0
    assert "always the commonest class" in capsys.readouterr().out
    found = json.loads(target.read_text())
    assert found["accuracy"] == best["score"]
    assert found["chance"] == pytest.approx(100 / kind.classes)
    assert found["settings"]["sources"]["text_length"] == "run"
    protocol = {"reasoning": "nlvr2", "entailment": "snli-ve"}[task]
    assert cli.main([*words, "--protocol", protocol, "--batch-size", "3"]) == 0
    assert json.loads(target.read_text())["accuracy"] == found["accuracy"]
    assert cli.main([*words, "--clips", "2"]) == 2
    assert f"--clips: is no option of {task}" in capsys.readouterr().err

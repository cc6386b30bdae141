"""What a run leaves for others: a processor, a model card, reports."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoProcessor, TrainerCallback
from transformers.integrations import integration_utils

from svitt_ops.training.data.annotations import read_annotations
from svitt_ops.training.engine.run import Trained, pretrain
from svitt_ops.training.tasks.parts.encoding import encode_gallery_texts, encode_gallery_videos
from svitt_ops.training.tasks.parts.gallery import GalleryClips, build_gallery

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def left(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("publishing") / "run"
    options = ("optimizer.steps=2", "data.max_words=4", "data.test_sampling=ends")
    return pretrain(make_recipe(output, *options))


def test_auto_classes(left: Trained) -> None:
    """In a process that has imported nothing but the models."""
    code = f"""
import svitt_ops.models
from transformers import AutoConfig, AutoModel, AutoProcessor
folder = {str(left.folder)!r}
print(*(type(x.from_pretrained(folder)).__name__ for x in (AutoConfig, AutoModel, AutoProcessor)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SViTTConfig", "SViTTModel", "VideoTextProcessor"]


def test_what_it_makes_is_what_evaluation_sees(left: Trained, corpus: Path) -> None:
    processor = AutoProcessor.from_pretrained(left.folder)
    gallery = build_gallery(read_annotations(corpus / "test.json", max_words=4).entries)
    clips = GalleryClips(gallery, left.model.config.num_frames, sampling="ends")
    model = left.model.eval()
    videos, _, _ = encode_gallery_videos(model, clips)
    texts = encode_gallery_texts(model, processor.tokenizer, gallery.texts, text_length=12)
    captions = [c.upper() + "!" for c in gallery.texts]
    with torch.inference_mode():
        inputs = processor(videos=gallery.videos, text=captions)
        found = model.encode_video(inputs["pixel_values"]).embeds
        said = model.encode_text(inputs["input_ids"], inputs["attention_mask"]).embeds
    torch.testing.assert_close(found, videos.embeds)
    torch.testing.assert_close(said, texts.embeds)


def test_the_card(left: Trained, corpus: Path) -> None:
    text = (left.folder / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "svitt-ops" and "svitt" in card.data.tags
    for word in ("SViTTForPreTraining", "train.json (videos)", "| examples | 16 |", "| loss_vtc |"):
        assert word in text, word
    assert str(corpus) not in text and str(left.folder.parent) not in text


def test_its_code_runs(
    left: Trained, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (left.folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    (tmp_path / "clip.mp4").symlink_to(next(iter((corpus / "videos").iterdir())))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace('folder = "."', f"folder = {str(left.folder)!r}"), names)
    assert names["similarity"].shape == (1, 1)


def test_the_best_are_published_too(make_recipe: Any, corpus: Path, tmp_path: Path) -> None:
    held_out = f"data.validation=[{{annotations: {corpus / 'test.json'}}}]"
    options = ("task=retrieval", "optimizer.steps=2", held_out)
    best = pretrain(make_recipe(tmp_path / "run", *options)).best
    assert best is not None and AutoProcessor.from_pretrained(best).num_frames == 4
    assert "| text_to_video_R1 |" in (best / "README.md").read_text()


class Reports(TrainerCallback):
    logged: list[dict[str, float]]

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logged.append(logs)


def test_reports(make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Reports.logged = []
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Reports)
    monkeypatch.setattr(
        integration_utils, "get_available_reporting_integrations", lambda: ["wandb"]
    )
    options = ("optimizer.steps=2", "run.report_to=[wandb]")
    pretrain(make_recipe(tmp_path / "run", *options))
    assert [row["loss_vtc"] > 0 for row in Reports.logged if "loss_vtc" in row] == [True, True]


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ("[wand]", "recipe: run.report_to must be of .*wandb, got 'wand'"),
        ("[codecarbon]", "recipe: run.report_to has 'codecarbon', whose package is not installed"),
    ],
)
def test_reports_refused(make_recipe: Any, tmp_path: Path, names: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        pretrain(make_recipe(tmp_path / "run", f"run.report_to={names}"))


def test_tensorboard_by_its_name(make_recipe: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pretrain(make_recipe(tmp_path / "run", "optimizer.steps=1", "run.report_to=[tensorboard]"))
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1

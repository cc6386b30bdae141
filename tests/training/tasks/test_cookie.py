"""COOKIE: two stages of pretraining, retrieval, similarity of texts, hashing, given features."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import ENOUGH, StopAt, losses, run_killed, write
from transformers import ResNetConfig, ResNetForImageClassification

from svitt_ops.training import cli
from svitt_ops.training.corpora.pictures import build_pictures
from svitt_ops.training.corpora.scenes import PictureSpec
from svitt_ops.training.engine.loading import load_trained
from svitt_ops.training.engine.run import pretrain
from svitt_ops.training.tasks import hashing
from svitt_ops.training.tasks.retrieval import search_together

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "cnn_depths": [1, 1],
    "cnn_sizes": [8, 16],
    "cnn_stem": 8,
    "cnn_layer": "basic",
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "projection_dim": 16,
    "text_hidden_size": 16,
    "text_num_attention_heads": 2,
    "text_num_hidden_layers": 1,
    "fusion_layer": 1,
    "text_intermediate_size": 32,
    "max_position_embeddings": 32,
    "hash_bits": 16,
    "hash_classes": 8,
}
STILL: dict[str, Any] = {"jitter": 0.0, "grayscale_rate": 0.0, "blur_rate": 0.0}
"""What each process draws for itself is left out."""
IMAGES = ("data.keep_together=null", "data.positives=video", "data.text_length=20")
COLOURS = ("red", "green", "blue", "yellow")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions; the same with their colours as classes; texts with scores."""
    folder = tmp_path_factory.mktemp("pictures")
    spec = PictureSpec(size=32, train_pictures=20, validation_pictures=10, test_pictures=10)
    build_pictures(folder, spec)
    for split in ("train", "test"):
        rows = json.loads((folder / f"{split}.json").read_text())
        seen: dict[str, list[str]] = {}
        for row in rows:
            text = " ".join([row["caption"]] if isinstance(row["caption"], str) else row["caption"])
            seen[row["image"]] = [x for x in COLOURS if x in text]
        classed = [{"image": name, "labels": labels} for name, labels in seen.items()]
        (folder / f"{split}-classes.json").write_text(json.dumps(classed))
    pairs = [
        {"sentence1": f"a {a} square", "sentence2": f"the {b} square", "score": 5.0 * (a == b)}
        for a in COLOURS
        for b in COLOURS
    ]
    (folder / "texts.json").write_text(
        json.dumps([{**pair, "set": str(k // 8)} for k, pair in enumerate(pairs)])
    )
    return folder


@pytest.fixture(scope="module")
def make(make_recipe: Any, pictures: Path) -> Any:
    def recipe(output: Path, *overrides: str, **model: Any) -> Any:
        train = f"data.train=[{{annotations: {pictures / 'train.json'}, kind: image}}]"
        found = make_recipe(output, "system=cookie", train, *IMAGES, *overrides)
        found.model = {**MODEL, **model}
        return found

    return recipe


@pytest.fixture(scope="module")
def pretrained(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pretrained")
    return Path(pretrain(make(folder / "run", "optimizer.steps=2")).folder)


@pytest.fixture
def tune(make: Any, pictures: Path, pretrained: Path) -> Any:
    """Recipes that start from the pretrained model."""

    def recipe(task: str, output: Path, *overrides: str, **model: Any) -> Any:
        files = {"hashing": "-classes"}
        train, test = (pictures / f"{x}{files.get(task, '')}.json" for x in ("train", "test"))
        found = make(
            output,
            f"task={task}",
            f"init.checkpoint={pretrained}",
            "tokenizer.train_vocab_size=null",
            f"data.train=[{{annotations: {train}, kind: image}}]",
            f"data.validation=[{{annotations: {test}, kind: image}}]",
            *overrides,
        )
        found.model = model
        return found

    return recipe


def test_two_stages(make: Any, tmp_path: Path, capsys: Capture) -> None:
    """First the contrast of both modalities alone, then that within each one, too."""
    alone = {"loss_weights": {"ccl": 1, "vcl": 0, "tcl": 0}}
    first = pretrain(make(tmp_path / "1", "optimizer.decay=step", **alone))
    logged = [entry for entry in first.history if "loss" in entry]
    assert all("loss_vcl" not in entry and entry["loss_ccl"] == entry["loss"] for entry in logged)
    second = make(
        tmp_path / "2",
        f"init.checkpoint={first.folder}",
        "tokenizer.train_vocab_size=null",
        "optimizer.lr_scales={video.cnn.: 0.1}",
        "optimizer.mask_probability=0.3",
    )
    second.model = {"loss_weights": {"ccl": 1, "vcl": 1, "tcl": 1}}
    assert cli.main(["pretrain", "--config", str(write(second, tmp_path / "two.yaml"))]) == 0
    capsys.readouterr()
    state = json.loads((tmp_path / "2" / "checkpoint-6" / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        parts = [entry[f"loss_{name}"] for name in ("ccl", "vcl", "tcl")]
        assert entry["loss"] == pytest.approx(sum(parts), rel=1e-5) and all(
            map(math.isfinite, parts)
        )


@pytest.mark.parametrize("task", ["pretrain", "retrieval", "hashing"])
def test_stopped_or_killed_and_resumed(task: str, make: Any, tune: Any, tmp_path: Path) -> None:
    """The statistics of batches go on as they were, too."""

    def run(name: str) -> Any:
        options = ("run.save_steps=3",)
        if task == "pretrain":
            return make(tmp_path / name, *options, dropout=0.1)
        return tune(task, tmp_path / name, *options)

    whole = pretrain(run("whole"))
    assert len(losses(whole)) == 6
    if task == "pretrain":
        path = write(run("stopped"), tmp_path / "recipe.yaml")
        run_killed(6, "pretrain", "--config", str(path))
    else:
        pretrain(run("stopped"), callbacks=[StopAt(3)])
    resumed = pretrain(run("stopped"))
    assert resumed.began_at == 3
    assert losses(resumed) == {step: x for step, x in losses(whole).items() if step > 3}
    mine, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(theirs[name], x) for name, x in mine.items())
    norm = "video.cnn.embedder.embedder.normalization.running_mean"
    assert mine[norm].any()


@pytest.mark.parametrize("task", ["pretrain", "retrieval", "hashing"])
def test_recomputed_and_in_bf16(task: str, make: Any, tune: Any, tmp_path: Path) -> None:
    """Recomputing the layers changes no loss; rounding changes them a little."""

    def run(name: str, *options: str) -> dict[int, tuple[float, ...]]:
        options += ("optimizer.steps=2",)
        if task == "pretrain":
            recipe = make(tmp_path / name, *options, dropout=0.1)
        else:
            recipe = tune(task, tmp_path / name, "data.validation=[]", *options)
        return losses(pretrain(recipe))

    whole = run("whole")
    if task == "hashing":  # a ResNet alone
        with pytest.raises(ValueError, match="COOKIEForHashing does not support"):
            run("recomputed", "run.gradient_checkpointing=true")
    else:
        assert run("recomputed", "run.gradient_checkpointing=true") == whole
    rounded = run("rounded", "run.precision=bf16")
    for step, parts in whole.items():
        assert rounded[step] == pytest.approx(parts, rel=0.05)


@pytest.mark.parametrize("task", ["pretrain", "retrieval", "hashing"])
def test_two_ranks_equal_one_process(
    task: str, make: Any, tune: Any, two_ranks: Any, tmp_path: Path
) -> None:
    """Negatives, and the statistics of the batch, are those of both processes."""
    options = ("optimizer.steps=3", "run.save_steps=3")
    two, one = (
        make(tmp_path / name, *options, **STILL)
        if task == "pretrain"
        else tune(task, tmp_path / name, *options, "data.validation=[]")
        for name in ("two", "one")
    )
    if task == "hashing":  # dropout is drawn by each process
        for recipe in (two, one):
            recipe.model |= {"hash_dropout": 0.0}
    path = write(two, tmp_path / "two.yaml")
    command = "pretrain" if task == "pretrain" else "finetune"
    process = two_ranks(command, "--config", str(path))
    trained = pretrain(one)
    wanted = {step: parts[0] for step, parts in losses(trained).items()}
    assert process.wait(timeout=ENOUGH) == 0
    state = json.loads((tmp_path / "two" / "checkpoint-3" / "trainer_state.json").read_text())
    found = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    assert found == pytest.approx(wanted, rel=1e-4)
    model, _, _ = load_trained(tmp_path / "two")
    theirs = model.state_dict()
    for name, x in trained.model.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(theirs[name], x, rtol=1e-3, atol=1e-5, msg=name)


def test_retrieval_and_ensembles(
    tune: Any, pretrained: Path, pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    folders = []
    for number, changes in enumerate(({"match_loss": "triplet"}, {"match_loss": "sum"})):
        options = (f"seed={number}", "evaluation.top_k=0")
        recipe = tune("retrieval", tmp_path / str(number), *options, image_size=24, **changes)
        path = write(recipe, tmp_path / f"{number}.yaml")
        assert cli.main(["finetune", "--config", str(path)]) == 0
        folders.append(tmp_path / str(number) / "best")
    best = json.loads((folders[0] / "validation.json").read_text())
    model, _, _ = load_trained(folders[0])
    assert type(model).__name__ == "COOKIEForRetrieval" and model.config.image_size == 24
    target = tmp_path / "found.json"
    words = ["evaluate", "retrieval", str(folders[0]), "--cpu", "--workers", "0", "--kind", "image"]
    words += ["--annotations", str(pictures / "test.json"), "--json", str(target)]
    capsys.readouterr()
    assert cli.main(words) == 0
    alone = json.loads(target.read_text())
    assert alone["mean"] == pytest.approx(best["score"])
    assert alone["rsum"] == pytest.approx(6 * alone["mean"])
    assert f"Rsum {alone['rsum']:.1f}" in capsys.readouterr().out
    assert cli.main([*words, "--folds", "2"]) == 0
    assert json.loads(target.read_text())["folds"] == 2
    # A model beside itself finds the same; another one changes the similarities.
    assert cli.main([*words, "--ensemble", str(folders[0])]) == 0
    twice = json.loads(target.read_text())
    assert twice["rsum"] == pytest.approx(alone["rsum"])
    assert cli.main([*words, "--ensemble", str(pretrained)]) == 0
    both = json.loads(target.read_text())
    assert both["settings"]["ensemble"] == str(pretrained)
    assert f"{pretrained}/model.safetensors" in both["settings"]["weights"]
    assert both["contrastive"]["text_to_video"] == both["text_to_video"]
    assert cli.main([*words, "--ensemble", str(tmp_path)]) == 2
    assert "--ensemble: must be the folder of a model, got" in capsys.readouterr().err
    assert cli.main([*words[:-2], "--ensemble", str(pretrained), "--kind", "video", "--probe"]) == 2
    assert "--probe: must be absent with --ensemble" in capsys.readouterr().err


def test_an_ensemble_is_the_mean_of_similarities(pretrained: Path, pictures: Path) -> None:
    from svitt_ops.training.data.annotations import read_annotations
    from svitt_ops.training.tasks.parts.evaluation import Evaluation, Reading
    from svitt_ops.training.tasks.parts.gallery import GalleryClips, build_gallery
    from svitt_ops.training.tasks.parts.ranks import recalls
    from svitt_ops.training.tasks.retrieval import retrieval

    entries = read_annotations(pictures / "test.json", kind="image").entries
    gallery, reading = build_gallery(entries), Reading(text_length=20)
    gallery.videos[0] = "missing.png"
    members, total = [], 0
    for seed in (0, 1):
        model, tokenizer, _ = load_trained(pretrained)
        torch.manual_seed(seed)
        for parameter in model.shared.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        members.append((model, tokenizer, reading))
        clips = GalleryClips(gallery, 1)
        total += retrieval(model, tokenizer, clips, text_length=20, keep_scores=True)["scores"]
    found = search_together(members, gallery, Evaluation(top_k=0))
    wanted = recalls(total, gallery.without([0]))
    assert {key: found[key] for key in wanted} == wanted
    assert list(found["skipped"]) == ["missing.png"] and found["videos"] == len(gallery.videos) - 1


def test_similarity_of_texts(
    pretrained: Path, pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "found.json"
    path = pictures / "texts.json"
    words = ["evaluate", "text-similarity", str(pretrained), "--cpu", "--json", str(target)]
    words += ["--annotations", str(path)]
    assert cli.main(words) == 0
    alone = json.loads(target.read_text())
    assert alone["score"] == pytest.approx((alone["pearson"] + alone["spearman"]) / 2)
    assert alone["chance"] == 0 and alone["pairs"] == alone["by_file"]["texts"]["pairs"] == 16
    assert alone["settings"]["join"] == "concatenated"
    assert "mean of files" in capsys.readouterr().out
    assert cli.main([*words, "--join", "mean"]) == 0
    mean = json.loads(target.read_text())
    assert mean["score"] != alone["score"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(path.read_text())[::2]))
    assert cli.main([*words, str(other), "--protocol", "sts", "--text-length", "20"]) == 0
    both = json.loads(target.read_text())
    found = both["by_file"]
    again = tmp_path / "texts.json"  # a file of the same name is another file
    again.write_text(other.read_text())
    assert cli.main([*words, str(again)]) == 0
    twins = json.loads(target.read_text())["by_file"]
    assert [twins[str(x)] for x in (path, again)] == [alone["by_file"]["texts"], found["other"]]
    assert both["score"] == pytest.approx((alone["score"] + found["other"]["score"]) / 2)
    assert "not as sts: text_length 20, there 50" in capsys.readouterr().out
    flat = tmp_path / "flat.json"
    flat.write_text(json.dumps([{"sentence1": "a", "sentence2": "b", "score": 1}] * 3))
    assert cli.main([*words[:-1], str(flat)]) == 2
    message = "text-similarity: flat flat: correlation: there is none, all 3 numbers"
    assert message in capsys.readouterr().err


def test_hashing(tune: Any, pictures: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = tune("hashing", tmp_path / "run", "evaluation.top_k=10", image_size=24)
    assert cli.main(["finetune", "--config", str(write(recipe, tmp_path / "recipe.yaml"))]) == 0
    assert "hashing: step 4: score" in capsys.readouterr().err
    best = json.loads((tmp_path / "run" / "best" / "validation.json").read_text())
    target = tmp_path / "found.json"
    words = ["evaluate", "hashing", str(tmp_path / "run" / "best"), "--cpu", "--workers", "0"]
    words += ["--kind", "image", "--annotations", str(pictures / "test-classes.json")]
    assert cli.main(words) == 2
    assert "--database: must be given, the annotations of what is searched" in (
        capsys.readouterr().err
    )
    words += ["--database", str(pictures / "train-classes.json"), "--json", str(target)]
    assert cli.main(words) == 0
    found = json.loads(target.read_text())
    assert found["map"] == pytest.approx(best["score"]) and found["top_k"] == 10
    assert 0 < found["chance"] < 100 and found["bits"] == 16 and found["database"] == 20
    assert found["settings"]["files"].keys() == {
        str(pictures / f"{split}-classes.json") for split in ("train", "test")
    }
    out = capsys.readouterr().out
    assert "MAP@10" in out and "random codes" in out
    rows = json.loads((pictures / "test-classes.json").read_text())
    (pictures / "cut.png").write_bytes((pictures / rows[0]["image"]).read_bytes()[:99])
    broken = [{**rows[0], "image": "cut.png"}, {**rows[0], "labels": []}, {"image": "a.png"}]
    (pictures / "broken-classes.json").write_text(json.dumps([*rows, *broken]))
    words[words.index(str(pictures / "test-classes.json"))] = str(pictures / "broken-classes.json")
    assert cli.main(words) == 0
    again = json.loads(target.read_text())
    assert (again["map"], again["queries"]) == (found["map"], found["queries"])
    assert len(again["left_out"]) == 2 and len(again["skipped"]) == 1
    assert "2 of 13 entries left out" in capsys.readouterr().out
    assert cli.main([*words, "--protocol", "coco-hashing"]) == 2
    message = "top_k must be 1 to 20, the size of the database, got 5000"
    assert message in capsys.readouterr().err
    few = tune("hashing", tmp_path / "few", hash_classes=2)
    with pytest.raises(ValueError, match=r"model\.hash_classes must be at least 4, the classes"):
        pretrain(few)
    with pytest.raises(ValueError, match="evaluation: top_k must be at least 0, got -1"):
        hashing.Evaluation(top_k=-1)


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """Videos as NumPy files, of 3 to 9 frames, some of them broken."""
    noise = np.random.default_rng(0)
    folder = tmp_path / "features"
    folder.mkdir()
    rows = []
    for k in range(16):
        array = noise.normal(size=(3 + k % 7, 24)).astype(("<f2", "<f4", "<f8")[k % 3])
        np.save(folder / f"video{k}.npy", array)
        rows.append({"video_id": f"video{k}", "caption": [f"a {COLOURS[k % 4]} thing", f"no {k}"]})
    good = (folder / "video1.npy").read_bytes()
    for name, content in {
        "cut": good[:-1],
        "text": b"features",
        "empty": b"",
        "version": good.replace(b"NUMPY\x01", b"NUMPY\x09"),
    }.items():
        (folder / f"{name}.npy").write_bytes(content)
    np.save(folder / "wide.npy", np.zeros((3, 25), "<f4"))
    np.save(folder / "nan.npy", np.full((3, 24), np.nan, "<f4"))
    np.save(folder / "whole.npy", np.zeros((3, 24), "<i8"))
    np.save(folder / "columns.npy", np.zeros((3, 24), "<f4", order="F"))
    np.save(folder / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    broken = ("cut", "text", "empty", "version", "wide", "nan", "whole", "columns", "objects")
    rows += [{"video_id": name, "caption": name} for name in (*broken, "gone")]
    (tmp_path / "videos.json").write_text(json.dumps(rows))
    return tmp_path / "videos.json"


@pytest.mark.parametrize("pooling", ["mean", "gpo"])
def test_features_of_videos(
    pooling: str, make_recipe: Any, features: Path, tmp_path: Path, capsys: Capture
) -> None:
    corpus = f"[{{annotations: {features}, root: {features.parent / 'features'}}}]"
    recipe = make_recipe(
        tmp_path / "run",
        "system=cookie",
        "task=retrieval",
        f"data.train={corpus}",
        f"data.validation={corpus}",
        "data.keep_together=null",
        "data.positives=video",
    )
    recipe.model = {
        **MODEL,
        "feature_size": 24,
        "num_frames": 5,
        "pooling": pooling,
        "match_loss": "contrastive",
    }
    assert cli.main(["pretrain", "--config", str(write(recipe, tmp_path / "recipe.yaml"))]) == 0
    capsys.readouterr()
    target = tmp_path / "found.json"
    words = ["evaluate", "retrieval", str(tmp_path / "run"), "--cpu", "--workers", "0"]
    words += ["--annotations", str(features), "--root", str(features.parent / "features")]
    assert cli.main([*words, "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert (found["videos"], found["texts"]) == (16, 32)
    reasons = {Path(path).stem: reason for path, reason in found["skipped"].items()}
    for name, message in {
        "cut": "is cut off",
        "text": "is no .npy file",
        "empty": "is empty",
        "version": "version (9, 0)",
        "wide": "must have shape (frames, 24), got (3, 25)",
        "nan": "holds NaN or infinity",
        "whole": "must hold floating numbers row by row, got <i8",
        "columns": "row by row, got <f4 column by column",
        "objects": "must hold floating numbers row by row, got |O",
        "gone": "No such file",
    }.items():
        assert message in reasons.pop(name), name
    assert not reasons
    assert cli.main([*words, "--clips", "2", "--probe"]) == 0


def test_starts_from_a_resnet(make: Any, tmp_path: Path) -> None:
    """Of a folder, and of a file with torchvision's names."""
    torch.manual_seed(0)
    sizes: Any = {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8}
    resnet = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic"))
    resnet.save_pretrained(tmp_path / "resnet")
    stem = resnet.resnet.embedder.embedder.convolution.weight
    state = {f"layer1.0.conv1.{name}": x for name, x in (("weight", torch.ones(8, 8, 3, 3)),)}
    torch.save(state | {"layer2.0.conv1.weight": torch.ones(16, 8, 3, 3)}, tmp_path / "few.pth")
    recipe = make(tmp_path / "run", f"init.resnet={tmp_path / 'resnet'}", "optimizer.lr=1e-30")
    found = pretrain(recipe).model.video.cnn.embedder.embedder.convolution.weight
    assert torch.equal(found, stem)
    for path, message in (
        (tmp_path / "few.pth", "must hold the weights of such a model, got 2 of its"),
        (tmp_path / "none", r"init\.resnet: must be a folder with a resnet model"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain(make(tmp_path / "bad", f"init.resnet={path}"))
    other = make(tmp_path / "bad", f"init.resnet={tmp_path / 'resnet'}", "system=albef")
    other.model = {}
    with pytest.raises(ValueError, match=r"init\.resnet must be null, albef does not start"):
        pretrain(other)

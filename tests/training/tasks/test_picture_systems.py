"""Systems of pictures: pretrained, tuned for every task, evaluated, killed, shared among ranks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from running import DENSE, ENOUGH, OF_PICTURES, losses, run_killed, write
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    RobertaConfig,
    RobertaModel,
)

from svitt_ops.training import cli
from svitt_ops.training.corpora.pictures import build_pictures
from svitt_ops.training.corpora.scenes import PictureSpec
from svitt_ops.training.engine.checkpoints import checkpoints
from svitt_ops.training.engine.loading import load_trained
from svitt_ops.training.engine.run import pretrain
from svitt_ops.training.engine.saving import TRAINING_STATE

pytestmark = pytest.mark.usefixtures("one_thread")
DENSE_PICTURES = {**DENSE, "bias_init_std": 0.0, "num_frames": 1}
MODEL = {
    **DENSE_PICTURES,
    "queue_size": 20,  # no multiple of a batch
    "momentum": 0.5,
    "alpha_warmup_steps": 2,
    "decoder_layers": 1,
}
MODELS_OF = {system: MODEL | fields for system, fields in OF_PICTURES.items()}
MODELS_OF["scl"] = {**DENSE_PICTURES, "fusion_intermediate_size": 24, "false_texts": 3}
PREFIXES = {"albef": "ALBEF", "simla": "SIMLA", "softmask": "SoftMask", "scl": "SCL"}
FILES = {
    "retrieval": "",
    "qa": "-questions",
    "reasoning": "-reasoning",
    "entailment": "-entailment",
    "grounding": "-grounding",
}
MODELS = {
    "retrieval": "Retrieval",
    "qa": "QuestionAnswering",
    "reasoning": "VisualReasoning",
    "entailment": "VisualEntailment",
    "grounding": "Retrieval",
}
CHANCES = {"reasoning": 50, "entailment": 100 / 3}
PROTOCOLS = {"qa": "vqa2", "reasoning": "nlvr2", "entailment": "snli-ve"}
CASES = [
    *(("albef", task) for task in FILES),
    ("simla", "reasoning"),
    ("simla", "grounding"),
    ("softmask", "entailment"),
    ("softmask", "grounding"),
    *(("scl", task) for task in ("retrieval", "qa", "reasoning")),
]
SHARED: dict[str, Any] = {"loss_weights": {"vtc": 1, "vtm": 0, "mlm": 0}}
"""Matching draws its negatives from the pairs of a process; masked words differ in number."""
DETERMINED: dict[str, dict[str, Any]] = {
    "simla": {"loss_weights": {"vtc": 1, "vtm": 0, "mlm": 0, "mim": 0, "psl": 1}},
    "softmask": {
        "loss_weights": {"vtc": 1, "vtm": 0, "mlm": 0, "soft": 0},
        **dict.fromkeys(("jitter", "grayscale_rate", "blur_rate"), 0.0),
    },
    "scl": {"loss_weights": {"vtc": 1, "vtm": 0, "mlm": 0, "scl": 1}},
}
"""What a system draws besides is left out."""
IMAGES = ("data.keep_together=null", "data.positives=video", "data.text_length=20")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    spec = PictureSpec(size=32, train_pictures=20, validation_pictures=10, test_pictures=10)
    build_pictures(folder, spec)
    return folder


@pytest.fixture(scope="module")
def make(make_recipe: Any, pictures: Path) -> Any:
    """Recipes of pretraining."""

    def recipe(output: Path, *overrides: str, system: str = "albef", **model: Any) -> Any:
        train = f"data.train=[{{annotations: {pictures / 'train.json'}, kind: image}}]"
        changes = MODELS_OF[system] | model
        return make_recipe(output, f"system={system}", train, *IMAGES, *overrides, **changes)

    return recipe


@pytest.fixture(scope="module")
def pretrained(make: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each system."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pretrained")
    return {
        system: pretrain(make(folder / system, "optimizer.steps=2", system=system)).folder
        for system in MODELS_OF
    }


@pytest.fixture
def tune(make_recipe: Any, pictures: Path, pretrained: dict[str, Path]) -> Any:
    """Recipes of a task that start from the pretrained model, or from another."""

    def recipe(
        task: str, output: Path, *overrides: str, system: str = "albef", **model: Any
    ) -> Any:
        train, test = (pictures / f"{x}{FILES.get(task, '')}.json" for x in ("train", "test"))
        validation = f"data.validation=[{{annotations: {test}, kind: image}}]"
        found = make_recipe(
            output,
            f"system={system}",
            f"task={task}",
            f"init.checkpoint={pretrained[system]}",
            "tokenizer.train_vocab_size=null",
            f"data.train=[{{annotations: {train}, kind: image}}]",
            *IMAGES,
            *([validation] if task in FILES else []),
            *([f"data.answers={pictures / 'answers.json'}"] if task == "qa" else []),
            *overrides,
        )
        found.model = model
        return found

    return recipe


@pytest.mark.parametrize(("system", "task"), CASES)
def test_from_a_pretrained_model_to_numbers(
    system: str,
    task: str,
    tune: Any,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tune(task, tmp_path / "run", system=system, image_size=24)
    assert cli.main(["finetune", "--config", str(write(recipe, tmp_path / "recipe.yaml"))]) == 0
    assert f"{task}: step 6: score" in capsys.readouterr().err
    model, _, _ = load_trained(tmp_path / "run")
    assert type(model).__name__ == f"{PREFIXES[system]}For{MODELS[task]}"
    assert model.config.image_size == 24
    best = json.loads((tmp_path / "run" / "best" / "validation.json").read_text())
    target = tmp_path / "found.json"
    words = ["evaluate", task, str(tmp_path / "run" / "best"), "--cpu", "--workers", "1"]
    words += ["--kind", "image", "--annotations", str(pictures / f"test{FILES[task]}.json")]
    assert cli.main([*words, "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["mean" if task == "retrieval" else "accuracy"] == best["score"]
    assert found["settings"]["sources"]["text_length"] == "run"
    if task in CHANCES:
        assert found["chance"] == pytest.approx(CHANCES[task])
        assert "always the commonest class" in capsys.readouterr().out
    if task in PROTOCOLS:
        assert cli.main([*words, "--protocol", PROTOCOLS[task], "--batch-size", "3"]) == 0
    if task != "qa":
        assert cli.main([*words, "--metric", "vqa"]) == 2
        assert f"--metric: is no option of {task}" in capsys.readouterr().err


@pytest.mark.parametrize("whole", [True, False])
def test_scl_starts_from_clip_and_roberta(
    whole: bool, make: Any, pretrained: dict[str, Path], tmp_path: Path, caplog: Any
) -> None:
    """Of folders of transformers' models: of a whole CLIP, or of its vision model alone."""
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    tower = {**small, "num_hidden_layers": 3, "image_size": 24, "patch_size": 8}
    texts = {**small, "num_hidden_layers": 1, "vocab_size": 50}
    if whole:
        clip: Any = CLIPModel(CLIPConfig(vision_config=tower, text_config=texts))
        vision = clip.vision_model
    else:
        clip = vision = CLIPVisionModel(CLIPVisionConfig(**tower))
    clip.save_pretrained(tmp_path / "clip")
    vocabulary = load_trained(pretrained["scl"])[0].config.vocab_size
    words = {**texts, "vocab_size": vocabulary, "max_position_embeddings": 34}
    roberta = RobertaModel(RobertaConfig(**words, type_vocab_size=1), add_pooling_layer=False)
    roberta.save_pretrained(tmp_path / "roberta")
    options = (f"init.clip={tmp_path / 'clip'}", f"init.roberta={tmp_path / 'roberta'}")
    rates = ("optimizer.lr=1e-30", "optimizer.steps=1", "optimizer.lr_scales={fusion: 5}")
    model: Any = pretrain(
        make(tmp_path / "run", *options, *rates, system="scl", max_position_embeddings=32)
    ).model
    names = vision.state_dict()
    prefix = next(name for name in names if "patch_embedding.weight" in name)
    torch.testing.assert_close(model.video.patches.weight, names[prefix])
    table = roberta.embeddings.position_embeddings.weight
    torch.testing.assert_close(model.text.embeddings.position.weight, table[2:])
    assert not [text for text in caplog.messages if "random" in text or "counterpart" in text]
    with pytest.raises(ValueError, match=r"optimizer\.lr_scales: keys must begin names"):
        pretrain(make(tmp_path / "other", "optimizer.lr_scales={head: 5}", system="scl"))


def test_a_pretrained_scl_searches_without_tuning(
    pretrained: dict[str, Path], pictures: Path, tmp_path: Path, caplog: Any
) -> None:
    """All pairs go through the fusion layers, by a rank head that starts as the match head."""
    target = tmp_path / "found.json"
    words = ["evaluate", "retrieval", str(pretrained["scl"]), "--cpu", "--workers", "0"]
    words += ["--kind", "image", "--annotations", str(pictures / "test.json")]
    found = []
    for top in ("20", "19"):  # of ten pictures and twenty texts
        assert cli.main([*words, "--top-k", top, "--json", str(target)]) == 0
        found.append(json.loads(target.read_text()))
    assert found[0]["text_to_video"] == found[1]["text_to_video"]
    assert found[0]["settings"]["test_sampling"] == "middle"
    assert cli.main([*words, "--protocol", "lsmdc"]) == 0
    together = [*words, "--ensemble", str(pretrained["scl"])]
    for more, count in (["--top-k", "0"], 0), ([], 1):  # an ensemble ranks by similarities alone
        assert cli.main([*together, *more]) == 0
        assert caplog.text.count("--ensemble: ranks by similarities alone") == count


@pytest.mark.parametrize("system", OF_PICTURES)
def test_layers_and_detections_of_grounding(
    system: str,
    pretrained: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Maps of any fusion layer, of a model that was pretrained alone."""
    target = tmp_path / "found.json"
    words = ["evaluate", "grounding", str(pretrained[system]), "--cpu", "--workers", "0"]
    words += ["--annotations", str(pictures / "test-grounding.json"), "--json", str(target)]
    assert cli.main([*words, "--layer", "1"]) == 0
    free = json.loads(target.read_text())
    assert free["with_detections"] == 0 and free["settings"]["layer"] == 1
    assert cli.main([*words, "--detections", str(pictures / "detections.json")]) == 0
    chosen = json.loads(target.read_text())
    assert chosen["with_detections"] == chosen["references"] == free["references"]
    assert 33 < chosen["chance"] < 50 and chosen["pointing_chance"] == free["pointing_chance"]
    assert cli.main([*words, "--bf16"]) == 0
    assert cli.main([*words, "--layer", "3"]) == 2
    assert "layer must be a fusion layer, " in capsys.readouterr().err


def test_text_assignment_comes_before_reasoning(tune: Any, tmp_path: Path, caplog: Any) -> None:
    assigned = pretrain(tune("text_assignment", tmp_path / "assigned"))
    assert type(assigned.model).__name__ == "ALBEFForTextAssignment"
    assert all(math.isfinite(parts[0]) for parts in losses(assigned).values())
    assert len(losses(assigned)) == 6
    caplog.clear()
    options = (f"init.checkpoint={assigned.folder}", "optimizer.steps=1", "optimizer.lr=1e-30")
    reasoning = pretrain(tune("reasoning", tmp_path / "tuned", *options))
    (report,) = [x for x in caplog.messages if "no weights" in x or "missing" in x or "random" in x]
    assert "class_head" in report and "fusion" not in report
    for name, x in assigned.model.fusion.named_parameters():
        assert torch.equal(x, reasoning.model.fusion.get_parameter(name))
    first, second = (
        x[0].mlp.up.weight for x in (reasoning.model.fusion.layers, reasoning.model.fusion.second)
    )
    assert not torch.equal(first, second)  # they went apart while texts were assigned


@pytest.mark.parametrize("system", ["albef", "scl"])
def test_pretraining_killed_and_resumed(system: str, make: Any, tmp_path: Path) -> None:
    """Losses, twin and queues are those of a run that was not killed, bit by bit."""
    options = ("optimizer.steps=9", "run.save_steps=2")
    twin = system == "albef"
    random = {"text_dropout": 0.1, **({"alpha_warmup_steps": 7} if twin else {})}
    whole = losses(pretrain(make(tmp_path / "whole", *options, system=system, **random)))
    assert len(whole) == 9 and all(len(x) == (4 if twin else 5) for x in whole.values())
    recipe = make(tmp_path / "killed", *options, system=system, **random)
    run_killed(6, "pretrain", "--config", str(write(recipe, tmp_path / "killed.yaml")))
    assert [step for step, _ in checkpoints(tmp_path / "killed")] == [2, 4]
    resumed = pretrain(recipe)
    assert resumed.began_at == 4
    assert losses(resumed) == {step: parts for step, parts in whole.items() if step > 4}
    if not twin:
        return
    one, other = _states(tmp_path / "whole", tmp_path / "killed", step=8)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert int(one["steps"]) == 8 and int(one["queue.next"]) == 8 * 8 % 20


@pytest.mark.parametrize(
    ("system", "task"),
    [(system, "pretrain") for system in MODELS_OF]
    + [("albef", "retrieval"), ("albef", "entailment"), ("scl", "retrieval"), ("scl", "qa")],
)
def test_two_ranks_equal_one_process(
    system: str, task: str, make: Any, tune: Any, two_ranks: Any, tmp_path: Path
) -> None:
    """Losses, the twin, and the queues with the ids of their pairs."""
    options = ["optimizer.steps=3", "run.save_steps=3"]
    model = {} if task in ("entailment", "qa") else SHARED | DETERMINED.get(system, {})
    if (system, task) == ("scl", "retrieval"):  # clips are contrasted with a process's texts
        model = {"loss_weights": {"vtc": 0, "vtm": 1}}
    two, one = (
        make(tmp_path / name, *options, system=system, **model)
        if task == "pretrain"
        else tune(task, tmp_path / name, *options, "data.validation=[]", system=system, **model)
        for name in ("two", "one")
    )
    path = write(two, tmp_path / "two.yaml")
    command = "pretrain" if task == "pretrain" else "finetune"
    process = two_ranks(command, "--config", str(path))
    wanted = {step: parts[0] for step, parts in losses(pretrain(one)).items()}
    assert process.wait(timeout=ENOUGH) == 0
    state = json.loads((tmp_path / "two" / "checkpoint-3" / "trainer_state.json").read_text())
    found = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    assert all(map(math.isfinite, wanted.values()))
    assert found == pytest.approx(wanted, rel=1e-5)
    if system not in OF_PICTURES:
        return  # there is no twin
    mine, theirs = _states(tmp_path / "one", tmp_path / "two", step=3)
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        if name.endswith("key.bias"):  # without effect: Adam makes steps of what rounding leaves
            continue
        torch.testing.assert_close(theirs[name], x, rtol=1e-4, atol=1e-5, msg=name)
    if task != "entailment":
        assert int(mine["queue.next"]) == 3 * 8 % 20
        assert (mine["queue.ids"] >= 0).sum() == 20


def _states(*folders: Path, step: int) -> list[dict[str, torch.Tensor]]:
    """What training goes on from besides the weights."""
    return [load_file(folder / f"checkpoint-{step}" / TRAINING_STATE) for folder in folders]

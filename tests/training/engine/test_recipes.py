"""Recipes: the shipped ones, overrides, and what is refused."""

from pathlib import Path

import pytest
import torch

from svitt_ops.models import SViTTConfig, SViTTForPreTraining, sparsity_table
from svitt_ops.models.systems import load_system
from svitt_ops.training import cli
from svitt_ops.training.engine.recipes import (
    Corpus,
    Recipe,
    load_recipe,
    recipe_text,
    shipped_recipes,
)

DENSE = [(4, 784, 203_394_653), (8, 1568, 204_234_461)]
"""Frames, patches and parameters."""


@pytest.mark.parametrize(
    ("name", "frames", "keep", "lr", "batch"),
    [
        ("pretrain-4f", 4, 0.7, 3e-5, 512),
        ("pretrain-8f", 8, 0.6, 1e-5, 336),
        ("pretrain-16f", 16, 0.5, 5e-6, 192),
    ],
)
def test_stages_of_the_paper(name: str, frames: int, keep: float, lr: float, batch: int) -> None:
    recipe = load_recipe(name)
    assert recipe.model["num_frames"] == frames
    assert recipe.model["keep_rate"] == keep
    assert recipe.model["multimodal_keep_rate"] == 0.1
    assert (recipe.model["num_local"], recipe.model["num_random"]) == (1, 3)
    assert recipe.model["block_size"] == 56
    assert (recipe.optimizer.lr, recipe.optimizer.batch_size) == (lr, batch)
    assert (recipe.optimizer.epochs, recipe.optimizer.warmup_epochs) == (10, 1)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.min_lr_ratio) == (0.02, 0.01)
    assert recipe.data.text_length == 32
    assert (recipe.init.checkpoint is None) == (frames == 4)


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "weights"),
    [
        ("cookie-pretrain-1", 576, 30, {"ccl": 1, "vcl": 0, "tcl": 0}),
        ("cookie-pretrain-2", 288, 10, {"ccl": 1, "vcl": 1, "tcl": 1}),
    ],
)
def test_cookie_s_stages(name: str, batch: int, epochs: int, weights: dict[str, int]) -> None:
    recipe = load_recipe(name)
    optimizer = recipe.optimizer
    assert (recipe.system, recipe.data.text_length) == ("cookie", 50)
    assert (optimizer.batch_size, optimizer.epochs, optimizer.lr) == (batch, epochs, 2e-5)
    assert (optimizer.decay, optimizer.drop, optimizer.drop_at) == ("step", 0.1, [0.5])
    assert optimizer.lr_scales == {"video.cnn.": 0.1}
    assert recipe.model["loss_weights"] == weights
    config = load_system("cookie").config(**recipe.model)
    assert (config.image_size, config.grid_size, config.shared_layers) == (512, 16, 2)


@pytest.mark.parametrize(("frames", "tokens", "parameters"), DENSE)
def test_dense_stages_differ_in_sparsity_alone(frames: int, tokens: int, parameters: int) -> None:
    name = f"pretrain-{frames}f"
    sparse, dense = load_recipe(name), load_recipe(f"{name}-dense")
    config = SViTTConfig(**dense.model)
    (row,) = sparsity_table(config, frames=[frames])
    assert (row.edges.sparsity, row.macs) == (0, row.dense_macs)
    assert row.tokens == row.multimodal_tokens == (tokens,)
    with torch.device("meta"):
        model = SViTTForPreTraining(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert dense.init.checkpoint == (
        None if frames == 4 else load_recipe("pretrain-4f-dense").output
    )
    assert dense.output == f"{sparse.output}-dense"
    dense.model, dense.output, dense.init = sparse.model, sparse.output, sparse.init
    assert dense == sparse


def test_stages_of_singularity() -> None:
    first, second = (load_recipe(f"singularity-pretrain-{n}f") for n in (1, 4))
    assert (first.model["num_frames"], second.model["num_frames"]) == (1, 4)
    assert "temporal_layers" not in first.model and second.model["temporal_layers"] == 2
    assert first.init.beit and first.init.bert and first.tokenizer.append_sep is False
    assert second.init.checkpoint == first.output
    assert (first.optimizer.lr, first.optimizer.epochs) == (1e-4, 10)
    assert (second.optimizer.lr, second.optimizer.epochs) == (5e-5, 5)
    for recipe in (first, second):
        assert (recipe.system, recipe.optimizer.min_lr_ratio) == ("singularity", 0.01)
    for task in ("retrieval", "qa"):
        recipe = load_recipe(f"singularity-{task}-msrvtt")
        assert (recipe.task, recipe.init.checkpoint) == (task, second.output)


OF_PICTURES = {  # size, text, batch, rate, its floor, epochs
    "albef-pretrain": (256, 25, 512, 1e-4, 1e-5, 30),
    "simla-pretrain": (256, 25, 512, 1e-4, 1e-5, 30),
    "softmask-pretrain": (256, 25, 1024, 2e-4, 2e-5, 30),
    **{
        f"{system}-retrieval-{corpus}": (384, 30, 256, 1e-5, 1e-6, epochs)
        for system in ("albef", "simla", "softmask")
        for corpus, epochs in (("flickr30k", 10), ("coco", 5))
    },
    "albef-qa-vqa2": (384, 25, 256, 2e-5, 1e-6, 8),
    "albef-text-assignment": (256, 25, 512, 2e-5, 1e-5, 1),
    "albef-reasoning-nlvr2": (384, 40, 128, 2e-5, 1e-6, 10),
    "albef-entailment-snli-ve": (384, 40, 256, 2e-5, 1e-6, 5),
    "albef-grounding-refcoco-plus": (384, 40, 256, 1e-5, 1e-6, 5),
}


@pytest.mark.parametrize("name", OF_PICTURES)
def test_recipes_of_pictures(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(name)
    optimizer, system = recipe.optimizer, name.partition("-")[0]
    found = (recipe.model["image_size"], recipe.data.text_length, optimizer.batch_size)
    floor = pytest.approx(optimizer.lr * optimizer.min_lr_ratio)
    assert (*found, optimizer.lr, floor, optimizer.epochs) == OF_PICTURES[name]
    assert (recipe.system, optimizer.weight_decay) == (system, 0.02)
    assert all(corpus.kind == "image" for corpus in recipe.data.train)
    command = "pretrain" if name.endswith("pretrain") else "finetune"
    if command == "pretrain":
        assert (optimizer.mask_probability, recipe.tokenizer.append_sep) == (0.15, False)
        assert optimizer.warmup_steps == (1000 if system == "softmask" else 2000)
    else:
        before = "albef-text-assignment" if recipe.task == "reasoning" else f"{system}-pretrain"
        assert recipe.init.checkpoint == load_recipe(before).output
    assert cli.main([command, "--config", name, "--show"]) == 0
    assert f"task: {recipe.task}\n" in capsys.readouterr().out


SCL = {  # size, batch, rate, epochs, scales
    "scl-pretrain": (288, 4096, 1e-5, None, {"fusion": 5, "match_head": 5, "token_head": 5}),
    "scl-pretrain-4f": (224, 4096, 5e-6, None, {"fusion": 5, "match_head": 5, "token_head": 5}),
    "scl-qa-vqa2": (384, 512, 5e-6, 10, {"fusion": 10, "class_head": 50}),
    "scl-reasoning-nlvr2": (288, 256, 1e-5, 10, {"fusion": 10, "class_head": 10}),
    "scl-retrieval-flickr30k": (384, 512, 5e-6, 10, {"fusion": 10}),
    "scl-retrieval-coco": (384, 512, 5e-6, 10, {"fusion": 5}),
    "scl-retrieval-msrvtt": (224, 256, 5e-6, 10, {"fusion": 5}),
    "scl-retrieval-lsmdc": (224, 256, 5e-6, 10, {"fusion": 5}),
}


@pytest.mark.parametrize("name", SCL)
def test_recipes_of_scl(name: str) -> None:
    recipe = load_recipe(name)
    optimizer, model = recipe.optimizer, recipe.model
    size, batch, rate, epochs, scales = SCL[name]
    assert (model["image_size"], optimizer.batch_size, optimizer.lr) == (size, batch, rate)
    assert (recipe.system, optimizer.lr_scales, recipe.data.text_length) == ("scl", scales, 50)
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.98), 0.01)
    assert (optimizer.decay, optimizer.min_lr_ratio) == ("linear", 0)
    video = name in ("scl-pretrain-4f", "scl-retrieval-msrvtt", "scl-retrieval-lsmdc")
    assert model.get("num_frames", 1) == (4 if video else 1)
    assert recipe.data.test_sampling == ("ends" if video else "middle")
    if epochs is None:
        assert optimizer.warmup_steps == optimizer.steps / 10
        assert (optimizer.mask_words, optimizer.mask_probability) == (True, 0.15)
    else:
        share = 0.05 if video else 0.1
        assert (optimizer.epochs, optimizer.warmup_epochs) == (epochs, share * epochs)
    if name != "scl-pretrain":
        before = "scl-pretrain-4f" if video and epochs else "scl-pretrain"
        assert recipe.init.checkpoint == load_recipe(before).output


def test_recipes_of_albef_are_those_of_its_kin() -> None:
    for name in ("qa-vqa2", "reasoning-nlvr2", "entailment-snli-ve", "grounding-refcoco-plus"):
        for system in ("simla", "softmask"):
            overrides = [f"system={system}", f"init.checkpoint=runs/{system}"]
            assert load_recipe(f"albef-{name}", overrides).system == system
    with pytest.raises(ValueError, match="system must be one of albef, which have a model for"):
        load_recipe("albef-text-assignment", ["system=simla"])


def test_a_recipe_of_another_system() -> None:
    dense = [f"model.{key}=1" for key in ("keep_rate", "multimodal_keep_rate")]
    recipe = load_recipe("retrieval-didemo", ["system=singularity", "model.num_frames=4", *dense])
    assert recipe.system == "singularity"
    with pytest.raises(
        ValueError, match=r"recipe: model\.keep_rate must be 1: Singularity is dense"
    ):
        load_recipe("retrieval-didemo", ["system=singularity", "init.checkpoint=null"])


def test_every_shipped_recipe_reads_back(tmp_path: Path) -> None:
    assert len(shipped_recipes()) >= 5
    for name in shipped_recipes():
        recipe = load_recipe(name)
        path = tmp_path / f"{name}.yaml"
        path.write_text(recipe_text(recipe))
        assert load_recipe(path) == recipe


def test_overrides() -> None:
    overrides = [
        "optimizer.lr=1e-4",
        "data.train.0.root=/videos",
        "model.num_frames=2",
        "run.trainer.fsdp=full_shard",
    ]
    recipe = load_recipe("pretrain-4f", overrides)
    assert recipe.optimizer.lr == 1e-4
    assert recipe.data.train[0].root == "/videos"
    assert recipe.data.train[1].root == "images/cc3m"
    assert recipe.model["num_frames"] == 2
    assert recipe.model["keep_rate"] == 0.7
    assert recipe.run.trainer == {"fsdp": "full_shard"}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.lrr=3", "optimizer.lrr"),
        ("optimiser.lr=3", "optimiser"),
        ("data.train.0.rot=3", "rot"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.lr", "key=value"),
        ("run.precision=fp8", "run.precision"),
        ("data.positives=all", "data.positives"),
        ("data.train.0.kind=audio", "kind"),
        ("optimizer.batch_size=0", "optimizer.batch_size"),
        ("optimizer.accumulation=3", "optimizer.accumulation"),
        ("data.crop_scale=[0.9,0.5]", "data.crop_scale"),
        ("tokenizer.train_vocab_size=100", "tokenizer"),
    ],
)
def test_wrong_overrides_are_named(override: str, named: str) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe("pretrain-4f", [override])
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optim: {lr: 3}", "optim"),
        ("data: {train: [{annotation: x}]}", "annotation"),
        ("optimizer: {lr: 3", "YAML"),
        ("- a\n- b", "mapping"),
        ("optimizer: 3", "Optimizer"),
        ("data: {train: {annotations: x}}", "data.train must be a list"),
        ("data: {train: [{root: x}]}", "annotations"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_recipe(path)
    assert named in str(error.value)
    assert "recipe" in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data:\n", "data must be a mapping of keys of Data, got None"),
        ("optimizer: 5\n", "optimizer must be a mapping of keys of Optimizer, got 5"),
        ("data: {train: {annotations: a}}", "data.train must be a list, got {'annotations': 'a'}"),
        (
            "data: {train: [[a.json, videos]]}",
            "data.train.0 must be a mapping of keys of Corpus, got ['a.",
        ),
        ("optimizer: {betas: [.9, x]}", "optimizer.betas must be a list of two numbers, got [0.9,"),
        ("run: {trainer: [1]}", "run.trainer must be a mapping of keys, got [1]"),
    ],
)
def test_values_of_another_form_are_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"recipe {path}: {named}")


def test_forms_that_stand_for_others(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: {train: [{annotations: a}], crop_scale: ['0.5', '${optimizer.eps}']}\n"
        "optimizer: {betas: '${data.crop_scale}', eps: 0.75}\n"
    )
    recipe = load_recipe(path, ["data.train[0].root=x", "data.train[1].annotations=b"])
    assert recipe.optimizer.betas == recipe.data.crop_scale == (0.5, 0.75)
    assert recipe.data.train == [Corpus(annotations="a", root="x"), Corpus(annotations="b")]


def test_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match="pretrain-4f"):
        load_recipe("pretrain-5f")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed must be 0 to"),
        ("data.sampling=foo", "data.sampling must be rand, middle or fpsX"),
        ("data.sampling=fps0", "data.sampling must be"),
        ("data.short_side=0", "data.short_side must be at least 1, got 0"),
        ("data.text_length=2", "data.text_length must be at least 3"),
        ("data.text_length=513", r"at most model.max_position_embeddings \(512\), got 513"),
        ("data.pad_to=both", "data.pad_to must be one of longest, max, got 'both'"),
        ("data.max_words=0", "data.max_words must be at least 1"),
        ("data.crop_scale=[0,1]", "data.crop_scale must be 0 < low <= high <= 1"),
        ("data.crop_scale=[.nan,1]", "data.crop_scale must be"),
        ("data.workers=-1", "data.workers must be at least 0, got -1"),
        ("data.train.1.captions=some", "data.train.1.captions must be one of each, join"),
        ("optimizer.lr=nan", "optimizer.lr must be positive and finite, got nan"),
        ("optimizer.lr=inf", "optimizer.lr must be positive and finite, got inf"),
        ("optimizer.lr=0", "optimizer.lr must be positive"),
        ("optimizer.bias_lr_scale=-1", "optimizer.bias_lr_scale must be positive"),
        ("optimizer.lr_scales={text.: 0}", "optimizer.lr_scales must be a mapping to positive"),
        ("optimizer.lr_scales={'': 2}", "optimizer.lr_scales must be .*, of beginnings of names"),
        ("optimizer.decay=never", "optimizer.decay must be one of cosine, linear, step, got"),
        ("optimizer.drop=0", "optimizer.drop must be positive and finite, got 0"),
        ("optimizer.drop_at=[0.5,1.5]", r"optimizer.drop_at must be a list of shares, 0 to 1, got"),
        ("optimizer.min_lr_ratio=1.5", "optimizer.min_lr_ratio must be 0 to 1, got 1.5"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas must be two numbers of 0 to less than 1"),
        ("optimizer.eps=0", "optimizer.eps must be positive"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay must be at least 0"),
        ("optimizer.epochs=0", "optimizer.epochs must be positive"),
        ("optimizer.epochs=.inf", "optimizer.epochs must be positive and finite"),
        ("optimizer.steps=0", "optimizer.steps must be at least 1, got 0"),
        ("optimizer.steps=-5", "optimizer.steps must be at least 1, got -5"),
        ("optimizer.warmup_epochs=-1", "optimizer.warmup_epochs must be at least 0"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps must be at least 0"),
        ("optimizer.accumulation=0", "optimizer.accumulation must be at least 1"),
        ("optimizer.max_grad_norm=-1", "optimizer.max_grad_norm must be at least 0"),
        ("optimizer.mask_probability=1.1", "optimizer.mask_probability must be 0 to 1"),
        ("run.save_steps=0", "run.save_steps must be at least 1"),
        ("run.keep_checkpoints=-1", "run.keep_checkpoints must be at least 0, got -1"),
        ("run.log_steps=0", "run.log_steps must be at least 1"),
        ("run.device=tpu", "run.device must be one of cpu, cuda, got 'tpu'"),
        ("run.trainer.fdsp=x", "run.trainer has 'fdsp'.*did you mean 'fsdp'"),
        ("run.trainer.num_train_epochs=x", "run.trainer.num_train_epochs must be a number, got"),
        ("run.trainer.use_cpu=3", "run.trainer.use_cpu must be true or false, got 3"),
        ("model.hiden_size=3", "model has no key 'hiden_size'; did you mean 'hidden_size'"),
        ("model.keep_rate=2", "model.keep_rate must be more than 0 and at most 1, got 2"),
        ("model.num_frames=0", "model.num_frames must be an integer of at least 1, got 0"),
        ("model.block_size=257", "model.block_size must be 1 to 256, got 257"),
        ("model.num_attention_heads=384", "model.num_attention_heads must be such that hidden"),
        ("model.layer_norm_eps=-1", "model.layer_norm_eps must be a number of at least 0"),
        ("model.bias_init_std=.nan", "model.bias_init_std must be a number of at least 0, got nan"),
        ("model.eval_pattern_seed=x", "model.eval_pattern_seed must be an integer or None"),
        ("model.loss_weights=3", "model.loss_weights must be keyed by"),
        ("model.loss_weights={vtc: -1}", "model.loss_weights must be numbers of at least 0"),
        ("model.id2label=5", "model has no key 'id2label'"),
        ("model.dtype=nope", "model has no key 'dtype'"),
        ("model.temperature_min=x", "model.temperature_min must be a number of at least 0, got"),
        ("model.vocab_size=3", "model.vocab_size is the tokenizer's"),
        ("output=", "output: must be a path, got ''"),
        ("data.train.0.root=x\udce9", "data.train.0.root must be UTF-8, as the recipe itself, got"),
        ("lr=1e-3", "Did you mean: 'optimizer.lr'"),
        ("optimizer.lrr=1e-3", "Did you mean: 'lr'"),
        ("optimizer.lr={", "override: optimizer.lr must be YAML, got '{'"),
        ("data.train.5.root=x", "data.train.5.root must be of a corpus 0 to 2, there are 2"),
        ("data.root=x", "data.root must stand beside data.annotations=FILE"),
        ("data.train=a.json", "override: data.train must be a list, got 'a.json'"),
        ("data.train.x.root=a", "override: data.train must be a list, got {'x': {'root': 'a'}}"),
        (
            "data.train=[a.json]",
            r"override: data.train.0 must be a mapping of keys of Corpus, got 'a\.json'",
        ),
        (
            "data.train[1]=[a, b]",
            r"override: data.train.1 must be a mapping of keys of Corpus, got \['a', 'b",
        ),
        ("data.train[5].root=x", "data.train.5.root must be of a corpus 0 to 2"),
        ("optimizer=3", "override: optimizer must be a mapping of keys of Optimizer, got 3"),
        ("run={trainer: [a]}", r"override: run.trainer must be a mapping of keys, got \['a'\]"),
        ("model=[]", r"override: model must be a mapping of keys, got \[\]"),
        ("optimizer.betas=[a,b]", r"override: optimizer.betas must be a list of two numbers, got"),
        ("optimizer.betas=[.9]", r"override: optimizer.betas must be a list of two numbers, got"),
        (
            "optimizer.betas=0.9,0.98",
            "override: optimizer.betas must be a list of two numbers, got",
        ),
        ("optimizer.betas.0=.9", "override: optimizer.betas must be given as a whole"),
        ("data.crop_scale=null", "override: data.crop_scale must be a list of two numbers, got N"),
        ("init=???", r"override: init must be a mapping of keys of Init, got '\?\?\?'"),
    ],
)
def test_values_that_cannot_be_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_recipe("pretrain-4f", [override])
    assert "\n" not in str(error.value)


def test_cached_videos_have_no_times() -> None:
    with pytest.raises(ValueError, match=r"data\.sampling must be rand or middle with data\.cache"):
        load_recipe("pretrain-4f", ["data.sampling=fps2", "data.cache=true"])


def test_the_default_recipe_is_within_its_limits() -> None:
    assert load_recipe() == Recipe()


def test_paths_are_taken_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = [
        "output=~/runs/1e3",
        "init.beit=~/beit",
        "tokenizer.name=~/words",
        "data.train.0.annotations=~/my: anno [old].json",
        "data.train.0.root=on",
        "data.train.1.root={videos",
        "data.train.1.annotations=${oc.env:HOME}/x.json",
        "init.bert=null",
    ]
    recipe = load_recipe("pretrain-4f", overrides)
    assert recipe.output == f"{tmp_path}/runs/1e3"
    assert recipe.init.beit == f"{tmp_path}/beit"
    assert recipe.init.bert is None
    assert recipe.tokenizer.name == f"{tmp_path}/words"
    assert recipe.data.train[0].annotations == f"{tmp_path}/my: anno [old].json"
    assert [corpus.root for corpus in recipe.data.train] == ["on", "{videos"]
    assert recipe.data.train[1].annotations == f"{tmp_path}/x.json"
    (tmp_path / "r.yaml").write_text("output: ~/runs/y\ninit: {checkpoint: ~/run}\n")
    recipe = load_recipe("~/r.yaml")
    assert (recipe.output, recipe.init.checkpoint) == (f"{tmp_path}/runs/y", f"{tmp_path}/run")


def test_one_corpus_in_place_of_all() -> None:
    given = ["data.kind=image", "data.annotations=my.json", "data.root=pictures", "data.workers=0"]
    recipe = load_recipe("pretrain-4f", given)
    assert recipe.data.train == [Corpus(annotations="my.json", root="pictures", kind="image")]
    assert recipe.data.workers == 0
    recipe = load_recipe("pretrain-4f", ["data.annotations=my.json"])
    assert recipe.data.train == [Corpus(annotations="my.json")]


def test_the_number_after_the_last_adds_a_corpus() -> None:
    given = ["data.train.0.annotations=a.json", "data.train.1.annotations=b.json"]
    recipe = load_recipe(None, [*given, "data.train.1.kind=image"])
    assert recipe.data.train == [
        Corpus(annotations="a.json"),
        Corpus(annotations="b.json", kind="image"),
    ]


def test_a_folder_does_not_hide_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert load_recipe("small").output == "runs/small"
    with pytest.raises(ValueError, match="did you mean 'small'"):
        load_recipe("smallest-4f")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"cannot be read as YAML: .*Is a directory"):
        load_recipe("folder")

"""A small corpus of real mp4 files and a recipe for a tiny model, shared by these tests."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("av")
# For films.py, ranks.py, running.py and picturing.py.
sys.path += [str(Path(__file__).parent / folder) for folder in ("data", "engine", "tasks")]

import ranks
from ranks import Command
from running import torchrun

from svitt_ops.training.corpora.shapes import COLORS, SHAPES, CorpusSpec, plan, write_video
from svitt_ops.training.data.annotations import read_annotations
from svitt_ops.training.data.text import train_tokenizer
from svitt_ops.training.engine.build import build_model
from svitt_ops.training.engine.recipes import Recipe, load_recipe
from svitt_ops.training.tasks.parts.gallery import build_gallery

MODEL = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "drop_path_rate": 0.0,
    "bias_init_std": 0.5,
    "block_size": 2,
    "num_random": 1,
    "keep_rate": 0.7,
    "prune_layers": [0],
    "multimodal_keep_rate": 0.5,
    "multimodal_prune_layers": [0],
    "text_hidden_size": 16,
    "text_num_hidden_layers": 3,
    "fusion_layer": 1,
    "text_num_attention_heads": 2,
    "text_intermediate_size": 32,
    "max_position_embeddings": 32,
    "projection_dim": 8,
}
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.json (16 clips) and test.json (8 clips), both orders of each scene.

    `train_qa.json` and `train_multiple_choice.json` ask about the same clips, as those of the test
    do, and `answers.json` has the answers.
    """
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "videos").mkdir()
    spec = CorpusSpec(size=16, frames=8, train_films=1)
    films = plan(spec)
    for split, count in (("train", 8), ("test", 4)):
        entries = []
        for film in [film for film in films if film.split == split][:count]:
            for order, pictures in film.shoot(spec).items():
                name = f"videos/{film.name}-{order[0]}{order[1]}.mp4"
                write_video(folder / name, pictures)
                caption = film.caption(order)
                entries.append({"video": name, "caption": caption, "scene": film.name})
        (folder / f"{split}.json").write_text(json.dumps(entries))
        asked, choices = [], []
        for number, entry in enumerate(entries):
            words = entry["caption"].replace(",", "").split()  # a red circle then a blue square
            for question, answer in (("colour", words[1]), ("shape", words[2])):
                text = f"What {question} comes first?"
                same = {"video": entry["video"], "scene": entry["scene"], "question": text}
                asked.append({**same, "answer": answer, "question_type": question})
            options = [entries[(number + k) % len(entries)]["caption"] for k in range(5)]
            right = {"video": entry["video"], "scene": entry["scene"], "answer": 2}
            choices.append({**right, "caption": options[3:] + options[:3]})
        (folder / f"{split}_qa.json").write_text(json.dumps(asked))
        (folder / f"{split}_multiple_choice.json").write_text(json.dumps(choices))
    (folder / "answers.json").write_text(json.dumps([*COLORS, *SHAPES]))
    return folder


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Command]]:
    """`two_ranks("pretrain", "--config", path).wait(seconds)`: two processes run the command."""
    folder, process = Path(), None

    def start(*words: str) -> Command:
        nonlocal folder, process
        if process is None or process.poll() is not None:  # the first time, or after a failure
            folder = tmp_path_factory.mktemp("ranks")
            process = torchrun(str(ranks.__file__), str(folder), str(os.getpid()))
        return ranks.send(process, folder, *words)

    yield start
    if process is not None:
        process.terminate()
        process.wait()


@pytest.fixture(scope="session")
def make_recipe(corpus: Path) -> MakeRecipe:
    """`make_recipe(output, "key=value", ..., **model)`: a recipe that trains in a second."""

    def make(output: Path, *overrides: str, **model: Any) -> Recipe:
        recipe = load_recipe(
            None,
            [
                f"output={output}",
                "tokenizer.train_vocab_size=100",
                "data.short_side=null",
                "data.text_length=12",
                "data.keep_together=scene",
                "data.positives=caption",
                "data.workers=0",
                "optimizer.lr=1e-3",
                "optimizer.batch_size=8",
                "optimizer.steps=6",
                "optimizer.warmup_steps=2",
                "run.precision=fp32",
                "run.log_steps=1",
                "run.save_steps=100",
                "run.tensorboard=false",
                "run.device=cpu",
                f"data.train=[{{annotations: {corpus / 'train.json'}}}]",
                *overrides,
            ],
        )
        recipe.model = {**MODEL, **model}
        return recipe

    return make


@pytest.fixture(scope="session")
def trained(make_recipe: Any, corpus: Path) -> tuple[Any, Any, Any]:
    """An untrained model, its tokenizer, and the gallery of the test clips."""
    entries = read_annotations(corpus / "test.json").entries
    tokenizer = train_tokenizer([c for e in entries for c in e.captions], 100)
    torch.manual_seed(0)
    model = build_model(make_recipe(Path("unused")), tokenizer)
    return model.eval(), tokenizer, build_gallery(entries)

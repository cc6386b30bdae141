"""`svitt demo`: film a corpus, pretrain through 4 -> 8 frames, evaluate, draw. Minutes on a CPU."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svitt_ops.models import sparsity_table
from svitt_ops.training.cli.figures import draw_survivors, find_survivors
from svitt_ops.training.corpora.shapes import CorpusSpec, Film, build_corpus
from svitt_ops.training.data.annotations import read_annotations
from svitt_ops.training.data.paths import expand, output_folder, write_text
from svitt_ops.training.engine.loading import load_trained
from svitt_ops.training.engine.recipes import Recipe, load_recipe
from svitt_ops.training.engine.run import Trained, pretrain
from svitt_ops.training.tasks.parts.gallery import Gallery, GalleryClips, build_gallery
from svitt_ops.training.tasks.parts.probing import pair_accuracy
from svitt_ops.training.tasks.parts.table import format_rows
from svitt_ops.training.tasks.retrieval import retrieval

if TYPE_CHECKING:
    from svitt_ops.models import SViTTForPreTraining

MARKER = "demo.json"
SPLITS = ("train", "validation", "test")
TEXT_LENGTH = 16
STAGES = ("demo-4f", "demo-8f")
STAGE_FOLDERS = ("4f", "8f")
OF_A_RUN = ("recipe.yaml", "final", "checkpoint-*", ".partial-*", "tensorboard", "skipped-*.tsv")
OWN = (
    MARKER,
    "survivors.png",
    *(f"corpus/{split}.json" for split in SPLITS),
    *(f"corpus/videos/{split}-*-*-{order}.mp4" for split in SPLITS for order in ("ab", "ba")),
    *(f"{folder}/{name}" for folder in STAGE_FOLDERS for name in OF_A_RUN),
)
"""What a demo leaves in its folder, and the next one removes."""
SHUFFLES = 10  # shuffled orders that the temporal-pair accuracy is averaged over


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and print its table; the exit status."""
    facts = run_demo(
        arguments.output,
        seed=arguments.seed,
        motion=arguments.motion,
        overrides=arguments.overrides,
        resume=arguments.resume,
    )
    print(f"\n{render_demo(facts)}")
    return 0


def run_demo(
    output: str | Path = "runs/demo",
    *,
    seed: int = 0,
    motion: bool = False,
    overrides: Sequence[str] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """Run the whole demo.

    Args:
        output: folder for the corpus, both stages, the figure and `demo.json`. Those of an earlier
            demo are replaced, and nothing else in it; a folder that is no demo's is refused.
        seed: of the training; the corpus stays the same.
        motion: film moving shapes, the harder variant, instead of one shape after another.
        overrides: of the recipes of both stages, such as "optimizer.steps=100".
        resume: go on with an interrupted demo instead of starting anew.

    Returns:
        What `demo.json` holds: every measured number.
    """
    begun = time.perf_counter()
    folder = expand(output, "--output")
    recipes = _stages(folder, seed, overrides)  # before anything is removed
    _prepare(folder, resume)
    spec = demo_corpus(motion)

    def filming(films: Iterable[Film]) -> Iterable[Film]:
        return tqdm(films, desc="film corpus", unit="scene", dynamic_ncols=True)

    if not (folder / "corpus" / "test.json").is_file():
        build_corpus(folder / "corpus", spec, filming)
    seconds = {"corpus": time.perf_counter() - begun}
    stages: list[Trained] = []
    for name, recipe in recipes.items():
        start = time.perf_counter()
        stages.append(pretrain(recipe, label=f"pretrain {name.removeprefix('demo-')}"))
        seconds[name] = time.perf_counter() - start
    facts = evaluate_demo(stages[-1].folder, folder)
    facts["seed"] = seed
    facts["corpus"] = asdict(spec)
    facts["seconds"] = seconds | {"total": time.perf_counter() - begun}
    write_text(folder / MARKER, json.dumps(facts, indent=2) + "\n")
    return facts


def _stages(output: Path, seed: int, overrides: Sequence[str]) -> dict[str, Recipe]:
    """The recipes of the stages, each of which starts from the one before."""
    for override in overrides:
        if re.match(r"output=|seed=|init\.|data\.(train|annotations)\b", override):
            raise ValueError(
                f"override: must leave output, seed, init and the corpus to --output, --seed and"
                f" the demo, got {override!r}"
            )
    recipes: dict[str, Recipe] = {}
    for name in STAGES:
        folder = output / name.removeprefix("demo-")
        places = [f"output={folder}", f"seed={seed}"]
        places.append(f"data.train.0.annotations={output / 'corpus' / 'train.json'}")
        if recipes:
            places.append(f"init.checkpoint={recipes[STAGES[0]].output}")
        recipes[name] = load_recipe(name, [*places, *overrides])
    return recipes


def demo_corpus(motion: bool = False) -> CorpusSpec:
    """What the demo films: 201 scenes to train on and 50 to test on, or 70 and 20 with motion."""
    if motion:  # there are fewer scenes; this seed leaves some with each shape to train on
        few = {"validation_scenes": 6, "test_scenes": 20}
        return CorpusSpec(motion=True, train_films=8, seed=1, **few)
    return CorpusSpec()


def evaluate_demo(folder: Path, output: Path) -> dict[str, Any]:
    """Retrieval, temporal pairs, tokens, edges, step times and the figure of a trained demo."""
    model, tokenizer, _ = load_trained(folder)
    entries = read_annotations(output / "corpus" / "test.json").entries
    gallery = build_gallery(entries)
    numbers = torch.arange(len(entries)).view(-1, 2)  # both films of a scene follow each other
    frames = model.config.num_frames
    bar = tqdm(total=4, desc="evaluate", unit="part", dynamic_ncols=True)
    found = retrieval(model, tokenizer, GalleryClips(gallery, frames), text_length=TEXT_LENGTH)
    bar.update()
    pairs = {
        order: pair_accuracy(
            model, tokenizer, gallery, numbers, order=order, draws=draws, text_length=TEXT_LENGTH
        )
        for order, draws in (("normal", 1), ("shuffled", SHUFFLES))
    }
    bar.update()
    times = step_times(model, gallery, tokenizer)
    bar.update()
    (row,) = sparsity_table(model.config, frames=[frames], text_length=TEXT_LENGTH)
    figure = _draw(model, tokenizer, gallery, output / "survivors.png")
    bar.update()
    bar.close()
    return {
        "frames": frames,
        "retrieval": found,
        "pair_accuracy": pairs,
        "tokens": {"visual": row.tokens, "multimodal": row.multimodal_tokens},
        "edges": {"edges": row.edges.total, "dense": row.edges.dense},
        "seconds_per_step": times,
        "figure": str(figure),
    }


def step_times(
    model: SViTTForPreTraining, gallery: Gallery, tokenizer: Any, *, batch: int = 64, turns: int = 5
) -> dict[str, float]:
    """Seconds of one training step, sparse and dense, taken in turns; the medians."""
    config = copy.deepcopy(model.config)
    config.edge_sparsity, config.keep_rate, config.multimodal_keep_rate = False, 1.0, 1.0
    dense = type(model)(config)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(
        batch, config.num_frames, 3, config.image_size, config.image_size, generator=generator
    )
    texts = tokenizer(
        [gallery.texts[k % len(gallery.texts)] for k in range(batch)],
        padding=True,
        return_tensors="pt",
    )
    device = next(model.parameters()).device
    inputs: dict[str, Tensor] = {
        "pixel_values": pixels.to(device) * 2 - 1,
        "input_ids": texts["input_ids"].to(device),
        "attention_mask": texts["attention_mask"].to(device),
        "pair_ids": torch.arange(batch, device=device),
    }
    models = {"sparse": copy.deepcopy(model), "dense": dense.to(device)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(turns + 1):  # the first turn warms up
        for name, one in models.items():
            one.train()
            start = time.perf_counter()
            one(**inputs).loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
            one.zero_grad()
    return {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}


def render_demo(facts: dict[str, Any]) -> str:
    """The table that the demo ends with."""
    found, pairs, tokens = facts["retrieval"], facts["pair_accuracy"], facts["tokens"]
    edges, times = facts["edges"], facts["seconds_per_step"]
    rows: list[tuple[str, ...]] = [("", "R@1", "R@5", "R@10")]
    for name, key in (("text to video", "text_to_video"), ("video to text", "video_to_text")):
        rows.append((name, *(f"{found[key][f'R{k}']:.1f} %" for k in (1, 5, 10))))
    rows.append(("chance", *(f"{100 * k / found['videos']:.1f} %" for k in (1, 5, 10))))
    more = [
        ("temporal pairs told apart", f"{pairs['normal']:.1f} %"),
        ("  with shuffled frames", f"{pairs['shuffled']:.1f} %   (chance 50 %)"),
        ("visual tokens", " -> ".join(map(str, tokens["visual"]))),
        (
            "multimodal tokens",
            " -> ".join(map(str, tokens["multimodal"])) + "   (these layers are not trained here)",
        ),
        (
            "attention edges per clip",
            f"{edges['edges']:,} of {edges['dense']:,} dense"
            f" ({edges['edges'] / edges['dense']:.0%})",
        ),
        (
            "seconds per training step",
            f"{times['sparse']:.3f} sparse, {times['dense']:.3f} dense",
        ),
    ]
    lines = [
        f"{found['videos']} held-out clips of {facts['frames']} frames, scenes never trained on",
        "",
        *format_rows(rows),
        "",
        *format_rows(more),
    ]
    if "seconds" in facts:
        lines += ["", f"All of it took {facts['seconds']['total'] / 60:.1f} minutes."]
    lines += ["", f"Which patches survive: {facts['figure']}"]
    return "\n".join(lines)


def _prepare(output: Path, resume: bool) -> None:
    """Make the folder, without an earlier demo unless that is to be resumed."""
    marker = output / MARKER
    if output.is_dir() and any(output.iterdir()) and not marker.is_file():
        raise ValueError(
            f"--output: must be a new folder, or that of a demo, got {str(output)!r},"
            " which holds something that is no demo"
        )
    output_folder(output, "--output")
    if marker.is_file() and not resume:
        for path in [path for pattern in OWN for path in output.glob(pattern)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        for folder in ("corpus/videos", "corpus", *STAGE_FOLDERS):
            with contextlib.suppress(OSError):  # it holds something of the user's, or is not there
                (output / folder).rmdir()
    if not marker.is_file():
        write_text(marker, "{}\n")


def _draw(model: SViTTForPreTraining, tokenizer: Any, gallery: Gallery, path: Path) -> Path:
    clips = GalleryClips(gallery, model.config.num_frames)
    samples = []
    for number in (0, 1):
        frames = clips[number].frames
        assert frames is not None
        samples.append(
            find_survivors(
                model, tokenizer, frames[0], gallery.texts[number], text_length=TEXT_LENGTH
            )
        )
    return draw_survivors(samples, path)

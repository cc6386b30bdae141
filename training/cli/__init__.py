"""What each `svitt` command does. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import svitt_ops
from svitt_cli import main
from svitt_ops.info import collect, render
from svitt_ops.training.data.paths import input_file, input_folder, output_file, saving, write_text

log = logging.getLogger(__name__)
__all__ = ["main", "run"]

NO_BENCH = """\
svitt bench: runs from a checkout of svitt-ops, whose bench/ folder is not part of an installation:

  cd svitt-ops      # a clone, or the unpacked source archive
  make bench BENCH_ARGS=--quick

or, there, `svitt bench` of this environment.
"""


def _at_least(arguments: argparse.Namespace, **least: int) -> None:
    for name, minimum in least.items():
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: must be at least {minimum}, got {value}")


def run(arguments: argparse.Namespace) -> int:
    """Run the command that was parsed; the exit status."""
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "demo": _demo,
        "pretrain": _pretrain,
        "evaluate": _retrieval,
        "visualize": _visualize,
        "sparsity": _sparsity,
        "bench": _bench,
        "info": _info,
    }
    return commands[arguments.command](arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from svitt_ops.training.cli.demo import render_demo, run_demo

    facts = run_demo(
        arguments.output,
        seed=arguments.seed,
        motion=arguments.motion,
        overrides=arguments.overrides,
        resume=arguments.resume,
    )
    print(f"\n{render_demo(facts)}")
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    from svitt_ops.training.engine.recipes import load_recipe, recipe_text

    recipe = load_recipe(arguments.config, arguments.overrides)
    if arguments.show:
        print(recipe_text(recipe), end="")
        return 0
    from svitt_ops.training.engine.run import pretrain

    trained = pretrain(recipe)
    print(f"{trained.skipped.summary()}\nmodel: {trained.folder}")
    return 0


def _retrieval(arguments: argparse.Namespace) -> int:
    _at_least(arguments, frames=1, text_length=1, clips=1, top_k=0, batch_size=1, workers=0)
    if arguments.kind == "image" and (arguments.probe or arguments.clips > 1):
        option = "--probe" if arguments.probe else "--clips"
        raise ValueError(f"{option}: needs videos, got --kind image")
    numbers = _check_retrieval(arguments)
    import torch
    from tqdm.auto import tqdm

    from svitt_ops.training.cli.table import render_retrieval
    from svitt_ops.training.engine.build import read_corpora
    from svitt_ops.training.engine.recipes import Corpus, Data
    from svitt_ops.training.engine.settings import load_for_use
    from svitt_ops.training.tasks.parts.gallery import GalleryClips, build_gallery
    from svitt_ops.training.tasks.parts.probing import probe_retrieval
    from svitt_ops.training.tasks.retrieval import Evaluation, retrieval

    model, tokenizer, reading, folder = load_for_use(
        arguments.model,
        frames=arguments.frames,
        text_length=arguments.text_length,
        resize=arguments.resize,
    )
    if torch.cuda.is_available() and not arguments.cpu:
        model = model.to("cuda")
    corpora = [
        Corpus(
            annotations=path,
            root=arguments.root,
            kind=arguments.kind,
            captions="join" if arguments.paragraph else "each",
        )
        for path in arguments.annotations
    ]
    gallery = build_gallery(read_corpora(corpora, Data(), "test"))
    settings = Evaluation(
        top_k=arguments.top_k,
        clips=arguments.clips,
        strided=arguments.strided,
        merge=arguments.merge,
        batch_size=arguments.batch_size,
    )
    options: dict[str, Any] = {
        "settings": settings,
        "text_length": reading.text_length,
        "resize": reading.resize,
        "bf16": arguments.bf16,
        "workers": arguments.workers,
        "progress": lambda items, desc: tqdm(items, desc=desc, dynamic_ncols=True),
    }
    if arguments.probe:
        facts = probe_retrieval(model, tokenizer, gallery, short_side=reading.short_side, **options)
    else:
        clips = GalleryClips(
            gallery,
            model.config.num_frames,
            num_clips=settings.clips,
            strided=settings.strided,
            short_side=reading.short_side,
        )
        facts = retrieval(model, tokenizer, clips, **options)
    print(render_retrieval(facts))
    if numbers is not None:
        chosen = ("annotations", "root", "kind", "paragraph", "clips", "strided", "merge", "top_k")
        facts["settings"] = {
            "model": str(folder),
            "frames": model.config.num_frames,
            "text_length": reading.text_length,
            "short_side": reading.short_side,
            "resize": reading.resize,
            **{name: getattr(arguments, name) for name in (*chosen, "probe", "bf16")},
        }
        write_text(numbers, json.dumps(facts, indent=2) + "\n")
    return 0


def _check_retrieval(arguments: argparse.Namespace) -> Path | None:
    """Look at every path before the first file is opened; where the numbers are to be written."""
    _check_model(arguments.model)
    for path in arguments.annotations:
        input_file(path, "--annotations")
    if arguments.root is not None:
        input_folder(arguments.root, "--root")
    return None if arguments.json is None else output_file(arguments.json, "--json")


def _check_model(path: str) -> None:
    from svitt_ops.training.engine.checkpoints import model_folder
    from svitt_ops.training.engine.folders import check_folder

    must = "model: must be the folder of a model or of a run"
    check_folder("model", model_folder(path, must), ("svitt",))


def _visualize(arguments: argparse.Namespace) -> int:
    _at_least(arguments, frames=1, text_length=1)
    if len(arguments.caption) != len(arguments.video):
        raise ValueError(
            f"--caption: must be one for each of the {len(arguments.video)} videos,"
            f" got {len(arguments.caption)}"
        )
    for caption in arguments.caption:
        if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
            raise ValueError(f"--caption: must be text in UTF-8, got {caption!r}")
    from svitt_ops.training.cli.figures import draw_survivors, figure_file, find_survivors
    from svitt_ops.training.data.collate import count_cut
    from svitt_ops.training.data.sampling import sample_positions
    from svitt_ops.training.data.text import clean_caption
    from svitt_ops.training.data.video import read_frames
    from svitt_ops.training.engine.settings import load_for_use

    _check_model(arguments.model)
    videos = [input_file(path, "video") for path in arguments.video]
    picture = figure_file(arguments.output, "--output")
    model, tokenizer, reading, _ = load_for_use(
        arguments.model,
        frames=arguments.frames,
        text_length=arguments.text_length,
        resize=arguments.resize,
    )
    captions = [clean_caption(caption) for caption in arguments.caption]
    length = reading.text_length
    if cut := count_cut(tokenizer, captions, length):
        log.warning(
            "--caption: %d of %d longer than %d tokens, and cut", cut, len(captions), length
        )

    def choose(times: Sequence[float]) -> list[int]:
        return sample_positions(times, model.config.num_frames, "middle")

    samples = [
        find_survivors(
            model,
            tokenizer,
            read_frames(video, choose, short_side=reading.short_side),
            caption,
            text_length=length,
            resize=reading.resize,
        )
        for video, caption in zip(videos, captions, strict=True)
    ]
    with saving(picture):
        print(draw_survivors(samples, picture))
    return 0


def _sparsity(arguments: argparse.Namespace) -> int:
    from svitt_ops.training.cli.table import render_sparsity

    if min(arguments.frames) < 1:
        raise ValueError(f"--frames: must be at least 1, got {min(arguments.frames)}")
    print(render_sparsity(arguments.frames))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    import runpy

    # An editable install, or a checkout that the command is given in.
    places = (Path(svitt_ops.__file__).parent.parent, Path.cwd())
    checkout = next((x for x in places if (x / "bench" / "__main__.py").is_file()), None)
    if checkout is None:
        print(NO_BENCH, end="", file=sys.stderr)
        return 2
    sys.path.insert(0, str(checkout))
    program = runpy.run_module("bench.__main__", run_name="svitt_bench")
    status: int = program["main"](arguments.rest, prog="svitt bench")
    return status


def _info(arguments: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0

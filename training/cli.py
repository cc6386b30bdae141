"""The `svitt` command. Heavy packages are imported by the subcommand that needs them."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import svitt_ops
from svitt_ops.info import collect, render

log = logging.getLogger(__name__)
DESCRIPTION = """\
svitt-ops: sparse video-text transformers, from kernels to trained models.

  svitt demo                                  see all of it work, in minutes, without a GPU
  svitt pretrain --config my-recipe.yaml      train on your videos
  svitt evaluate retrieval runs/my-model ...  find videos by text and texts by video
  svitt bench --quick                         how fast the kernels are on your machine
"""
PRETRAIN = """\
Train a model from a recipe: a YAML file, or the name of one that comes with the package.
Any value of the recipe can be overridden by key=value:

  svitt pretrain --config pretrain-4f data.train.0.annotations=my.json data.train.0.root=videos
  torchrun --nproc-per-node 8 -m svitt_ops.training pretrain --config my-recipe.yaml

An annotation file is a JSON list of {"video": path, "caption": text}. Unusable videos are
skipped, counted and listed in the output folder. A run that was killed goes on where its last
checkpoint was when the same command is given again.
"""
RETRIEVAL = """\
Find videos by text and texts by video, in annotation files like those of training:

  svitt evaluate retrieval runs/svitt-4f --annotations test.json --root videos
  svitt evaluate retrieval runs/svitt-4f --annotations test.json --probe

R@K is the share of queries with a right answer among the first K. Candidates with the same score
as the right answer come before it, so a model that gives everything one score finds nothing.
"""
NO_BENCH = """\
svitt bench: runs from a checkout of svitt-ops, whose bench/ folder is not part of an installation:

  cd svitt-ops      # a clone, or the unpacked source archive
  make bench BENCH_ARGS=--quick

or, there, `svitt bench` of this environment.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `svitt` command; the exit status."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        arguments.rest = rest  # the benchmark has a parser of its own
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("svitt_ops", "torch"):
            raise
        extra = "bench" if arguments.command == "bench" else "train"
        print(
            f"svitt {arguments.command}: needs {error.name}, of the extra `{extra}`:"
            f" pip install 'svitt-ops[{extra}]'",
            file=sys.stderr,
        )
    except ValueError as error:
        print(f"svitt {arguments.command}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"svitt {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="svitt", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"svitt-ops {svitt_ops.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="film a little corpus, pretrain a tiny model on it, evaluate, draw",
        description="Film a corpus of mp4 files whose captions differ by the order of events"
        " alone, pretrain a tiny SViTT on it through 4 and 8 frames, evaluate it on scenes it has"
        " never seen, and draw which patches survive. A few minutes on two CPU cores.",
    )
    demo.add_argument(
        "--output", default="runs/demo", metavar="FOLDER", help="(default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    demo.add_argument("--motion", action="store_true", help="the harder corpus of moving shapes")
    demo.add_argument("--resume", action="store_true", help="go on with an interrupted demo")
    _add_overrides(demo)
    demo.set_defaults(run=_demo)

    pretrain = commands.add_parser(
        "pretrain", help="train from a recipe", description=PRETRAIN, formatter_class=raw
    )
    pretrain.add_argument(
        "--config",
        required=True,
        metavar="RECIPE",
        help="a YAML file, or the name of a recipe of the package, such as pretrain-4f",
    )
    pretrain.add_argument("--show", action="store_true", help="print the whole recipe and stop")
    _add_overrides(pretrain)
    pretrain.set_defaults(run=_pretrain)

    evaluate = commands.add_parser("evaluate", help="evaluate a trained model")
    tasks = evaluate.add_subparsers(dest="task", required=True, metavar="TASK")
    found = tasks.add_parser(
        "retrieval", help="R@1/5/10 both ways", description=RETRIEVAL, formatter_class=raw
    )
    found.add_argument("model", help="folder of a run or of a model")
    found.add_argument(
        "--annotations",
        required=True,
        nargs="+",
        metavar="JSON",
        help='lists of {"video": path, "caption": text, or a list of texts}',
    )
    found.add_argument("--root", help="folder of the videos (default: that of the annotations)")
    found.add_argument("--kind", choices=("video", "image"), default="video", help="of the files")
    found.add_argument("--paragraph", action="store_true", help="join a video's captions to one")
    found.add_argument("--clips", type=int, default=1, help="clips of each video (default: 1)")
    found.add_argument("--strided", action="store_true", help="clips take every n-th frame")
    found.add_argument(
        "--merge",
        choices=("logsumexp", "mean", "max"),
        default="logsumexp",
        help="how match scores of a video's clips become one (default: logsumexp)",
    )
    found.add_argument(
        "--top-k",
        type=int,
        default=128,
        metavar="K",
        help="best candidates that the match head ranks anew; 0: none (default: 128)",
    )
    _add_reading(found)
    found.add_argument(
        "--probe",
        action="store_true",
        help="also with frames shuffled, reversed and frozen: does the model use time?",
    )
    found.add_argument("--bf16", action="store_true", help="compute in bf16")
    found.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    found.add_argument("--batch-size", type=int, default=32, help="clips at a time (default: 32)")
    found.add_argument(
        "--workers", type=int, default=2, help="processes that decode; 0: none (default: 2)"
    )
    found.add_argument("--json", metavar="FILE", help="also write the numbers here")
    found.set_defaults(run=_retrieval)

    visualize = commands.add_parser(
        "visualize",
        help="draw which patches of a video survive pruning",
        description="Draw the frames of videos with the patches that survive: after visual pruning,"
        " and after multimodal pruning, which looks for what the caption says.",
    )
    visualize.add_argument("model", help="folder of a run or of a model")
    visualize.add_argument("video", nargs="+", help="video files")
    visualize.add_argument(
        "--caption", nargs="+", required=True, metavar="TEXT", help="one for each video"
    )
    visualize.add_argument(
        "--output", default="survivors.png", metavar="PNG", help="figure (default: %(default)s)"
    )
    _add_reading(visualize)
    visualize.set_defaults(run=_visualize)

    sparsity = commands.add_parser(
        "sparsity",
        help="edges and tokens of the full-size model, the paper's Table A1",
        description="How sparse the full-size model is: attention edges against dense attention,"
        " multiplications (MACs), and the tokens left after each pruning.",
    )
    sparsity.add_argument(
        "--frames", type=int, nargs="+", default=[4, 8, 16], metavar="T", help="(default: 4 8 16)"
    )
    sparsity.set_defaults(run=_sparsity)

    bench = commands.add_parser(
        "bench", add_help=False, help="measure the kernels and the training step, against peers"
    )
    bench.set_defaults(run=_bench)

    info = commands.add_parser("info", help="versions, devices, what was built, what will run")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    return parser


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="of a clip; a model of another number is expanded (default: the model's)",
    )
    parser.add_argument(
        "--text-length",
        type=int,
        metavar="N",
        help="tokens; longer texts are cut, and counted (default: that of training, else 32)",
    )


def _at_least(arguments: argparse.Namespace, **least: int) -> None:
    for name, minimum in least.items():
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: must be at least {minimum}, got {value}")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe values, such as optimizer.lr=1e-4"
    )


def _demo(arguments: argparse.Namespace) -> int:
    from svitt_ops.training.demo import render_demo, run_demo

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
    from svitt_ops.training.recipes import load_recipe, recipe_text

    recipe = load_recipe(arguments.config, arguments.overrides)
    if arguments.show:
        print(recipe_text(recipe), end="")
        return 0
    from svitt_ops.training.engine import pretrain

    trained = pretrain(recipe)
    print(f"{trained.skipped.summary()}\nmodel: {trained.folder}")
    return 0


def _retrieval(arguments: argparse.Namespace) -> int:
    _at_least(arguments, frames=1, text_length=1, clips=1, top_k=0, batch_size=1, workers=0)
    if arguments.kind == "image" and (arguments.probe or arguments.clips > 1):
        option = "--probe" if arguments.probe else "--clips"
        raise ValueError(f"{option}: needs videos, got --kind image")
    import torch
    from tqdm.auto import tqdm

    from svitt_ops.training.build import read_corpora
    from svitt_ops.training.gallery import GalleryClips, build_gallery
    from svitt_ops.training.probing import probe_retrieval
    from svitt_ops.training.recipes import Corpus, Data
    from svitt_ops.training.retrieval import Evaluation, retrieval
    from svitt_ops.training.settings import load_for_use
    from svitt_ops.training.table import render_retrieval

    model, tokenizer, reading, folder = load_for_use(
        arguments.model, frames=arguments.frames, text_length=arguments.text_length
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
    if arguments.json:
        chosen = ("annotations", "root", "kind", "paragraph", "clips", "strided", "merge", "top_k")
        facts["settings"] = {
            "model": str(folder),
            "frames": model.config.num_frames,
            "text_length": reading.text_length,
            "short_side": reading.short_side,
            **{name: getattr(arguments, name) for name in (*chosen, "probe", "bf16")},
        }
        Path(arguments.json).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0


def _visualize(arguments: argparse.Namespace) -> int:
    _at_least(arguments, frames=1, text_length=1)
    if len(arguments.caption) != len(arguments.video):
        raise ValueError(
            f"--caption: must be one for each of the {len(arguments.video)} videos,"
            f" got {len(arguments.caption)}"
        )
    from svitt_ops.training.collate import count_cut
    from svitt_ops.training.figures import draw_survivors, find_survivors
    from svitt_ops.training.sampling import sample_positions
    from svitt_ops.training.settings import load_for_use
    from svitt_ops.training.text import clean_caption
    from svitt_ops.training.video import read_frames

    model, tokenizer, reading, _ = load_for_use(
        arguments.model, frames=arguments.frames, text_length=arguments.text_length
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
        )
        for video, caption in zip(arguments.video, captions, strict=True)
    ]
    print(draw_survivors(samples, arguments.output))
    return 0


def _sparsity(arguments: argparse.Namespace) -> int:
    from svitt_ops.training.table import render_sparsity

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

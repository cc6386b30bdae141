"""The `svitt` command: its words, and how it ends. Imports neither torch nor `svitt_ops`.

`import svitt_ops` takes the second or more that torch does. So this module stands outside of the
package: help and mistyped words are answered at once. What the commands do is in
`svitt_ops.training.cli`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

DESCRIPTION = """\
svitt-ops: sparse video-text transformers, from kernels to trained models.

  svitt demo                                  see all of it work, in minutes, without a GPU
  svitt pretrain --config small ...           train on your videos
  svitt finetune --config qa-msrvtt ...       go on for a task: retrieval, questions, choices
  svitt evaluate retrieval runs/small ...     find videos by text and texts by video
  svitt embed runs/small --videos videos --output videos.safetensors
  svitt search videos.safetensors "a dog jumps" --model runs/small
  svitt bench --quick                         how fast the kernels are on your machine
"""
PRETRAIN = """\
Train a model from a recipe: a YAML file, or the name of one that comes with the package.
Any value of the recipe can be overridden by key=value:

  svitt pretrain --config small data.annotations=my.json data.root=videos
  svitt pretrain --config small --show > my-recipe.yaml
  torchrun --nproc-per-node 8 -m svitt_ops.training pretrain --config my-recipe.yaml

An annotation file is a JSON list of {"video": path, "caption": text}, or JSON lines, CSV, TSV or
parquet with these fields. Paths are relative to the working folder, and ~ is the home folder.
Unusable videos are skipped, counted and listed in the output folder. A run that was killed goes on
where its last checkpoint was when the same command is given again.
"""
FINETUNE = """\
Train a pretrained model for a task, such as retrieval or qa, as a recipe says:

  svitt finetune --config retrieval-msrvtt init.checkpoint=runs/small \\
      data.annotations=my.json data.root=videos
  svitt finetune --config qa-msrvtt --show > my-questions.yaml

init.checkpoint is the folder of a run or of a model, or a file that the authors released. With
data.validation the model is evaluated after every epoch, and its best weights are kept in the
folder `best` of the output. All else is as in `svitt pretrain`.
"""
EVALUATE = """\
Find videos by text and texts by video, answer questions, choose among texts, judge statements about
pictures, find what texts mean in them, compare texts, or find images by binary codes, in annotation
files like those of training:

  svitt evaluate retrieval runs/small --annotations my.json --root videos
  svitt evaluate retrieval runs/small --annotations my.json --root videos --probe
  svitt evaluate qa runs/qa-msrvtt --annotations questions.json --root videos
  svitt evaluate multiple-choice runs/retrieval-msrvtt --annotations choices.json --root videos
  svitt evaluate text-similarity runs/small --annotations similar.csv

R@K is the share of queries with a right answer among the first K. Candidates with the same score
as the right answer come before it, so a model that gives everything one score finds nothing.

What an option does not say is as a protocol has it, if one is named, else as in training. A
protocol is how a published number is measured: its clips, their merging, candidates and lengths of
texts; frames and resizing remain the model's.
"""
VISUALIZE = """\
Draw the frames of videos with the patches that survive in a model of SViTT: after visual pruning,
and after multimodal pruning, which looks for what the caption says:

  svitt visualize runs/small videos/clip.mp4 --caption "a dog jumps" --output survivors.png

Of a model of pictures, draw a figure for each: Grad-CAM maps of the text and of its pieces; the
soft masks that they make, of a SoftMask; the words that are the picture's pseudo-labels, and where
its patches attend to them, of a SIMLA. Without its twin, which weights for use lack, that one's
labels are the model's own; of a COOKIE the picture's regions and the text's words that are most
like the whole:

  svitt visualize runs/demo/match pictures/photo.jpg --caption "a red square" --output maps
  svitt visualize runs/demo/match --annotations pictures.json --root pictures --output maps

Of an SCL it is how the text's [CLS] attends over the picture, in every fusion layer. Another model,
such as one that was trained without completion, is drawn beside it by `--beside MODEL`.
"""
EMBED = """\
Embed videos, pictures or texts by a trained model, into a file of embeddings and names:

  svitt embed runs/small --videos videos --output videos.safetensors
  svitt embed runs/small --images pictures.json --root pictures --output pictures.safetensors
  svitt embed runs/small --texts "a dog jumps" "a red square" --output texts.safetensors

A folder stands for all videos and pictures below it, a pattern such as 'videos/*.mp4' for those
that match, an annotation file for those that it names, a .txt file for its lines. A file that
cannot be read is skipped, and listed in OUTPUT-skipped.tsv. The same command goes on with what was
killed, and embeds what is new, or has changed, since it ended.
"""
SEARCH = """\
Find what is most like a text, or like a video or picture, in a file of `svitt embed`:

  svitt search videos.safetensors "a dog jumps" --model runs/small
  svitt search videos.safetensors videos/clip.mp4 --model runs/small --top 3
  svitt search videos.safetensors --serve --model runs/small

The last shows a page of your browser's, with the patches that survive in what is found; the extra
`app` has what it needs. Scores are cosine similarities; the search is exact, by FAISS in large sets
where it is installed.
"""
INSTALL = "in a checkout of svitt-ops, pip install --no-build-isolation -e '.[{extra}]'"
BROKEN_PIPE = 141  # as if by SIGPIPE, like every command whose reader has left
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `svitt` command; the exit status: 2 after a mistake, 130 after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):  # names of files may hold anything
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = argparse.Namespace(command=None)
    try:
        try:
            _parse(argv, arguments)
            logging.basicConfig(handlers=[_LogHandler()], format="%(levelname)s %(message)s")
            status: int = import_module("svitt_ops.training.cli").run(arguments)
            return status
        finally:
            _flush()  # here, where a full disk or a reader that left can still be answered
    except BrokenPipeError:
        _abandon_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        line, status = "interrupted", INTERRUPTED
    except Exception as error:
        explained = explain(error, arguments.command)
        if explained is None:
            _end_bars()
            raise
        line, status = explained, 2
        _abandon_stdout()
    _end_bars()
    print(f"{' '.join(filter(None, ('svitt', arguments.command)))}: {line}", file=sys.stderr)
    return status


def explain(error: Exception, command: str | None = None) -> str | None:
    """What went wrong, in a line; None for a fault of this library, whose trace is wanted."""
    kind, text = type(error).__name__, one_line(str(error))
    if isinstance(error, ModuleNotFoundError):
        if (error.name or "").partition(".")[0] in ("svitt_ops", "svitt_cli", "torch"):
            return None
        extra = "bench" if command in ("bench", "tune") else "train"
        return f"needs {error.name}, of the extra `{extra}`: {INSTALL.format(extra=extra)}"
    if isinstance(error, ImportError) and error.name is None:
        return text  # said by a library that looked for another
    if isinstance(error, OSError):
        reason = error.strerror or text
        return reason if error.filename is None else f"{error.filename}: {reason}"
    if isinstance(error, ValueError) or kind == "SafetensorError":
        return text
    if (
        isinstance(error, MemoryError)
        or kind == "OutOfMemoryError"
        or "DefaultCPUAllocator" in text
    ):
        smaller = "a smaller optimizer.batch_size, or run.gradient_checkpointing=true, takes less"
        return (
            f"out of memory{f'; {smaller}' if command in ('pretrain', 'finetune') else ''} ({text})"
        )
    if isinstance(error, RuntimeError) and re.search(r"DataLoader worker .* (exited|killed)", text):
        return f"a process that reads videos died, perhaps for want of memory ({text})"
    return None


def one_line(text: str) -> str:
    """A message without line breaks; of an error out of a worker process, its last line alone."""
    if text.startswith("Caught ") and "Original Traceback" in text:
        names = [*re.finditer(r"^[\w.]+(?:Error|Exception): ", text, re.MULTILINE)]
        text = text[names[-1].end() :] if names else text
    return " ".join(text.split())


class _LogHandler(logging.Handler):
    """Writes above a progress bar, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm: Any = sys.modules.get("tqdm")
        write = print if tqdm is None else tqdm.tqdm.write
        write(self.format(record), file=sys.stderr)


def _end_bars() -> None:
    """Close progress bars that an error has left open: nothing is to be glued to them."""
    tqdm: Any = sys.modules.get("tqdm")
    for bar in list(getattr(getattr(tqdm, "tqdm", None), "_instances", ())):
        bar.close()


def _flush() -> None:
    if sys.stdout is None:  # closed by whoever started the command
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def _abandon_stdout() -> None:
    """Drop what cannot be written, or the interpreter would complain about it once more."""
    try:
        _flush()
    except OSError:
        with contextlib.suppress(OSError):  # not everything is a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: Sequence[str] | None, arguments: argparse.Namespace) -> None:
    parser = _parser()
    _, rest = parser.parse_known_args(argv, arguments)
    if arguments.command in ("bench", "tune"):
        arguments.rest = rest  # the benchmark's programs have parsers of their own
    elif rest and hasattr(arguments, "overrides") and not any(x.startswith("-") for x in rest):
        arguments.overrides += rest  # after an option that follows others
    elif getattr(arguments, "query", "") is None and len(rest) == 1 and rest[0][:1] != "-":
        (arguments.query,) = rest  # the same
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="svitt", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"svitt-ops {version('svitt-ops')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="make a little corpus, train a tiny model on it, evaluate",
        description="Film a corpus of mp4 files whose captions differ by the order of events"
        " alone, pretrain a tiny SViTT on it through 4 and 8 frames, fine-tune it to answer"
        " questions, evaluate both on scenes never seen, and draw which patches survive. With"
        " --system, draw a corpus of pictures, pretrain a tiny model of that system, fine-tune it"
        " for each of its tasks, and evaluate. A few minutes on two CPU cores.",
    )
    demo.add_argument(
        "--output", default="runs/demo", metavar="FOLDER", help="(default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    demo.add_argument(
        "--system",
        choices=("svitt", "albef", "simla", "softmask", "scl", "cookie"),
        default="svitt",
        help="svitt: films; albef, simla, softmask: a corpus of pictures, retrieval, qa, reasoning,"
        " entailment and grounding; scl: the same pictures, retrieval and qa; cookie: retrieval,"
        " similarity of texts and hashing (default: %(default)s)",
    )
    demo.add_argument("--motion", action="store_true", help="the harder corpus of moving shapes")
    demo.add_argument("--resume", action="store_true", help="go on with an interrupted demo")
    _add_overrides(demo)

    for name, what, text in (
        ("pretrain", "train from a recipe", PRETRAIN),
        ("finetune", "train a pretrained model for a task", FINETUNE),
    ):
        train = commands.add_parser(name, help=what, description=text, formatter_class=raw)
        train.add_argument(
            "--config",
            required=True,
            metavar="RECIPE",
            help="a YAML file, or the name of a recipe of the package, such as small",
        )
        train.add_argument("--show", action="store_true", help="print the whole recipe and stop")
        _add_overrides(train)

    found = commands.add_parser(
        "evaluate", help="evaluate a trained model", description=EVALUATE, formatter_class=raw
    )
    found.add_argument(
        "task",
        metavar="TASK",
        help="retrieval (R@1/5/10 both ways), qa, multiple-choice, reasoning, entailment,"
        " grounding, text-similarity or hashing",
    )
    found.add_argument("model", help="folder of a run or of a model")
    found.add_argument(
        "--annotations",
        required=True,
        nargs="+",
        metavar="JSON",
        help='{"video": path, "caption": text or texts}, in any form that training reads; for qa'
        ' "question" and "answer", for multiple-choice "caption": texts and "answer": a number,'
        ' for reasoning "images": two paths, "sentence" and "label", for entailment "sentence" and'
        ' "label", for grounding "text" and "box": left, top, width, height, for text-similarity'
        ' "sentence1", "sentence2" and "score", for hashing "image" and "labels": names',
    )
    found.add_argument("--root", help="folder of the videos (default: that of the annotations)")
    found.add_argument("--kind", choices=("video", "image"), default="video", help="of the files")
    switch = argparse.BooleanOptionalAction
    found.add_argument("--paragraph", action=switch, help="join a video's captions to one")
    found.add_argument("--protocol", metavar="P", help="such as msrvtt-1ka, flickr30k or vqa2")
    some = found.add_argument_group("options of some tasks", argument_default=argparse.SUPPRESS)
    some.add_argument("--clips", type=int, help="clips of each video (default: the run's, else 1)")
    some.add_argument("--strided", action=switch, help="clips take every n-th frame")
    some.add_argument(
        "--merge",
        choices=("logsumexp", "mean", "max", "concat"),
        help="how scores of a video's clips become one; concat: texts attend to all clips at once"
        " (default: the run's, else logsumexp)",
    )
    some.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="candidates that are looked at closely: by the match head, 0: none; answers that are"
        " decoded whole, 0: all (default: the run's, else 128); of hashing, those that count",
    )
    some.add_argument(
        "--answers",
        metavar="FILE",
        help="the answers to choose from, a JSON list or one a line (default: the run's, or the"
        " classes of a model that has them)",
    )
    some.add_argument(
        "--answer-length", type=int, metavar="N", help="tokens of an answer (default: the run's)"
    )
    some.add_argument(
        "--metric",
        choices=("exact", "vqa"),
        help="what is right: any answer that was given, or VQA's official accuracy, to questions"
        " that several people answered (default: the run's, else exact)",
    )
    some.add_argument(
        "--folds",
        type=int,
        metavar="N",
        help="search this many parts of the corpus apart, and say the mean (default: 1)",
    )
    some.add_argument(
        "--ensemble",
        metavar="MODEL",
        help="a second model, whose similarities are added to those of the first",
    )
    some.add_argument(
        "--database",
        nargs="+",
        metavar="JSON",
        help="of hashing: annotations of what is searched",
    )
    some.add_argument(
        "--join",
        choices=("concatenated", "mean"),
        help="of text-similarity: the sets of a file as one, or the mean of theirs (default:"
        " concatenated)",
    )
    some.add_argument(
        "--detections",
        metavar="FILE",
        help="boxes to choose from, a JSON object of lists by image (default: the run's)",
    )
    some.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="fusion layer that boxes are found by, from 0 (default: the run's, else the model's)",
    )
    some.add_argument(
        "--probe",
        action="store_true",
        help="also with frames shuffled, reversed and frozen: does the model use time?",
    )
    _add_reading(found)
    found.add_argument("--bf16", action="store_true", help="compute in bf16")
    _add_work(found)
    found.add_argument("--json", metavar="FILE", help="also write the numbers here")

    visualize = commands.add_parser(
        "visualize",
        help="draw which patches of a video survive, or where a picture has what a text says",
        description=VISUALIZE,
        formatter_class=raw,
    )
    visualize.add_argument("model", help="folder of a run or of a model")
    visualize.add_argument("video", nargs="*", help="files of videos, or of pictures")
    visualize.add_argument("--caption", nargs="+", metavar="TEXT", help="one for each file")
    visualize.add_argument(
        "--annotations", metavar="JSON", help="files and texts, in any form that training reads"
    )
    visualize.add_argument("--root", help="folder of these files (default: the annotations')")
    visualize.add_argument(
        "--count", type=int, metavar="N", help="entries of them that are drawn (default: 10)"
    )
    visualize.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="fusion layer that maps are of, from 0 (default: the model's, or all of an SCL's)",
    )
    visualize.add_argument(
        "--beside", metavar="MODEL", help="another model of pictures, drawn in the same figures"
    )
    visualize.add_argument(
        "--output",
        metavar="PATH",
        help="figure of videos (default: survivors.png), or folder of pictures' (default: maps)",
    )
    _add_reading(visualize)

    embed = commands.add_parser(
        "embed", help="embed videos, pictures or texts", description=EMBED, formatter_class=raw
    )
    embed.add_argument("model", help="folder of a run or of a model")
    for kind, what in (
        ("videos", "files, folders, patterns or annotation files"),
        ("images", "the same, of pictures"),
        ("texts", "texts, .txt files with one a line, or annotation files"),
    ):
        embed.add_argument(f"--{kind}", nargs="+", metavar="SOURCE", help=what)
    embed.add_argument("--output", required=True, metavar="FILE", help="ends in .safetensors")
    embed.add_argument("--root", help="folder of annotations' files (default: the annotations')")
    _add_reading(embed)
    _add_work(embed)

    search = commands.add_parser(
        "search", help="find videos by text or by clip", description=SEARCH, formatter_class=raw
    )
    search.add_argument("embeddings", help="file of `svitt embed`")
    search.add_argument("query", nargs="?", help="a text, or the path of a video or a picture")
    search.add_argument(
        "--serve", action="store_true", help="show a page to search by, on this machine alone"
    )
    search.add_argument("--port", type=int, metavar="N", help="of the page (default: a free one)")
    search.add_argument("--model", required=True, help="that embedded: folder of a run or a model")
    search.add_argument("--top", type=int, default=10, metavar="N", help="(default: 10)")
    search.add_argument("--json", metavar="FILE", help="also write what was found here")
    search.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    _add_reading(search)

    sparsity = commands.add_parser(
        "sparsity",
        help="edges and tokens of the full-size model, the paper's Table A1",
        description="How sparse the full-size model is: attention edges against dense attention,"
        " multiplications (MACs), and the tokens left after each pruning.",
    )
    sparsity.add_argument(
        "--frames", type=int, nargs="+", default=[4, 8, 16], metavar="T", help="(default: 4 8 16)"
    )

    commands.add_parser(
        "bench", add_help=False, help="measure the kernels and the training step, against peers"
    )

    commands.add_parser(
        "tune", add_help=False, help="find the GPU kernels' tiles that are fastest on your GPU"
    )

    info = commands.add_parser("info", help="versions, devices, what was built, what will run")
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    parser.add_argument("--batch-size", type=int, default=32, help="clips at a time (default: 32)")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that decode; 0: none (default: 2)"
    )


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
    parser.add_argument(
        "--resize",
        choices=("antialias", "official"),
        help="how frames become the model's size (default: that of training, else antialias)",
    )


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe values, such as optimizer.lr=1e-4"
    )

"""`svitt demo`: film a corpus, pretrain through 4 -> 8 frames, learn to answer questions, evaluate.

Minutes on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svitt_ops.models import sparsity_table
from svitt_ops.training.cli.figures import draw_survivors, find_survivors
from svitt_ops.training.cli.objects import patches_on_objects, survivor_shares
from svitt_ops.training.cli.stages import (
    MARKER,
    OF_FILMS,
    TOKENIZER,
    Course,
    check_overrides,
    note,
    prepare,
    write_tokenizer,
)
from svitt_ops.training.corpora import shapes
from svitt_ops.training.corpora.shapes import CorpusSpec, Film, build_corpus
from svitt_ops.training.data.annotations import read_annotations
from svitt_ops.training.data.paths import expand, write_text
from svitt_ops.training.engine.loading import load_trained
from svitt_ops.training.engine.recipes import Recipe, load_recipe
from svitt_ops.training.tasks.parts.evaluation import Reading
from svitt_ops.training.tasks.parts.gallery import Gallery, GalleryClips, build_gallery
from svitt_ops.training.tasks.parts.probing import pair_accuracy
from svitt_ops.training.tasks.parts.questions import QUESTIONS, read_answers
from svitt_ops.training.tasks.parts.table import format_rows
from svitt_ops.training.tasks.qa import Asked, answer_questions
from svitt_ops.training.tasks.retrieval import Evaluation, retrieval

if TYPE_CHECKING:
    from svitt_ops.models import SViTTForPreTraining

CANDIDATES = 13  # that are ranked anew: of 100 clips as large a share as 128 of MSR-VTT's 1,000
TEXT_LENGTH = 16
STAGES = tuple(f"demo-{stage}" for stage in OF_FILMS)
SHUFFLES = 5  # shuffled orders that accuracies are averaged over


def run(arguments: argparse.Namespace) -> int:
    """Run the demo of a system and print its table; the exit status."""
    if arguments.system != "svitt":
        from svitt_ops.training.cli import demo_pictures

        return demo_pictures.run(arguments)
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
        output: folder for the corpus, all stages, the figure and `demo.json`. Those of an earlier
            demo are replaced, and nothing else in it; a folder that is no demo's is refused.
        seed: of the training; the corpus stays the same.
        motion: film moving shapes, the harder variant, instead of one shape after another.
        overrides: of the recipes of all stages, such as "optimizer.steps=100".
        resume: go on with an interrupted demo instead of starting anew.

    Returns:
        What `demo.json` holds: every measured number.
    """
    course, folder = Course(), expand(output, "--output")
    recipes = _stages(folder, seed, overrides)  # before anything is removed
    spec = demo_corpus(motion)
    prepare(folder, resume)
    note(folder / MARKER, corpus=asdict(spec))
    corpus = folder / "corpus"

    def filming(films: Iterable[Film]) -> Iterable[Film]:
        return tqdm(films, desc="film corpus", unit="scene", dynamic_ncols=True)

    with course.part("corpus"):
        if not (corpus / "test.json").is_file():
            build_corpus(corpus, spec, filming)
        write_tokenizer(corpus, {"train": ["caption"], "train-questions": ["question", "answer"]})
    *_, pretrained, finetuned = course.train(recipes).values()
    with course.part("evaluation"):
        facts = evaluate_demo(pretrained.folder, finetuned.folder, folder, spec)
    facts |= {"seed": seed, "corpus": asdict(spec), **course.facts()}
    facts["resumed"] = resume  # or the seconds are those of what was left to do
    write_text(folder / MARKER, json.dumps(facts, indent=2) + "\n")
    return facts


def _stages(output: Path, seed: int, overrides: Sequence[str]) -> dict[str, Recipe]:
    """The recipes of the stages, each of which starts from the one before."""
    check_overrides(overrides)
    recipes: dict[str, Recipe] = {}
    before: Path | None = None
    for name, stage in zip(STAGES, OF_FILMS, strict=True):
        questions = "-questions" if stage == "qa" else ""
        annotations = output / "corpus" / f"train{questions}.json"
        places = [f"output={output / stage}", f"seed={seed}"]
        places.append(f"data.train.0.annotations={annotations}")
        if before is None:  # its words are those of the questions too
            places.append("tokenizer.train_vocab_size=null")
            places.append(f"tokenizer.name={output / 'corpus' / TOKENIZER}")
        else:
            places.append(f"init.checkpoint={before}")
        recipes[name] = load_recipe(name, [*places, *overrides])
        before = output / stage
    return recipes


def demo_corpus(motion: bool = False) -> CorpusSpec:
    """What the demo films: 201 scenes to train on and 50 to test on, or 70 and 20 with motion."""
    if motion:  # there are fewer scenes; this seed leaves some with each shape to train on
        few = {"validation_scenes": 6, "test_scenes": 20}
        return CorpusSpec(motion=True, frames=8, train_films=16, seed=1, **few)
    return CorpusSpec(frames=8, train_films=12)


def evaluate_demo(
    pretrained: Path, finetuned: Path, output: Path, spec: CorpusSpec
) -> dict[str, Any]:
    """All numbers and the figure of a trained demo.

    Args:
        pretrained: folder of the model that searches.
        finetuned: folder of the one that answers questions.
        output: of the demo.
        spec: of its corpus.
    """
    model, tokenizer, _ = load_trained(pretrained)
    entries = read_annotations(output / "corpus" / "test.json").entries
    films = [film for film in shapes.plan(spec) if film.split == "test"]
    gallery = build_gallery(entries)
    numbers = torch.arange(len(entries)).view(-1, 2)  # both films of a scene follow each other
    frames = model.config.num_frames
    bar = tqdm(total=6, desc="evaluate", unit="part", dynamic_ncols=True)
    found = retrieval(
        model,
        tokenizer,
        GalleryClips(gallery, frames),
        text_length=TEXT_LENGTH,
        settings=Evaluation(top_k=CANDIDATES),
    )
    bar.update()
    pairs = {
        order: pair_accuracy(
            model, tokenizer, gallery, numbers, order=order, draws=draws, text_length=TEXT_LENGTH
        )
        for order, draws in (("normal", 1), ("shuffled", SHUFFLES))
    }
    bar.update()
    on_objects = patches_on_objects(films, spec, model.config)
    survivors = survivor_shares(model, tokenizer, gallery, on_objects, text_length=TEXT_LENGTH)
    bar.update()
    times = step_times(model, gallery, tokenizer)
    bar.update()
    answers = _answer(finetuned, output / "corpus")
    bar.update()
    (row,) = sparsity_table(model.config, frames=[frames], text_length=TEXT_LENGTH)
    figure = _draw(model, tokenizer, gallery, on_objects, output / "survivors.png")
    bar.update()
    bar.close()
    searched = {
        "score": found["text_to_video"]["R1"],
        "chance": 100 / found["videos"],
        "contrastive": found["contrastive"]["text_to_video"]["R1"],
    }
    return {
        "frames": frames,
        "tasks": {"retrieval": searched, "qa": answers},
        "retrieval": found,
        "pair_accuracy": pairs,
        "survivors": survivors,
        "tokens": {"visual": row.tokens, "multimodal": row.multimodal_tokens},
        "edges": {"edges": row.edges.total, "dense": row.edges.dense},
        "seconds_per_step": times,
        "figure": str(figure),
    }


def _answer(folder: Path, corpus: Path) -> dict[str, Any]:
    """Accuracies of all questions, of each type, and of those of the order in shuffled frames."""
    model, tokenizer, _ = load_trained(folder, "question_answering")
    questions = read_annotations(corpus / "test-questions.json", form=QUESTIONS).entries
    asked = Asked.of(questions, read_answers(corpus / "answers.json"))
    of_order = [question for question in asked.questions if question.type == "order"]
    reading = Reading(text_length=TEXT_LENGTH)
    found = answer_questions(model, tokenizer, asked, reading=reading)
    shuffled = [
        answer_questions(
            model,
            tokenizer,
            replace(asked, questions=of_order),
            reading=reading,
            order="shuffled",
            seed=draw,
        )["accuracy"]
        for draw in range(SHUFFLES)
    ]
    return {
        "score": found["accuracy"],
        "chance": found["chance"],
        "majority": found["chance"],  # that of the commonest answer, the best constant one
        "order": found["by_type"]["order"]["accuracy"],
        "order_shuffled": sum(shuffled) / len(shuffled),
        "by_type": found["by_type"],
        "questions": found["questions"],
        "answers": found["answers"],
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
        "mlm_input_ids": texts["input_ids"].to(device),
        "mlm_labels": texts["input_ids"].to(device),
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
    edges, times, answers = facts["edges"], facts["seconds_per_step"], facts["tasks"]["qa"]
    rows: list[tuple[str, ...]] = [("", "R@1", "R@5", "R@10")]
    for name, table in (
        ("text to video", found["text_to_video"]),
        ("  before re-ranking", found["contrastive"]["text_to_video"]),
        ("video to text", found["video_to_text"]),
        ("  before re-ranking", found["contrastive"]["video_to_text"]),
    ):
        rows.append((name, *(f"{table[f'R{k}']:.1f} %" for k in (1, 5, 10))))
    rows.append(("chance", *(f"{min(100.0, 100 * k / found['videos']):.1f} %" for k in (1, 5, 10))))
    more = [
        ("temporal pairs told apart", f"{pairs['normal']:.1f} %"),
        ("  with shuffled frames", f"{pairs['shuffled']:.1f} %   (chance 50 %)"),
        (
            "questions answered rightly",
            f"{answers['score']:.1f} %   (always the commonest answer {answers['majority']:.1f} %)",
        ),
        *((f"  of {name}", f"{x['accuracy']:.1f} %") for name, x in answers["by_type"].items()),
        ("  of order, shuffled frames", f"{answers['order_shuffled']:.1f} %   (chance 50 %)"),
    ]
    for name, what in (("visual", "anything"), ("multimodal", "what the caption names")):
        share = facts["survivors"][name]
        more.append(
            (
                f"{name} survivors on {what}",
                f"{share['share']:.1%} of all patches {share['random']:.1%}"
                f"   ({share['share'] / share['random']:.2f} x)",
            )
        )
    more += [
        ("visual tokens", " -> ".join(map(str, tokens["visual"]))),
        ("multimodal tokens", " -> ".join(map(str, tokens["multimodal"]))),
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
        f"{found['videos']} held-out clips of {facts['frames']} frames, scenes never trained on,"
        f" and {answers['questions']} questions about them",
        "",
        *format_rows(rows),
        "",
        *format_rows(more),
    ]
    if "seconds" in facts:
        lines += ["", f"All of it took {facts['seconds']['total'] / 60:.1f} minutes."]
    lines += ["", f"Which patches survive: {facts['figure']}"]
    return "\n".join(lines)


def _draw(
    model: SViTTForPreTraining, tokenizer: Any, gallery: Gallery, on_objects: Tensor, path: Path
) -> Path:
    clips = GalleryClips(gallery, model.config.num_frames)
    samples = []
    for number in (0, 1):
        frames = clips[number].frames
        assert frames is not None
        found = find_survivors(
            model, tokenizer, frames[0], gallery.texts[number], text_length=TEXT_LENGTH
        )
        samples.append(replace(found, truth=on_objects[number, 0].nonzero()[:, 0]))
    return draw_survivors(samples, path)

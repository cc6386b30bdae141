"""`svitt visualize`: which patches of a video survive, or where a picture has what a text says."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svitt_ops.training.cli import MODEL, at_least, check_model
from svitt_ops.training.data.annotations import Entry, Form, Record, read_annotations
from svitt_ops.training.data.collate import count_cut
from svitt_ops.training.data.paths import input_file, input_folder, output_folder, saving
from svitt_ops.training.data.places import label
from svitt_ops.training.data.sampling import sample_positions
from svitt_ops.training.data.sources import find_source
from svitt_ops.training.data.text import clean_caption
from svitt_ops.training.engine.settings import RunSettings

log = logging.getLogger(__name__)
TEXTS = ("caption", "text", "sentence")
COUNT = 10
"""Entries of annotations that are drawn."""
FIGURE, FOLDER = "survivors.png", "maps"
STEM = 60  # letters of a picture's name in its figure's


def run(arguments: argparse.Namespace) -> int:
    """Draw the figures; the exit status."""
    at_least(arguments, frames=1, text_length=1, count=1, layer=0)
    _check_source(arguments)
    kinds = _kinds()
    check_model(arguments.model, *kinds)
    from svitt_ops.training.engine.checkpoints import model_folder
    from svitt_ops.training.engine.loading import load_for_use

    config = model_folder(arguments.model, MODEL) / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type", kinds[0])
    of_videos = kind == kinds[0]
    for other in ("layer", "beside") if of_videos else ("frames",):
        if getattr(arguments, other) is not None:
            whose = "pictures" if of_videos else "videos"
            raise ValueError(f"--{other}: needs a model of {whose}, got {kind}")
    if arguments.beside is not None:
        check_model(arguments.beside, *kinds[1:], name="--beside")
    entries = _entries(arguments, "video" if of_videos else "image")
    target = _output(arguments, of_videos)
    model, tokenizer, reading, _ = load_for_use(
        arguments.model,
        frames=arguments.frames,
        text_length=arguments.text_length,
        resize=arguments.resize,
    )
    if not of_videos:
        _check_maps(model, "model")
    readers = [(model, tokenizer, reading)]
    if arguments.beside is not None:
        second, *reader, _ = load_for_use(
            arguments.beside, text_length=arguments.text_length, resize=arguments.resize
        )
        _check_maps(second, "--beside")
        readers.append((second, *reader))
    captions = [entry.captions[0] for entry in entries]
    for _, reads, how in readers:
        if cut := count_cut(reads, captions, length := how.text_length):
            log.warning(
                "--caption: %d of %d longer than %d tokens, and cut", cut, len(captions), length
            )
    if of_videos:
        _draw_videos(model, tokenizer, reading, entries, target)
    else:
        _draw_pictures(readers, entries, target, arguments.layer)
    return 0


def _check_maps(model: Any, name: str) -> None:
    """Refuse a model of pictures, that of an argument by name, without maps to draw."""
    from svitt_ops.training.cli.maps import MAPPED

    if not any(hasattr(model, maps) for maps in MAPPED):
        raise ValueError(
            f"{name}: must be for pretraining or retrieval to have maps of words, got"
            f" {type(model).__name__}"
        )
    if model.config.given_features:
        raise ValueError(f"{name}: must be one of pictures, got one of given features")


def _check_source(arguments: argparse.Namespace) -> None:
    """Refuse what is not either files with their texts or annotations."""
    if arguments.annotations is None:
        if not arguments.video:
            raise ValueError("video: must be named, or --annotations, got neither")
        for name in ("root", "count"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name}: needs --annotations")
        captions = arguments.caption or []
        if len(captions) != len(arguments.video):
            raise ValueError(
                f"--caption: must be one for each of the {len(arguments.video)} videos,"
                f" got {len(captions)}"
            )
        for caption in captions:
            if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
                raise ValueError(f"--caption: must be text in UTF-8, got {caption!r}")
    elif arguments.video or arguments.caption:
        raise ValueError("--annotations: has the files and their texts, got others besides")
    else:
        find_source(arguments.annotations, "--annotations")
        if arguments.root is not None:
            input_folder(arguments.root, "--root")


def _kinds() -> list[str]:
    """SViTT, and all systems whose models find words in pictures."""
    from svitt_ops.models.systems import load_system, system_names
    from svitt_ops.training.cli.maps import MAPPED

    found = ["svitt"]
    for system in map(load_system, system_names()):
        if any(hasattr(system.models.get("retrieval"), name) for name in MAPPED):
            found.append(system.config.model_type)
    return found


def _entries(arguments: argparse.Namespace, kind: Any) -> list[Entry]:
    """The files and a text of each."""
    if arguments.annotations is None:
        files = [str(input_file(path, "video")) for path in arguments.video]
        captions = [clean_caption(caption) for caption in arguments.caption]
        if kind == "image" and "" in captions:
            given = arguments.caption[captions.index("")]
            raise ValueError(f"--caption: must have words, got {given!r}")
        return [
            Entry(media=(file,), captions=(caption,), kind=kind)
            for file, caption in zip(files, captions, strict=True)
        ]
    form = Form(texts=TEXTS, parse=_captioned)
    found = read_annotations(arguments.annotations, root=arguments.root, kind=kind, form=form)
    for problem in found.problems:
        log.warning("skipped: %s", problem)
    count = arguments.count or COUNT
    if len(found.entries) > count:
        log.warning("--count: the first %d of %d entries are drawn", count, len(found.entries))
    return list(found.entries[:count])


def _captioned(record: Record) -> Entry:
    """A file and its text, the first of several."""
    media = record.media
    if len(media) != 1:
        raise ValueError(f"must name one file, got {len(media)}")
    name = record.field(*TEXTS)
    texts = record.clean(record.several(name), name)
    return Entry(media=media, captions=texts, kind=record.kind)


def _output(arguments: argparse.Namespace, of_videos: bool) -> Path:
    """The file, or for pictures the folder, that figures go to."""
    if of_videos:
        from svitt_ops.training.cli.figures import figure_file

        return figure_file(arguments.output or FIGURE, "--output")
    return output_folder(arguments.output or FOLDER, "--output")


def _draw_videos(
    model: Any,
    tokenizer: Any,
    reading: RunSettings,
    entries: Sequence[Entry],
    target: Path,
) -> None:
    """Draw all clips that can be read into one figure."""
    from svitt_ops.training.cli.figures import draw_survivors, find_survivors
    from svitt_ops.training.data.datasets import SkipLog
    from svitt_ops.training.data.video import UnusableVideoError, read_frames

    def choose(times: Sequence[float]) -> list[int]:
        return sample_positions(times, model.config.num_frames, "middle")

    samples, skipped = [], SkipLog()
    for entry in entries:
        path = entry.media[0]
        try:
            frames = read_frames(path, choose, short_side=reading.short_side)
        except UnusableVideoError as error:
            for reason in skipped.add([(path, str(error))]):
                log.warning("skipped: %s", reason)
            continue
        found = find_survivors(
            model,
            tokenizer,
            frames,
            entry.captions[0],
            text_length=reading.text_length,
            resize=reading.resize,
        )
        samples.append(found)
    if not samples:
        raise ValueError(f"visualize: no video could be read; the first: {skipped.first()}")
    with saving(target):
        print(draw_survivors(samples, target))


def _draw_pictures(
    readers: Sequence[tuple[Any, Any, RunSettings]],
    entries: Sequence[Entry],
    target: Path,
    layer: int | None,
) -> None:
    """Draw a figure for each picture that can be read, with the maps of one model or of two."""
    from svitt_ops.training.cli.maps import beside, draw_maps, find_maps
    from svitt_ops.training.tasks.parts.evaluation import Reading
    from svitt_ops.training.tasks.parts.pictures import Unread, read_pictures

    how = Reading(short_side=readers[0][2].short_side)
    found = read_pictures("visualize", entries, Unread(), batch_size=1, reading=how)
    for (number,), (picture,) in found:
        entry = entries[number]
        maps = beside(
            find_maps(
                model,
                tokenizer,
                picture[0],
                entry.captions[0],
                text_length=reading.text_length,
                resize=reading.resize,
                layer=layer,
            )
            for model, tokenizer, reading in readers
        )
        file = target / f"{number:03}-{Path(label(entry.media[0])).stem[:STEM]}.png"
        with saving(file):
            print(draw_maps(maps, file))

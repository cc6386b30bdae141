"""`svitt visualize`: which patches of a video survive."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from svitt_ops.training.cli import at_least, check_model
from svitt_ops.training.cli.figures import draw_survivors, figure_file, find_survivors
from svitt_ops.training.data.collate import count_cut
from svitt_ops.training.data.paths import input_file, saving
from svitt_ops.training.data.sampling import sample_positions
from svitt_ops.training.data.text import clean_caption
from svitt_ops.training.data.video import read_frames

log = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Draw the figure; the exit status."""
    at_least(arguments, frames=1, text_length=1)
    if len(arguments.caption) != len(arguments.video):
        raise ValueError(
            f"--caption: must be one for each of the {len(arguments.video)} videos,"
            f" got {len(arguments.caption)}"
        )
    for caption in arguments.caption:
        if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
            raise ValueError(f"--caption: must be text in UTF-8, got {caption!r}")
    check_model(arguments.model, "svitt")
    videos = [input_file(path, "video") for path in arguments.video]
    picture = figure_file(arguments.output, "--output")
    from svitt_ops.training.engine.loading import load_for_use

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

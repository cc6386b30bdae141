"""`svitt embed`: embeddings of videos, pictures or texts in a file."""

from __future__ import annotations

import argparse
import logging

from svitt_ops.training.cli import at_least, check_model
from svitt_ops.training.data.paths import input_folder, output_file, saving

log = logging.getLogger(__name__)
KINDS = ("video", "image", "text")


def run(arguments: argparse.Namespace) -> int:
    """Embed, and say what was skipped; the exit status."""
    at_least(arguments, frames=1, text_length=1, batch_size=1, workers=0)
    given = [kind for kind in KINDS if getattr(arguments, f"{kind}s")]
    if len(given) != 1:
        raise ValueError(f"embed: --videos, --images or --texts must be given, got {len(given)}")
    (kind,) = given
    sources = getattr(arguments, f"{kind}s")
    check_model(arguments.model)
    if arguments.root is not None:
        input_folder(arguments.root, "--root")
    if not arguments.output.endswith(".safetensors"):
        raise ValueError(f"--output: must end in .safetensors, got {arguments.output!r}")
    output = output_file(arguments.output, "--output")

    from tqdm.auto import tqdm

    from svitt_ops.training.embeddings.embedding import Embedder, embed
    from svitt_ops.training.embeddings.listing import list_media, list_texts

    embedder = Embedder.load(
        arguments.model,
        cpu=arguments.cpu,
        frames=arguments.frames,
        text_length=arguments.text_length,
        resize=arguments.resize,
    )
    if kind == "text":
        items = list_texts(sources, root=arguments.root, max_words=embedder.max_words)
    else:
        items = list_media(sources, kind, root=arguments.root)
    done = embed(
        embedder,
        items,
        kind,
        output,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        progress=tqdm,
    )
    if done.skipped.reasons:
        path = output.with_name(f"{output.stem}-skipped.tsv")
        with saving(path):
            done.skipped.write(path)
        log.warning("%s: %s", done.skipped.summary(), path)
    print(f"{len(done.embeddings)} {kind}s in {output}")
    return 0

"""`svitt search`: what is most like a text, or a clip, among embedded files; also on a page."""

from __future__ import annotations

import argparse
import json
import os
from importlib.util import find_spec

from svitt_ops.training.cli import at_least, check_model
from svitt_ops.training.data.paths import input_file, output_file, write_text


def run(arguments: argparse.Namespace) -> int:
    """Search, print the best, write them; the exit status."""
    at_least(arguments, top=1, frames=1, text_length=1, port=0)
    index = input_file(arguments.embeddings, "embeddings")
    if arguments.serve == (arguments.query is not None):
        raise ValueError(f"query: must be given, or --serve, got {arguments.query!r}")
    if arguments.query is not None and not arguments.query.strip():
        raise ValueError(f"query: must be a text or a file, got {arguments.query!r}")
    if arguments.serve and find_spec("gradio") is None:
        raise ValueError("--serve: needs gradio, of the extra `app`")
    check_model(arguments.model, name="--model")
    numbers = None if arguments.json is None else output_file(arguments.json, "--json")

    from svitt_ops.training.embeddings.embedding import Embedder
    from svitt_ops.training.embeddings.query import search
    from svitt_ops.training.embeddings.store import Embeddings

    embedder = Embedder.load(
        arguments.model,
        cpu=arguments.cpu,
        frames=arguments.frames,
        text_length=arguments.text_length,
        resize=arguments.resize,
    )
    embeddings = Embeddings.load(index)
    if arguments.serve:
        from svitt_ops.training.cli.page import build_page, serve

        serve(build_page(embeddings, embedder, arguments.top), arguments.port)
        return 0
    found = search(embeddings, embedder, arguments.query, count=arguments.top)
    width = len(str(len(found)))
    for rank, (name, score) in enumerate(found, start=1):
        # Names of files may hold bytes that are no text.
        print(
            f"{rank:{width}}  {score:7.4f}  {os.fsencode(name).decode(errors='backslashreplace')}"
        )
    if numbers is not None:
        rows = [{"name": name, "score": score} for name, score in found]
        write_text(numbers, json.dumps({"query": arguments.query, "found": rows}, indent=2) + "\n")
    return 0

"""`svitt search --serve`: a local page to search embedded files by a sentence."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable
from typing import Any

from PIL import Image

from svitt_ops.training.cli.figures import find_survivors, survivor_strip
from svitt_ops.training.data.sampling import sample_positions
from svitt_ops.training.data.video import UnusableVideoError, read_frames
from svitt_ops.training.embeddings.embedding import Embedder
from svitt_ops.training.embeddings.query import search
from svitt_ops.training.embeddings.store import Embeddings

HOST = "127.0.0.1"
MOST = 20
"""Clips that are shown."""
FIGURE = (
    '<figure style="margin: 1em 0"><figcaption>{label}</figcaption>'
    '<img src="data:image/png;base64,{picture}" alt="{label}" style="max-width: 100%"></figure>'
)


def build_page(embeddings: Embeddings, embedder: Embedder, count: int = 10) -> Any:
    """The page, a `gradio.Blocks`; nothing on it asks for anything beyond this machine.

    Args:
        embeddings: to search in.
        embedder: of the same weights.
        count: clips that are shown at first.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # asked for while it is imported, too
    import gradio

    find = finder(embeddings, embedder)

    def answer(query: str, wanted: float) -> str:
        try:
            return find(query, int(wanted))
        except ValueError as error:
            return f"<p>{html.escape(str(error))}</p>"

    most = max(min(MOST, len(embeddings)), 1)
    with gradio.Blocks(title="svitt search", analytics_enabled=False) as page:
        gradio.Markdown(f"# {html.escape(embeddings.path.name)}")
        with gradio.Row():
            query = gradio.Textbox(
                label="What is to be seen", placeholder="a dog jumps", scale=4, elem_id="query"
            )
            wanted = gradio.Slider(
                1, max(most, 2), value=min(count, most), step=1, label="clips", scale=1
            )
        submit = gradio.Button("Search", variant="primary", elem_id="submit")
        found = gradio.HTML(elem_id="found")
        for event in (submit.click, query.submit):
            event(answer, [query, wanted], found, api_visibility="private")
    return page


def finder(embeddings: Embeddings, embedder: Embedder) -> Callable[[str, int], str]:
    """What the page does: from a sentence, and how many clips are wanted, to HTML."""
    model = embedder.model
    prunes = hasattr(model.config, "multimodal_prune_layers") and model.config.keep_rate < 1

    def picture(name: str, text: str) -> str:
        """PNG in base 64."""
        reading = embedder.reading

        def choose(times: Any) -> list[int]:
            return sample_positions(times, model.config.num_frames, reading.test_sampling)

        frames = read_frames(name, choose, short_side=reading.short_side)
        shown: Any = frames
        if prunes:
            how = {"text_length": reading.text_length, "resize": reading.resize}
            shown = find_survivors(model, embedder.tokenizer, frames, text, **how)
        file = io.BytesIO()
        Image.fromarray(survivor_strip(shown)).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    def find(query: str, count: int) -> str:
        if not len(embeddings):
            raise ValueError(f"{embeddings.path}: has no clips")
        if not query.strip():
            raise ValueError("query: must be a sentence, got nothing")
        parts = [f"<p>{min(count, len(embeddings))} of {len(embeddings)}</p>"]
        for rank, (name, score) in enumerate(search(embeddings, embedder, query, count=count), 1):
            label = html.escape(f"{rank}. {score:.3f} {name}")
            try:
                parts.append(FIGURE.format(label=label, picture=picture(name, query)))
            except UnusableVideoError as error:
                parts.append(f"<p>{label}: {html.escape(str(error))}</p>")
        return "".join(parts)

    return find


def serve(page: Any, port: int | None = None, *, wait: bool = True) -> str:
    """Show the page on this machine alone; its address.

    Args:
        page: of `build_page`.
        port: to listen on; default: the first free one from 7860 on.
        wait: until it is interrupted.
    """
    import gradio

    _, address, _ = page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
        # Fonts of this machine: others would be fetched from the web.
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        footer_links=[],
        ssr_mode=False,
    )
    print(f"serving on {address} (Ctrl-C ends it)", flush=True)
    if wait:
        page.block_thread()
    return str(address)

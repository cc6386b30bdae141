"""A text or a clip against embedded files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from svitt_ops.training.data.annotations import Kind
from svitt_ops.training.data.datasets import SkipLog
from svitt_ops.training.data.text import clean_caption
from svitt_ops.training.embeddings.embedding import Embedder
from svitt_ops.training.embeddings.listing import MEDIA
from svitt_ops.training.embeddings.store import Embeddings

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def search(
    embeddings: Embeddings, embedder: Embedder, query: str, *, count: int = 10
) -> list[tuple[str, float]]:
    """Names and cosine similarities of what is most like a query, the best first.

    Args:
        embeddings: to search in.
        embedder: of the same weights.
        query: a text, or the path of a video or a picture.
        count: how many are wanted.

    Raises:
        ValueError: the embedder is another one, the query is empty, or its file cannot be read.
    """
    stored = embeddings.identity
    if stored["weights"] != embedder.weights:
        raise ValueError(
            f"--model: must be the one that {embeddings.path} is by, {stored['model']}"
            f" {stored['weights'][:12]}, got {type(embedder.model).__name__}"
            f" {embedder.weights[:12]}"
        )
    scores, rows = embeddings.search(embed_query(embedder, query), count)
    return [
        (embeddings.names[row], score)
        for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)
    ]


def embed_query(embedder: Embedder, query: str) -> Tensor:
    """The embedding ``(1, dim)`` of a text, or of the file that it names."""
    if _is_file(query):
        kind: Kind = "image" if Path(query).suffix.lower() in PICTURES else "video"
        ((_, found),) = embedder.clips([query], kind, SkipLog())
        return found
    if Path(query).suffix.lower() in MEDIA and " " not in query.strip():
        raise ValueError(f"query: must be a text or a file, got {query!r}, which is not there")
    text = clean_caption(query, embedder.max_words)
    if not text:
        raise ValueError(f"query: must have words, got {query!r}")
    return embedder.texts([text])


def _is_file(query: str) -> bool:
    try:
        return Path(query).is_file()
    except (OSError, ValueError):  # too long for a path, or with a zero in it
        return False

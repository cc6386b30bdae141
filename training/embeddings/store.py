"""Files of embeddings: what is in them, and which rows are most like a query."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svitt_ops.training.engine.checkpoints import PARTIAL, writing

FORMAT = "svitt-embeddings-1"
CHUNK = 1 << 16
"""Rows that are read, and searched, at a time."""
LARGE = 1 << 16
"""Rows from which on FAISS searches, where it is installed."""


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Embeddings that lie in a file.

    Rows are read when they are asked for, so that a set larger than the memory can be searched.
    """

    path: Path
    kind: str
    """"video", "image" or "text"."""
    names: list[str]
    """Paths of the files, or the texts."""
    stamps: Tensor
    """int64 ``(n, 2)``: size and time of change of each file when it was read; 0 of texts."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Of the model, and how it read: `model`, `weights`, `settings`."""

    @classmethod
    def load(cls, path: str | Path) -> Embeddings:
        """Open a file that `write` made.

        Raises:
            ValueError: it is not there, or is none of them.
        """
        path = Path(path)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"is of format {metadata.get('format')!r}, not {FORMAT!r}")
                names = _split(file.get_tensor("names"), file.get_tensor("name_ends"))
                stamps = file.get_tensor("stamps")
                rows = file.get_slice("embeddings").get_shape()[0]
                if not rows == len(names) == len(stamps):
                    raise ValueError(f"has {rows} rows for {len(names)} names")
                identity = json.loads(metadata["identity"])
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: must be a file of `svitt embed` ({error})") from error
        return cls(path=path, kind=metadata["kind"], names=names, stamps=stamps, identity=identity)

    def __len__(self) -> int:
        return len(self.names)

    def chunks(self, rows: int = CHUNK) -> Iterator[tuple[int, Tensor]]:
        """The number of the first row, and fp32 ``(rows, dim)``, some rows at a time."""
        with safe_open(self.path, "pt") as file:
            stored = file.get_slice("embeddings")
            for start in range(0, len(self), rows):
                yield start, stored[start : start + rows]

    def rows(self) -> Tensor:
        """All of them, ``(n, dim)``."""
        return torch.cat([chunk for _, chunk in self.chunks()])

    def search(self, queries: Tensor, count: int = 10, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
        """The rows most like some queries, exactly; of equal ones the first, unless FAISS chooses.

        Args:
            queries: embeddings ``(queries, dim)`` of the same model.
            count: how many are wanted; all, if there are fewer.
            chunk: rows that are in memory at a time.

        Returns:
            Cosine similarities, fp32, from the highest on, and numbers of rows, int64, ``(queries,
            count)`` each.

        Raises:
            ValueError: queries of another width, or not finite.
        """
        queries = queries.detach().float().cpu()
        if queries.ndim != 2 or not queries.isfinite().all():
            raise ValueError(
                f"search: queries must be finite, (queries, dim), got {tuple(queries.shape)}"
            )
        best = torch.empty(len(queries), 0)
        where = torch.empty(len(queries), 0, dtype=torch.int64)
        similar = _by_faiss if len(self) >= LARGE and find_spec("faiss") else _by_product
        for start, rows in self.chunks(chunk):
            if rows.shape[1] != queries.shape[1]:
                raise ValueError(
                    f"search: queries must have {rows.shape[1]} columns as {self.path} has, got"
                    f" {queries.shape[1]}"
                )
            scores, numbers = similar(queries, rows, min(count, len(rows)))
            best, where = torch.cat([best, scores], 1), torch.cat([where, numbers + start], 1)
            # Rows of earlier chunks come first: the sort keeps them before later ones as good.
            order = best.sort(stable=True, dim=1, descending=True).indices[:, :count]
            best, where = best.gather(1, order), where.gather(1, order)
        return best, where


def _by_product(queries: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best rows of a chunk; of equal ones the first."""
    scores = queries @ rows.T
    least = scores.topk(count, 1).values[:, -1:]
    # Which of equal ones topk returns is not said: a stable sort of all that reach the last.
    wide = int((scores >= least).sum(1).max()) if len(scores) else count
    numbers = scores.topk(min(wide, scores.shape[1]), 1).indices.sort(1).values
    found = scores.gather(1, numbers)
    order = found.sort(stable=True, dim=1, descending=True).indices[:, :count]
    return found.gather(1, order), numbers.gather(1, order)


def _by_faiss(queries: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    import faiss

    scores, numbers = faiss.knn(
        queries.numpy(), rows.contiguous().numpy(), count, metric=faiss.METRIC_INNER_PRODUCT
    )
    return torch.from_numpy(scores), torch.from_numpy(numbers)


def write(
    path: Path,
    *,
    kind: str,
    names: Sequence[str],
    stamps: Tensor,
    embeddings: Tensor,
    identity: dict[str, Any],
) -> None:
    """Write a file that `Embeddings.load` reads, whole or not at all.

    Args:
        path: of the file.
        kind: "video", "image" or "text".
        names: paths, or texts.
        stamps: as of `Embeddings`.
        embeddings: of length 1, ``(n, dim)``.
        identity: as of `Embeddings`.
    """
    joined, ends = _join(names)
    tensors = {
        "embeddings": embeddings.float().contiguous(),
        "names": joined,
        "name_ends": ends,
        "stamps": stamps.contiguous(),
    }
    metadata = {"format": FORMAT, "kind": kind, "identity": json.dumps(identity)}
    partial = path.with_name(f"{PARTIAL}{path.name}")
    with writing(path):
        try:
            save_file(tensors, partial, metadata)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _join(names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Names as bytes, one after another, and where each ends: they may hold what is no text."""
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    whole = bytearray(b"".join(encoded))
    joined = torch.frombuffer(whole, dtype=torch.uint8) if whole else torch.empty(0).byte()
    return joined, torch.tensor([len(name) for name in encoded]).cumsum(0)


def _split(joined: Tensor, ends: Tensor) -> list[str]:
    whole, stops = joined.numpy().tobytes(), ends.tolist()
    return [
        whole[start:stop].decode("utf-8", "surrogateescape")
        for start, stop in zip([0, *stops], stops, strict=False)
    ]

"""Embed files or texts by a trained model, going on where an earlier run was killed."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from svitt_ops.training.data.annotations import Kind
from svitt_ops.training.data.datasets import SkipLog
from svitt_ops.training.embeddings.store import Embeddings, write
from svitt_ops.training.engine.checkpoints import PARTIAL
from svitt_ops.training.engine.loading import load_for_use
from svitt_ops.training.engine.lock import own_folder
from svitt_ops.training.engine.provenance import hashes, weight_files
from svitt_ops.training.engine.settings import RunSettings, run_values
from svitt_ops.training.tasks.parts.checks import check_finite
from svitt_ops.training.tasks.parts.encoding import (
    Progress,
    encode_clips,
    encode_gallery_texts,
)
from svitt_ops.training.tasks.parts.gallery import Gallery, GalleryClips

log = logging.getLogger(__name__)
PAUSE = 10.0
"""Seconds between two parts that are written."""
TEXTS = 1024
"""That are padded alike."""
Row = tuple[str, int, int]
"""Name, size and time of change."""


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A trained model that embeds.

    Args:
        model: has `encode_video` and `encode_text`.
        tokenizer: of the texts.
        reading: how clips and texts were read in training.
        max_words: where texts are cut.
        weights: that tell it from other models.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    reading: RunSettings
    max_words: int | None
    weights: str

    @classmethod
    def load(cls, path: str | Path, *, cpu: bool = False, **reading: Any) -> Embedder:
        """From a run's folder or a model's.

        Args:
            path: of the folder.
            cpu: leave a GPU alone.
            reading: `frames`, `text_length` and `resize`, where they differ from training's.

        Raises:
            ValueError: there is no model, or one without embeddings of clips and texts.
        """
        model, tokenizer, settings, folder = load_for_use(path, **reading)
        if not hasattr(model, "encode_text") or not hasattr(model, "encode_video"):
            raise ValueError(
                "model: must embed videos and texts, as those for pretraining and retrieval do, got"
                f" {type(model).__name__}"
            )
        if model.config.given_features:
            raise ValueError("model: must be one of pictures, got one of given features")
        found = hashes(weight_files(folder))
        weights = hashlib.sha256("".join(found[name] for name in sorted(found)).encode())
        max_words = run_values(folder, {"max_words": 0}).get("max_words")
        device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
        return cls(
            model=model.eval().to(device),
            tokenizer=tokenizer,
            reading=settings,
            max_words=max_words,
            weights=weights.hexdigest(),
        )

    def identity(self, kind: str) -> dict[str, Any]:
        """Two sets of the same identity can be one; those of the same weights can be compared."""
        settings: dict[str, Any] = {"text_length": self.reading.text_length}
        if kind != "text":
            settings = {
                **asdict(self.reading),
                "frames": self.model.config.num_frames,
                "image_size": self.model.config.image_size,
            }
            del settings["text_length"]
        return {"model": type(self.model).__name__, "weights": self.weights, "settings": settings}

    def clips(
        self,
        paths: Sequence[str],
        kind: Kind,
        skipped: SkipLog,
        *,
        batch_size: int = 32,
        workers: int = 0,
        progress: Progress | None = None,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Embeddings of files, some at a time: their numbers, and fp32 ``(files, dim)``.

        Args:
            paths: of files.
            kind: what they are.
            skipped: gets those that cannot be read.
            batch_size: files at a time.
            workers: processes that decode.
            progress: wraps the loop, such as tqdm.

        Raises:
            ValueError: no file can be read, or embeddings are not finite.
        """
        clips = GalleryClips(
            Gallery(videos=list(paths), kinds=[kind] * len(paths)),
            self.model.config.num_frames,
            short_side=self.reading.short_side,
            sampling=self.reading.test_sampling,
            task="embed",
        )
        for numbers, output in encode_clips(
            self.model,
            clips,
            skipped,
            batch_size=batch_size,
            workers=workers,
            progress=progress,
            resize=self.reading.resize,
        ):
            found = output.embeds.float().cpu()
            check_finite(
                found, "embed: embeddings", lambda k, names=[paths[n] for n in numbers]: names[k]
            )
            yield numbers, found

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of clean texts, fp32 ``(texts, dim)``."""
        parts = [
            encode_gallery_texts(
                self.model,
                self.tokenizer,
                list(texts[start : start + TEXTS]),
                text_length=self.reading.text_length,
                keep_states=False,
            ).embeds.cpu()
            for start in range(0, len(texts), TEXTS)
        ]
        return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """What `embed` did."""

    embeddings: Embeddings
    skipped: SkipLog
    reused: int
    """Rows of an earlier run."""


def embed(
    embedder: Embedder,
    items: Sequence[str],
    kind: str,
    output: str | Path,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
) -> Embedded:
    """Embed files or texts into a file.

    What is done is written every few seconds beside the output: a run that was killed goes on from
    there, and one whose output is there embeds what is new in it, or has changed since.

    Args:
        embedder: by which.
        items: paths, as `list_media` returns them, or clean texts.
        kind: "video", "image" or "text".
        output: a file that ends in .safetensors.
        batch_size: files at a time.
        workers: processes that decode.
        progress: wraps the loop over files, such as tqdm.

    Raises:
        ValueError: nothing can be embedded, or the output is of another model or of other settings.
    """
    output = Path(output)
    identity = embedder.identity(kind)
    parts = output.with_name(f"{PARTIAL}{output.name}.parts")
    skipped = SkipLog()
    with own_folder(parts, "--output"):
        known = _known(output, parts, kind, identity)
        stamps = [(0, 0) if kind == "text" else _stamp(item) for item in items]
        rows = [(name, *stamp) for name, stamp in zip(items, stamps, strict=True)]
        todo = [row for row in rows if row not in known]
        reused = len(rows) - len(todo)
        if reused:
            log.warning("%s: goes on, %d of %d are embedded", output, reused, len(rows))
        if todo:
            names = [name for name, *_ in todo]
            found: Iterator[tuple[list[int], Tensor]]
            if kind == "text":
                found = iter([(list(range(len(names))), embedder.texts(names))])
            else:
                found = embedder.clips(
                    names,
                    kind,
                    skipped,
                    batch_size=batch_size,
                    workers=workers,
                    progress=progress,
                )
            try:
                for done, embeds in _parts(found):
                    part = [todo[k] for k in done]
                    known |= zip(part, embeds, strict=True)
                    _write(_next(parts), kind, part, embeds, identity)
            except ValueError:
                # Where none of what is new can be read, what is known stays.
                if not known or len(skipped.reasons) < len(todo):
                    raise
        kept = [row for row in rows if row in known]
        if not kept:
            raise ValueError(f"embed: no file could be read; the first: {skipped.first()}")
        _write(output, kind, kept, torch.stack([known[row] for row in kept]), identity)
        shutil.rmtree(parts)
    return Embedded(embeddings=Embeddings.load(output), skipped=skipped, reused=reused)


def _known(output: Path, parts: Path, kind: str, identity: Mapping[str, Any]) -> dict[Row, Tensor]:
    """Rows of earlier runs."""
    known: dict[Row, Tensor] = {}
    for path in [output, *sorted(parts.glob("*.safetensors"))]:
        if not path.exists():
            continue
        found = Embeddings.load(path)
        if (found.kind, found.identity) != (kind, identity):
            raise ValueError(
                f"--output: {output} has {found.kind}s by {_words(found.identity)}, got {kind}s by"
                f" {_words(identity)}; remove it, or give another name"
            )
        stamps = (tuple(stamp) for stamp in found.stamps.tolist())
        rows = ((name, *stamp) for name, stamp in zip(found.names, stamps, strict=True))
        known |= zip(rows, found.rows(), strict=True)
    return known


def _words(identity: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in identity["settings"].items())
    return f"{identity['model']} {identity['weights'][:12]} with {settings}"


def _stamp(path: str) -> tuple[int, int]:
    try:
        found = [os.stat(path)]
        if stat.S_ISDIR(found[0].st_mode):  # of frames, each of which may change
            found += [entry.stat() for entry in os.scandir(path)]
    except OSError:
        return 0, 0  # which is said when it is read
    return sum(x.st_size for x in found), max(x.st_mtime_ns for x in found)


def _parts(found: Iterator[tuple[list[int], Tensor]]) -> Iterator[tuple[list[int], Tensor]]:
    """The same, of some seconds together."""
    numbers: list[int] = []
    embeds: list[Tensor] = []
    last = time.monotonic()
    for some, rows in found:
        numbers += some
        embeds.append(rows)
        if time.monotonic() - last > PAUSE:
            yield numbers, torch.cat(embeds)
            numbers, embeds, last = [], [], time.monotonic()
    if numbers:
        yield numbers, torch.cat(embeds)


def _next(parts: Path) -> Path:
    """The next part's file."""
    last = max((int(path.stem) for path in parts.glob("[0-9]*.safetensors")), default=-1)
    return parts / f"{last + 1:06}.safetensors"


def _write(
    path: Path, kind: str, rows: Sequence[Row], embeds: Tensor, identity: dict[str, Any]
) -> None:
    write(
        path,
        kind=kind,
        names=[name for name, *_ in rows],
        stamps=torch.tensor([stamp for _, *stamp in rows]),
        embeddings=embeds,
        identity=identity,
    )

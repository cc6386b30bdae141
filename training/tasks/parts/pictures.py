"""Examples about pictures, read one by one for evaluation; what lacks a picture is left out."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from svitt_ops.training.data.annotations import Entry
from svitt_ops.training.data.datasets import ClipSpec, FrameReader, SkipLog
from svitt_ops.training.data.transport import Batch, leave_interrupts_to_parent
from svitt_ops.training.data.video import UnusableVideoError
from svitt_ops.training.tasks.parts.evaluation import Reading

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PictureEvaluation:
    """How examples about pictures are evaluated."""

    batch_size: int = 32
    """Examples at a time."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"evaluation: batch_size must be at least 1, got {self.batch_size}")

    @classmethod
    def of(cls, options: argparse.Namespace) -> PictureEvaluation:
        """What the options of `svitt evaluate` say."""
        return cls(batch_size=options.batch_size)


@dataclass
class Unread:
    """Which pictures could not be read, and which examples are left out for want of them."""

    skipped: SkipLog = field(default_factory=SkipLog)
    left_out: list[str] = field(default_factory=list)


class _Pictures(Dataset[dict[str, Any]]):
    """All pictures of each example, or which one of them cannot be read, and why."""

    def __init__(self, entries: Sequence[Entry], short_side: int | None) -> None:
        self.entries = entries
        self.reader = FrameReader(ClipSpec(num_frames=1, mode="middle", short_side=short_side))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> dict[str, Any]:
        pictures: list[Tensor] = []
        for path in self.entries[number].media:
            try:
                pictures.append(self.reader.read(path, "image", lambda times: [0]))
            except UnusableVideoError as error:
                return {"number": number, "pictures": [], "problem": (path, str(error))}
        return {"number": number, "pictures": pictures, "problem": None}


def read_pictures(
    task: str,
    entries: Sequence[Entry],
    unread: Unread,
    *,
    batch_size: int,
    reading: Reading,
    full_size: bool = False,
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Go through some examples with their pictures.

    Args:
        task: what for, in messages.
        entries: as many pictures each.
        unread: gets what cannot be read.
        batch_size: examples at a time.
        reading: of pictures.
        full_size: as the files have them, whatever `reading` says.

    Yields:
        Numbers of examples, and their pictures, one example's after the other: uint8
        ``(1, 3, height, width)`` each.

    Raises:
        ValueError: no example has all its pictures.
    """
    loader = DataLoader(
        _Pictures(entries, None if full_size else reading.short_side),
        batch_size=batch_size,
        num_workers=reading.workers,
        collate_fn=_together,
        shuffle=False,
        worker_init_fn=leave_interrupts_to_parent,
    )
    readable = False
    shown = loader if reading.progress is None else reading.progress(loader, desc="read pictures")
    for batch in shown:
        for number, (path, reason) in batch["problems"]:
            for new in unread.skipped.add([(path, reason)]):
                log.warning("skipped: %s", new)
            place = getattr(entries[number], "place", f"entry {number}")
            unread.left_out.append(f"{place}: {reason}")
        if batch["numbers"]:
            readable = True
            yield batch["numbers"], batch["pictures"]
    if not readable:
        raise ValueError(f"{task}: no picture could be read; the first: {unread.skipped.first()}")


def _together(examples: Sequence[dict[str, Any]]) -> Batch:
    usable = [example for example in examples if example["problem"] is None]
    return Batch(
        numbers=[example["number"] for example in usable],
        pictures=[picture for example in usable for picture in example["pictures"]],
        problems=[(e["number"], e["problem"]) for e in examples if e["problem"] is not None],
    )

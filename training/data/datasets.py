"""Corpora as datasets: what a training step or an evaluation reads, and what it had to skip."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from svitt_ops.training.data.annotations import Entry, Kind
from svitt_ops.training.data.columns import FileNames, Item, Items
from svitt_ops.training.data.features import read_features
from svitt_ops.training.data.sampling import sample_positions
from svitt_ops.training.data.video import Choose, UnusableVideoError, read_frames

MAX_REPLACEMENTS = 20
Key = tuple[int, int]  # (number of the item, epoch): a batch sampler yields lists of these


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """How the frames of a clip are chosen and read."""

    num_frames: int
    mode: str = "rand"
    """"rand", "middle" or "fpsX": `sampling.sample_positions`."""
    official: bool = False
    short_side: int | None = None
    features: int | None = None
    """Width of given features, which videos' files hold in the place of frames; None: frames."""
    cache: bool = False
    """Keep every decoded video in memory, of each worker: for corpora that fit."""


@dataclass
class Clip:
    """One item, read: what the collator makes a batch of."""

    frames: Tensor  # uint8 (frames, 3, height, width), or given features, fp32 (frames, width)
    caption: str
    pair_id: int
    seed: int  # of this item in this epoch; augmentation and masking draw from it
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is said of it, which must be true of the mirrored clip too."""
        return (self.caption,)


class FrameReader:
    """Reads clips as a `ClipSpec` says, from files or from its cache of decoded videos."""

    def __init__(self, spec: ClipSpec) -> None:
        self.spec = spec
        self._videos: dict[str, Tensor | str] = {}  # or why there is none

    def read(self, path: str, kind: Kind, choose: Choose) -> Tensor:
        """The chosen frames of a video, or their features, or the one picture of an image."""
        if self.spec.features:
            return read_features(path, choose, self.spec.features)
        if kind == "image":
            choose = _first
        if not self.spec.cache:
            return read_frames(path, choose, short_side=self.spec.short_side)
        if path not in self._videos:
            self._videos[path] = self._decode(path)
        video = self._videos[path]
        if isinstance(video, str):
            raise UnusableVideoError(video)
        # The cache keeps no times; as 1 frame a second they serve every mode but "fpsX".
        return video[list(choose(range(len(video))))]

    def _decode(self, path: str) -> Tensor | str:
        try:
            return read_frames(path, short_side=self.spec.short_side)
        except UnusableVideoError as error:
            return str(error)


class PairDataset(Dataset[Clip]):
    """Video-text and image-text pairs to train on.

    `dataset[number, epoch]` depends on the two numbers and the seed alone, so any number of
    workers, processes and restarts reads the same. An unusable file is replaced by another of its
    kind, and named in the clip's `skipped`. Of the corpus it holds a few buffers (`columns`), so
    memory does not grow with the workers.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        spec: ClipSpec,
        *,
        seed: int = 0,
        positives: str = "video",
    ) -> None:
        """Args:
        entries: what the annotation files say; one with several files becomes several pairs.
        spec: how clips are read.
        seed: of every choice.
        positives: pairs with the same "video", or with the same "caption", are each other's
            positives.
        """
        if positives not in ("video", "caption"):
            raise ValueError(f"positives: must be 'video' or 'caption', got {positives!r}")
        if spec.cache and spec.mode.startswith("fps"):
            raise ValueError("cache: holds no times, so sampling cannot be 'fpsX'")
        self.items = Items(entries)
        self.spec = spec
        self.seed = seed
        self.positives = positives
        self.reader = FrameReader(spec)
        name_of = FileNames()
        ids: dict[str, int] = {}
        names = map(name_of, self.items.paths) if positives == "video" else self.items.captions
        # Of each path, or of each caption: what it shares with its positives.
        self._ids = np.fromiter((ids.setdefault(name, len(ids)) for name in names), np.int64)
        self._of_kind: dict[Kind, NDArray[np.int64]] = {
            "video": np.flatnonzero(~self.items.is_image),
            "image": np.flatnonzero(self.items.is_image),
        }

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> Clip:
        number, epoch = key
        skipped: list[tuple[str, str]] = []
        rng = random.Random(f"{self.seed} {epoch} {self.draws_as(number)}")
        others = self._of_kind[self.items[number].kind]
        for _ in range(MAX_REPLACEMENTS):
            try:
                return self.read(number, rng.getrandbits(48), skipped)
            except UnusableVideoError as error:
                skipped.append((self.items.paths[number], str(error)))
            number = int(rng.choice(others))
        raise ValueError(
            f"{len(skipped)} files in a row could not be read; the last: {skipped[-1][1]}"
        )

    def draws_as(self, number: int) -> int:
        """Items for which this is equal make the same random choices in an epoch."""
        return number

    def read(self, number: int, seed: int, skipped: list[tuple[str, str]]) -> Clip:
        """One item's clip; an `UnusableVideoError` if there is none."""
        rng = random.Random(seed)
        item, spec = self.items[number], self.spec
        which = rng.choice(range(len(item.captions)))

        def choose(times: Sequence[float]) -> list[int]:
            return sample_positions(times, spec.num_frames, spec.mode, rng, official=spec.official)

        frames = self.reader.read(item.path, item.kind, choose)
        place = number
        if self.positives == "caption":
            place = self.items.first_caption[self.items.entry[number]] + which
        pair_id = int(self._ids[place])
        return Clip(frames, item.captions[which], pair_id, rng.getrandbits(48), skipped)


class GlobalBatches:
    """The batches of one process, from any step on: a batch sampler without an end.

    Each epoch's permutation is cut into global batches, of which every process takes its slice.
    So the union over the processes does not depend on their number. Items that are to stay
    together follow each other: they share a batch if its size is a multiple of theirs. Videos and
    images come in batches of their own, and what fills no batch is left out of the epoch.
    """

    def __init__(
        self,
        items: Sequence[Item],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        """Args:
        items: of the dataset.
        batch_size: of all processes together.
        seed: of the order.
        rank: of this process.
        world_size: processes.
        start: batches to pass over.
        """
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size: must be a multiple of the {world_size} processes, got {batch_size}"
            )
        self.items = items
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        columns = items if isinstance(items, Items) else Items.of(items)
        self._bundles = _Bundles(columns)
        counts = np.bincount(columns.is_image, minlength=2)
        self.batches_per_epoch = int((counts // batch_size).sum())
        if not self.batches_per_epoch:
            raise ValueError(
                f"batch_size: must not exceed the pairs of the corpus, got {batch_size} for"
                f" {len(items)}"
            )

    def __iter__(self) -> Any:
        share = self.batch_size // self.world_size
        epoch, skip = divmod(self.start, self.batches_per_epoch)
        while True:
            for batch in self.epoch(epoch)[skip:]:
                mine = batch[self.rank * share : (self.rank + 1) * share]
                yield [(number, epoch) for number in mine]
            epoch, skip = epoch + 1, 0

    def epoch(self, epoch: int) -> list[list[int]]:
        """All global batches of an epoch."""
        rng = random.Random(f"{self.seed} order {epoch}")
        shuffled = list(range(len(self._bundles)))
        rng.shuffle(shuffled)
        order = np.array(shuffled, dtype=np.int64)
        batches: list[list[int]] = []
        for kind in get_args(Kind):
            numbers = self._bundles.numbers(order, kind)
            whole = len(numbers) // self.batch_size * self.batch_size
            batches += numbers[:whole].reshape(-1, self.batch_size).tolist()
        rng.shuffle(batches)
        return batches


class _Bundles:
    """Which items stay together, numbered in the order of their first ones."""

    def __init__(self, items: Items) -> None:
        count = len(items)
        # Videos and images of one name are two bundles, an item that stands alone is one.
        together = count + 2 * items.bundle + items.is_image
        keys = np.where(items.bundle < 0, np.arange(count), together)
        _, first, bundles = np.unique(keys, return_index=True, return_inverse=True)
        bundles = np.argsort(np.argsort(first))[bundles]
        self.is_image = items.is_image[np.sort(first)]
        self.sizes = np.bincount(bundles)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.members = np.argsort(bundles, kind="stable")

    def __len__(self) -> int:
        return len(self.sizes)

    def numbers(self, order: NDArray[np.int64], kind: Kind) -> NDArray[np.int64]:
        """The items of the bundles of a kind, in this order of the bundles."""
        order = order[self.is_image[order] == (kind == "image")]
        sizes = self.sizes[order]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        found: NDArray[np.int64] = self.members[np.repeat(self.starts[order], sizes) + within]
        return found


@dataclass
class SkipLog:
    """Files that could not be read, by path, with the reason and how often it was met."""

    reasons: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, skipped: Sequence[tuple[str, str]]) -> list[str]:
        """Count; returns the reasons met for the first time."""
        new = []
        for path, reason in skipped:
            if path not in self.reasons:
                self.reasons[path] = reason
                new.append(reason)
            self.counts[path] = self.counts.get(path, 0) + 1
        return new

    def summary(self) -> str:
        files = len(self.reasons)
        if not files:
            return "no file was skipped"
        return (
            f"{files} unusable file{'s' * (files > 1)} skipped, {sum(self.counts.values())} times"
        )

    def first(self) -> str:
        """The first reason."""
        return next(iter(self.reasons.values()), "none")

    def write(self, path: Path) -> None:
        """One line per file: how often, and why."""
        lines = [f"{self.counts[name]}\t{reason}\n" for name, reason in self.reasons.items()]
        # Names of files may hold bytes that are no text.
        path.write_text("".join(sorted(lines)), encoding="utf-8", errors="backslashreplace")


def _first(times: Sequence[float]) -> list[int]:
    return [0]

"""Test corpora: videos and texts to find each other, and how their clips are read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from svitt_ops.training.data.annotations import Entry, Kind
from svitt_ops.training.data.columns import FileNames
from svitt_ops.training.data.datasets import ClipSpec, FrameReader
from svitt_ops.training.data.sampling import FrameOrder, reorder, sample_positions, split_clips
from svitt_ops.training.data.transport import Batch
from svitt_ops.training.data.video import UnusableVideoError


@dataclass
class Gallery:
    """Videos and texts; those of the same group describe each other."""

    videos: list[str] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    video_groups: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    text_groups: list[int] = field(default_factory=list)

    def without(self, unusable: Sequence[int]) -> Gallery:
        """Without some videos, by number, and without the texts that this leaves alone."""
        gone = set(unusable)
        kept = [k for k in range(len(self.videos)) if k not in gone]
        groups = {self.video_groups[k] for k in kept}
        texts = [k for k, group in enumerate(self.text_groups) if group in groups]
        return replace(
            self,
            videos=[self.videos[k] for k in kept],
            kinds=[self.kinds[k] for k in kept],
            video_groups=[self.video_groups[k] for k in kept],
            texts=[self.texts[k] for k in texts],
            text_groups=[self.text_groups[k] for k in texts],
        )


def build_gallery(entries: Sequence[Entry]) -> Gallery:
    """Every file once, however it is spelled; entries that share a file are one group."""
    gallery = Gallery()
    group_of: dict[str, int] = {}
    name_of = FileNames()
    for entry in entries:
        names: dict[str, str] = {}
        for path in entry.media:
            names.setdefault(name_of(path), path)
        shared = {group_of[name] for name in names if name in group_of}
        group = min(shared, default=len(group_of))
        if len(shared) > 1:  # this entry joins groups
            for groups in (gallery.video_groups, gallery.text_groups):
                groups[:] = [group if g in shared else g for g in groups]
            group_of = {name: group if g in shared else g for name, g in group_of.items()}
        for name, path in names.items():
            if name not in group_of:
                gallery.videos.append(path)
                gallery.kinds.append(entry.kind)
                gallery.video_groups.append(group)
                group_of[name] = group
        gallery.texts += entry.captions
        gallery.text_groups += [group] * len(entry.captions)
    if len(set(gallery.kinds)) > 1:
        raise ValueError("retrieval: test corpora must be all video or all image, got both")
    return gallery


def distinct_videos(entries: Sequence[Entry]) -> tuple[Gallery, list[int]]:
    """Every file once, however it is spelled, without texts; and the number of each entry's first.

    Each is a group of its own.
    """
    gallery = Gallery()
    number_of: dict[str, int] = {}
    name_of = FileNames()
    numbers = []
    for entry in entries:
        path = entry.media[0]
        number = number_of.setdefault(name_of(path), len(number_of))
        numbers.append(number)
        if number == len(gallery.videos):
            gallery.videos.append(path)
            gallery.kinds.append(entry.kind)
            gallery.video_groups.append(number)
    return gallery, numbers


@dataclass
class GalleryClip:
    """The clips of one video, or why there are none."""

    number: int
    frames: Tensor | None  # uint8 (clips, frames, 3, height, width), or fp32 (clips, frames, width)
    reason: str = ""


class GalleryClips(Dataset[GalleryClip]):
    """The clips of a gallery's videos, in its order."""

    def __init__(
        self,
        gallery: Gallery,
        num_frames: int,
        *,
        num_clips: int = 1,
        strided: bool = False,
        short_side: int | None = None,
        order: FrameOrder = "normal",
        seed: int = 0,
        task: str = "retrieval",
        features: int | None = None,
        sampling: str = "middle",
    ) -> None:
        """Args:
        gallery: which videos.
        num_frames: of a clip.
        num_clips: of a video; their frames are drawn together, then split.
        strided: clips take every `num_clips`-th frame, instead of following each other.
        short_side: as in `ClipSpec`.
        order: of the frames of each clip, see `sampling.reorder`.
        seed: of shuffled orders.
        task: what for, in messages.
        features: as in `ClipSpec`.
        sampling: which frames make a clip, a mode of `sampling.sample_positions`.
        """
        self.gallery = gallery
        self.num_frames = num_frames
        self.num_clips = num_clips
        self.strided = strided
        self.order = order
        self.seed = seed
        self.task = task
        self.sampling = sampling
        self.reader = FrameReader(
            ClipSpec(num_frames=num_frames, mode="middle", short_side=short_side, features=features)
        )

    def __len__(self) -> int:
        return len(self.gallery.videos)

    def __getitem__(self, number: int) -> GalleryClip:
        kind = self.gallery.kinds[number]
        rng = random.Random(f"{self.seed} {number}")

        def choose(times: Sequence[float]) -> list[int]:
            total = self.num_frames * self.num_clips
            positions = sample_positions(times, total, self.sampling)
            chosen = []
            for clip in split_clips(positions, self.num_clips, strided=self.strided):
                chosen += [clip[k] for k in reorder(self.num_frames, self.order, rng)]
            return chosen

        try:
            frames = self.reader.read(self.gallery.videos[number], kind, choose)
        except UnusableVideoError as error:
            return GalleryClip(number, None, str(error))
        if kind == "image":
            return GalleryClip(number, frames[None])
        return GalleryClip(number, frames.unflatten(0, (self.num_clips, self.num_frames)))


def stack_clips(clips: Sequence[GalleryClip]) -> Batch:
    """All frames of some videos' clips, one tensor where sizes agree.

    Returns:
        ``numbers`` of the videos that could be read; ``frames`` of their clips, video by video;
        ``unusable``: number and reason of the others.
    """
    usable = [clip for clip in clips if clip.frames is not None]
    frames = [frame for clip in usable for frame in clip.frames]  # type: ignore[union-attr]
    same = len({f.shape for f in frames}) == 1
    return Batch(
        numbers=[clip.number for clip in usable],
        frames=torch.stack(frames) if same else frames,
        unusable=[(clip.number, clip.reason) for clip in clips if clip.frames is None],
    )

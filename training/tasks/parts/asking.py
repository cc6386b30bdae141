"""What is asked of videos one by one, several questions of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from svitt_ops.training.data.annotations import Entry
from svitt_ops.training.data.datasets import SkipLog
from svitt_ops.training.data.sampling import FrameOrder
from svitt_ops.training.tasks.parts.encoding import encode_clips
from svitt_ops.training.tasks.parts.evaluation import ClipEvaluation, Reading
from svitt_ops.training.tasks.parts.gallery import GalleryClips, distinct_videos

One = TypeVar("One", bound=Entry)


class Asking:
    """Goes through the videos of some entries, of which each is read and encoded once.

    Only the states of some videos are held at a time, however many there are.
    """

    def __init__(
        self, task: str, entries: Sequence[Entry], settings: ClipEvaluation, reading: Reading
    ) -> None:
        self.task = task
        self.settings = settings
        self.reading = reading
        self.gallery, self._video_of = distinct_videos(entries)
        self.skipped = SkipLog()

    def __call__(
        self, model: Any, order: FrameOrder, texts: int = 1, *, seed: int = 0
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers of entries, and the states of their clips.

        Args:
            model: has `encode_video`.
            order: of the frames, see `sampling.reorder`.
            texts: of an entry, so that no more than `batch_size` pairs come at a time.
            seed: of shuffled orders.

        Yields:
            Some entries, and a tensor ``(entries, clips, tokens, width)``.
        """
        settings, reading = self.settings, self.reading
        about: dict[int, list[int]] = {}
        for number, video in enumerate(self._video_of):
            about.setdefault(video, []).append(number)
        clips = GalleryClips(
            self.gallery,
            model.config.num_frames,
            num_clips=settings.clips,
            strided=settings.strided,
            short_side=reading.short_side,
            order=order,
            seed=seed,
            task=self.task,
            sampling=reading.test_sampling,
        )
        for videos, output in encode_clips(
            model,
            clips,
            self.skipped,
            batch_size=settings.batch_size,
            workers=reading.workers,
            progress=reading.progress,
            resize=reading.resize,
        ):
            states = output.states.unflatten(0, (len(videos), -1))
            rows = [(row, k) for row, video in enumerate(videos) for k in about[video]]
            size = max(1, settings.batch_size // (states.shape[1] * texts))
            for start in range(0, len(rows), size):
                which, those = zip(*rows[start : start + size], strict=True)
                yield list(those), states[list(which)]

    def facts(self) -> dict[str, Any]:
        """How many videos were read, and which could not be."""
        videos = len(self.gallery.videos) - len(self.skipped.reasons)
        return {"videos": videos, "skipped": dict(self.skipped.reasons)}


def those_without(entries: Sequence[One], files: Mapping[str, str]) -> list[One]:
    """The entries about other videos than some."""
    return [entry for entry in entries if entry.media[0] not in files]

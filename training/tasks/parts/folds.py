"""Retrieval in parts of a corpus, such as the five thousands of COCO's test pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from svitt_ops.training.tasks.parts.gallery import Gallery


def fold_gallery(gallery: Gallery, folds: int) -> list[Gallery]:
    """Parts of as many videos each as can be, in the order of the corpus.

    Raises:
        ValueError: there are fewer videos than parts.
    """
    count = len(gallery.videos)
    if not 1 <= folds <= count:
        raise ValueError(f"--folds: must be 1 to {count}, the number of videos, got {folds}")
    parts = [k * folds // count for k in range(count)]
    return [gallery.without([k for k in range(count) if parts[k] != part]) for part in range(folds)]


def mean_of_folds(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `retrieval` finds in all parts: the mean of recalls, the sum of counts; and `folds`."""
    counts = ("videos", "texts", "texts_cut")
    skipped = {path: reason for one in found for path, reason in one["skipped"].items()}
    more = {name: sum(one[name] for one in found) for name in counts} | {"skipped": skipped}
    tables = {name: _mean([one[name] for one in found]) for name in found[0] if name not in more}
    return {**tables, **more, "folds": len(found)}


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers, or of those in tables of one form."""
    if isinstance(values[0], Mapping):
        return {key: _mean([value[key] for value in values]) for key in values[0]}
    return sum(values) / len(values)

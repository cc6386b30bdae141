"""Scores of several clips of a video, merged into one."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Merge = Literal["logsumexp", "mean", "max"]


def merge_clips(scores: Tensor, merge: Merge, dim: int) -> Tensor:
    """Scores without the dimension of the clips.

    Raises:
        ValueError: there is no such way to merge.
    """
    if merge not in get_args(Merge):
        raise ValueError(f"merge must be one of {', '.join(get_args(Merge))}, got {merge!r}")
    if merge == "logsumexp":
        return scores.logsumexp(dim)
    return scores.mean(dim) if merge == "mean" else scores.amax(dim)

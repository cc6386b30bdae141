"""Clips that texts share, and scores of several clips of a video, merged into one."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

Merge = Literal["logsumexp", "mean", "max", "concat"]
"""How clips become one: by their scores, or, "concat", by what a text attends to at once."""


def join_clips(states: Tensor, merge: Merge) -> Tensor:
    """States ``(videos, clips, tokens, dim)`` as texts attend to them: "concat" makes one clip."""
    return states.flatten(1, 2)[:, None] if merge == "concat" else states


def merge_clips(scores: Tensor, merge: Merge, dim: int) -> Tensor:
    """Scores without the dimension of the clips.

    Raises:
        ValueError: there is no such way to merge, or clips that `join_clips` joins are several.
    """
    if merge not in get_args(Merge):
        raise ValueError(f"merge must be one of {', '.join(get_args(Merge))}, got {merge!r}")
    if merge == "concat":
        if scores.shape[dim] != 1:
            raise ValueError(f"merge='concat' must have 1 clip, got {scores.shape[dim]}")
        return scores.squeeze(dim)
    if merge == "logsumexp":
        return scores.logsumexp(dim)
    return scores.mean(dim) if merge == "mean" else scores.amax(dim)


def clips_of_texts(model: nn.Module, states: Tensor, clip_numbers: Tensor, *shape: int) -> Tensor:
    """States ``(*shape, ...)`` of the clips that texts are about.

    Args:
        model: that errors name.
        states: ``(clips, ...)``.
        clip_numbers: int64 ``shape``, places in ``states``.
        shape: the number of texts; and of clips of each, if it may be several.
    """
    if clip_numbers.shape != shape:
        raise ValueError(
            f"{type(model).__name__}: clip_numbers must have shape {shape},"
            f" got {tuple(clip_numbers.shape)}"
        )
    return states[clip_numbers]

"""How well scores agree with people's: Pearson's and Spearman's correlation."""

from __future__ import annotations

from torch import Tensor


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of two vectors, computed in fp64.

    Raises:
        ValueError: there are fewer than two numbers, or all of a vector are equal: there is none.
    """
    if x.shape != y.shape or x.dim() != 1 or len(x) < 2:
        raise ValueError(
            "correlation: must be of two vectors of one length, at least 2, got"
            f" {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if any(bool((v == v[0]).all()) for v in (x, y)):
        raise ValueError(f"correlation: there is none, all {len(x)} numbers of a vector are equal")
    x, y = (v.double() / v.double().abs().max() for v in (x, y))  # else squares may overflow
    x, y = (v - v.mean() for v in (x, y))
    return float((x @ y / (x.norm() * y.norm())).clamp(-1, 1))


def spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of the ranks; numbers that tie share the mean of theirs."""
    return pearson(mean_ranks(x), mean_ranks(y))


def mean_ranks(x: Tensor) -> Tensor:
    """Rank, from 1, of each number of a vector, fp64; equal ones have the mean of their ranks."""
    _, which, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]

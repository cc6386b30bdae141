"""Numbers that are not finite are errors: a NaN compares as nothing, and so passes for success."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def check_finite(values: Tensor, what: str, describe: Callable[[int], str]) -> None:
    """Refuse rows with a NaN or an infinity.

    Args:
        values: ``(rows, ...)``.
        what: what the rows are, in the plural.
        describe: what the row of a number is.

    Raises:
        ValueError: how many rows, and which is the first.
    """
    wrong = ~torch.isfinite(values).flatten(1).all(1)
    count = int(wrong.sum())
    if count:
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"{what}: {count} of {len(values)} not finite, the first: {describe(first)};"
            " the model is broken, or its precision too low"
        )

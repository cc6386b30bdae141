"""Given features of videos: NumPy's files, a row for each frame."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from svitt_ops.training.data.files import UnusableVideoError, blame, open_media
from svitt_ops.training.data.video import Choose

HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
KINDS = ("<f2", "<f4", "<f8")


def read_features(path: str | Path, choose: Choose, width: int) -> Tensor:
    """Some rows of a `.npy` file, fp32 ``(frames, width)``; nothing that it holds is run.

    Args:
        path: of an array ``(frames, width)`` of floating numbers.
        choose: given a time for each row, one a second, the rows wanted.
        width: numbers of a row.

    Raises:
        UnusableVideoError: the file is missing, is no such array, or a chosen row is not finite.
    """
    with blame(path):
        with open_media(path) as file:
            content = file.read(0, file.size)
        rows = _array(content, width)
        found = torch.from_numpy(rows[list(choose(range(len(rows))))].astype(np.float32))
        if not found.isfinite().all():
            raise UnusableVideoError("holds NaN or infinity")
        return found


def _array(content: bytes, width: int) -> np.ndarray:
    """The array that a file's content is, without a copy."""
    if not content.startswith(b"\x93NUMPY"):
        raise UnusableVideoError("is no .npy file")
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in HEADERS:
        raise UnusableVideoError(f"is a .npy file of version {version}, not 1.0 or 2.0")
    shape, by_columns, kind = HEADERS[version](stream)
    if kind.str not in KINDS or by_columns:
        raise UnusableVideoError(
            f"must hold floating numbers row by row, got {kind.str}"
            f"{' column by column' if by_columns else ''}"
        )
    if len(shape) != 2 or shape[0] < 1 or shape[1] != width:
        raise UnusableVideoError(f"must have shape (frames, {width}), got {shape}")
    start, count = stream.tell(), math.prod(shape)
    if len(content) - start < count * kind.itemsize:  # before anything is allocated for it
        raise UnusableVideoError("is cut off")
    return np.frombuffer(content, kind, count, start).reshape(shape)

"""Central similarity quantisation: codes of classes, and the losses that lead images to them.

Source: Central similarity quantization for efficient image and video retrieval (CVPR 2020).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from svitt_ops.models.cookie.losses import gathered

SEED = 0
"""Of centres that are drawn."""
TRIES = 1000
SHARPNESS = 10.0
"""Over the bits: the scale of products in the pairwise loss."""


class HashLayer(nn.Sequential):
    """Two hidden layers as wide as the features, then codes in (-1, 1)."""

    def __init__(self, size: int, bits: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(size, size),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(size, size),
            nn.ReLU(),
            nn.Linear(size, bits),
            nn.Tanh(),
        )


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of 1 and -1, ``(size, size)``, whose first row is 1; a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"hadamard: size must be a power of two, got {size}")
    found = torch.ones(1, 1, device="cpu")
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


def hash_centres(bits: int, classes: int, kind: str = "hadamard") -> Tensor:
    """A code of 1 and -1 for each class, far from the others: fp32 ``(classes, bits)``.

    "hadamard": rows of [H; -H], ``bits / 2`` or ``bits`` apart. Of these there are ``2 bits``, and
    none unless ``bits`` is a power of two: where they are too few, and for "random", balanced rows
    are drawn, each as far as can be found from those before.

    Raises:
        ValueError: there are not as many rows.
    """
    if kind == "hadamard" and bits & (bits - 1) == 0 and classes <= 2 * bits:
        rows = hadamard(bits)
        return torch.cat([rows, -rows])[:classes]
    generator = torch.Generator().manual_seed(SEED)
    found = _balanced(1, bits, generator)
    for _ in range(classes - 1):
        drawn = _balanced(TRIES, bits, generator)
        nearest = (bits - drawn @ found.T).amin(1)
        if not nearest.any():
            raise ValueError(
                f"hash_centres: classes must be at most {len(found)} with {bits} bits, of which"
                f" there are no more codes, got {classes}"
            )
        found = torch.cat([found, drawn[nearest.argmax()][None]])
    return found


def _balanced(count: int, bits: int, generator: torch.Generator) -> Tensor:
    """Rows with as many 1 as -1; of an odd number, one more -1."""
    order = torch.rand(count, bits, generator=generator, device="cpu").argsort(1)
    return torch.where(order < bits // 2, 1.0, -1.0)


def hash_targets(centres: Tensor, labels: Tensor, random_centre: Tensor) -> Tensor:
    """The code that an image is led to: the majority of its classes' centres, bit by bit.

    Args:
        centres: ``(classes, bits)`` of 1 and -1.
        labels: ``(batch, classes)``, 1 at the classes of each image; without any it has a NaN.
        random_centre: ``(bits,)`` of 1 and -1, which decides where as many say 1 as -1.
    """
    labels = labels.to(centres.dtype)
    votes = labels @ centres
    found = torch.where(votes == 0, random_centre.to(centres.dtype), votes.sign())
    return found.masked_fill(~(labels.sum(1, keepdim=True) > 0), torch.nan)


def centre_loss(codes: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of codes in (-1, 1) with targets of 1 and -1, over all bits."""
    with torch.autocast(codes.device.type, enabled=False):
        share, wanted = (codes.float() + 1) / 2, (targets.float() + 1) / 2
        # Of a NaN torch's raises an error on CPUs; here the loss is one.
        loss = F.binary_cross_entropy(share.nan_to_num(0.5), wanted.nan_to_num(0.5))
        return loss + 0 * (share + wanted).sum()


def pairwise_loss(codes: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Logistic loss of pairs of the batch's halves, which are similar where they share a class.

    The batch is that of all processes of the group; gradients are as of `triplet_loss`.
    """
    codes, labels = gathered(codes, group), gathered(labels, group)
    half = len(codes) // 2
    if not half:
        raise ValueError(f"pairwise_loss: codes must be of 2 images at least, got {len(codes)}")
    first, second = codes[:half].float(), codes[half:].float()
    similar = (labels[:half].float() @ labels[half:].float().T > 0).float()
    logits = (SHARPNESS / codes.shape[1]) * (first @ second.T)
    return F.binary_cross_entropy_with_logits(logits, similar)


def quantisation_loss(codes: Tensor) -> Tensor:
    """How far codes are from 1 and -1: ``mean((|y| - 1)^2)``."""
    return (codes.float().abs() - 1).square().mean()

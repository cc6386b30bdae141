"""What happens to the colours of pictures while a model is pretrained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distort(images: Tensor, jitter: float, grayscale_rate: float, blur_rate: float) -> Tensor:
    """Images with other brightness and contrast, some of them grey or blurred, each as drawn.

    Args:
        images: ``(batch, 3, h, w)`` or ``(batch, frames, 3, h, w)``, normalised.
        jitter: greatest share by which contrast changes, and, in standard deviations, brightness.
        grayscale_rate: share of images that become grey.
        blur_rate: share of images that are blurred.
    """
    shape = (len(images), *[1] * (images.dim() - 1))

    def drawn() -> Tensor:
        return torch.rand(shape, device=images.device, dtype=torch.float32)

    mean = images.mean((-3, -2, -1), keepdim=True)
    contrast, shift = (jitter * (2 * drawn() - 1) for _ in range(2))
    found = (images - mean) * (1 + contrast) + mean + shift
    gray = found.mean(-3, keepdim=True).expand_as(found)
    found = torch.where(drawn() < grayscale_rate, gray, found)
    weights = found.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (weights[:, None] * weights).expand(3, 1, 5, 5)
    flat = F.pad(found.flatten(0, -4), (2, 2, 2, 2), mode="replicate")
    blurred = F.conv2d(flat, kernel, groups=3).view_as(found)
    return torch.where(drawn() < blur_rate, blurred, found).to(images.dtype)

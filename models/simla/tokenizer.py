"""Discrete variational autoencoders: their tokens are what masked patches are to be.

Source: DALL-E (ICML 2021), whose encoder's weights load; BEiT (ICLR 2022) for its use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svitt_ops.models.parts.unpickling import read_tensors

EDGE = 0.1
"""Pixels from 0 to 1 are mapped to between this and 1 minus this."""
STRIDE = 8
"""Pixels along the side of a token."""


class _Block(nn.Module):
    """A bottleneck of four convolutions beside the stream."""

    def __init__(self, dim: int, out: int, gain: float) -> None:
        super().__init__()
        inner = max(out // 4, 1)
        self.gain = gain
        self.shortcut = nn.Conv2d(dim, out, 1) if dim != out else nn.Identity()
        widths = (dim, inner, inner, inner)
        self.convolutions = nn.ModuleList(nn.Conv2d(w, inner, 3, padding=1) for w in widths[:3])
        self.convolutions.append(nn.Conv2d(inner, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for convolution in self.convolutions:
            branch = convolution(F.relu(branch))
        return cast(Tensor, self.shortcut(x) + self.gain * branch)


class TokenEncoder(nn.Module):
    """DALL-E's encoder: four groups of blocks, between them pooling; 8 pixels a side are a token.

    Args:
        vocab_size: tokens.
        width: of the first group; the others have 2, 4 and 8 times as much.
        depth: blocks of a group.
    """

    def __init__(self, vocab_size: int = 8192, width: int = 256, depth: int = 2) -> None:
        super().__init__()
        gain = 1 / (4 * depth) ** 2
        self.stem = nn.Conv2d(3, width, 7, padding=3)
        self.groups = nn.ModuleList()
        dim = width
        for factor in (1, 2, 4, 8):
            blocks = nn.Sequential()
            for _ in range(depth):
                blocks.append(_Block(dim, factor * width, gain))
                dim = factor * width
            self.groups.append(blocks)
        self.head = nn.Conv2d(dim, vocab_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, vocab_size, h / 8, w / 8)`` of pixels from 0.1 to 0.9."""
        x = self.stem(x)
        for number, group in enumerate(self.groups):
            x = group(x if number == 0 else F.max_pool2d(x, 2))
        return cast(Tensor, self.head(F.relu(x)))


class ImageTokenizer(nn.Module):
    """Visual tokens of images, one for each patch of a model's grid.

    Untrained, it is a random code of what a patch looks like. `forward` is a loss to train it by,
    before a model learns from it; `load_dalle` takes over DALL-E's encoder.

    Args:
        grid_size: patches along a side; images are resized to 8 pixels a patch.
        vocab_size: tokens.
        width: of the encoder's first group, 256 in DALL-E's.
        depth: blocks of a group, 2 in DALL-E's.
        mean: what was subtracted from pixels of 0 to 1.
        std: what they were then divided by.
    """

    def __init__(
        self,
        grid_size: int,
        vocab_size: int = 8192,
        *,
        width: int = 16,
        depth: int = 1,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.grid_size, self.mean, self.std = grid_size, tuple(mean), tuple(std)
        self.encoder = TokenEncoder(vocab_size, width, depth)
        self.codes = nn.Embedding(vocab_size, 4 * width)
        self.decoder = nn.Sequential(
            nn.Conv2d(4 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4 * width, 3 * STRIDE**2, 1),
            nn.PixelShuffle(STRIDE),
        )
        self.apply(start)

    def pixels(self, pixel_values: Tensor) -> Tensor:
        """Images ``(batch, 3, h, w)``, or with one frame, as the encoder reads them."""
        images = pixel_values[:, 0] if pixel_values.dim() == 5 else pixel_values
        size = self.grid_size * STRIDE
        images = F.interpolate(
            images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False
        )
        mean, std = (images.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        return (1 - 2 * EDGE) * (images * std + mean).clamp(0, 1) + EDGE

    @torch.no_grad()
    def tokens(self, pixel_values: Tensor) -> Tensor:
        """The likeliest token of every patch: int64 ``(batch, n)``, row by row."""
        return cast(Tensor, self.encoder(self.pixels(pixel_values)).argmax(1).flatten(1))

    def forward(self, pixel_values: Tensor, temperature: float = 1.0) -> Tensor:
        """How far images are from what is made of their tokens; mean over pixels of 0 to 1.

        Args:
            pixel_values: ``(batch, 3, h, w)``, or with one frame.
            temperature: of the Gumbel softmax that tokens are drawn by.
        """
        pixels = self.pixels(pixel_values)
        drawn = F.gumbel_softmax(self.encoder(pixels), temperature, dim=1)
        made = self.decoder(torch.einsum("bvhw,vd->bdhw", drawn, self.codes.weight))
        return F.l1_loss(made, pixels)


@torch.no_grad()
def start(module: nn.Module) -> None:
    """Draw a module's weights so that its outputs are as large as its inputs.

    Sums of weights are 0, so that what all places have in common does not decide their tokens.
    """
    if isinstance(module, nn.Conv2d):
        weight = module.weight
        nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        weight.sub_(weight.mean((1, 2, 3), keepdim=True))
        nn.init.zeros_(cast(Tensor, module.bias))
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight)


def load_dalle(tokenizer: ImageTokenizer, source: str | Path | Mapping[str, Any]) -> None:
    """Take over the weights of DALL-E's encoder.

    Args:
        tokenizer: changed in place; with ``width=256, depth=2`` and 8192 tokens, as that one has.
        source: the state dict of the published encoder, or a file with it; the published file holds
            the module itself, which is not read here: that would run code.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    found = {_renamed(name): value for name, value in read_tensors(source).items()}
    own = tokenizer.encoder.state_dict()
    for name in sorted(found.keys() | own.keys()):
        sizes = [tuple(x[name].shape) if name in x else None for x in (own, found)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"load_dalle: {name} must have shape {sizes[0]}, got {sizes[1]}")
    tokenizer.encoder.load_state_dict(found)


def dalle_sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Width and depth of an encoder by the names of the published one, as `ImageTokenizer`'s.

    Raises:
        ValueError: there is no such encoder.
    """
    stem = tensors.get("blocks.input.w")
    blocks = {x.split(".")[2] for x in tensors if x.startswith("blocks.group_1.block_")}
    if stem is None or stem.dim() != 4 or not blocks:
        first = next(iter(tensors), None)
        raise ValueError(
            "load_dalle: source must be DALL-E's encoder, with blocks.input.w and"
            f" blocks.group_1.block_1, got {len(tensors)} tensors, the first {first!r}"
        )
    return len(stem), len(blocks)


def _renamed(name: str) -> str:
    """Our name of one of DALL-E's tensors; unknown ones keep theirs."""
    kind = {"w": "weight", "b": "bias"}
    path, _, last = name.rpartition(".")
    last = kind.get(last, last)
    block = re.fullmatch(r"blocks\.group_(\d)\.block_(\d)\.(id_path|res_path\.conv_(\d))", path)
    if path == "blocks.input":
        return f"stem.{last}"
    if path == "blocks.output.conv":
        return f"head.{last}"
    if block is None:
        return name
    inner = "shortcut" if block[4] is None else f"convolutions.{int(block[4]) - 1}"
    return f"groups.{int(block[1]) - 1}.{int(block[2]) - 1}.{inner}.{last}"

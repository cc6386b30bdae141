"""The ResNet below COOKIE's transformers, transformers' own, and its statistics of a batch."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import ResNetModel
from transformers.models.resnet.modeling_resnet import ResNetConvLayer

from svitt_ops.models.cookie.configuration import COOKIEConfig
from svitt_ops.models.parts.layers import renormalized


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the statistics of the batch of all processes, or by frozen ones.

    So the loss of several processes is that of one with their batches together. Unlike torch's
    `SyncBatchNorm` it runs on CPUs too.

    Args:
        channels: of the input.
        frozen: whether training, too, normalises by the running statistics.
    """

    def __init__(self, channels: int, *, frozen: bool = False) -> None:
        super().__init__(channels)
        self.frozen = frozen

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.frozen:
            args = (self.running_mean, self.running_var, self.weight, self.bias)
            return F.batch_norm(x, *args, training=False, eps=self.eps)
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(x)
        return self._by_all(x)

    def _by_all(self, x: Tensor) -> Tensor:
        count = dist.get_world_size() * x.numel() // x.shape[1]
        wide = x.float()
        mean = _SumOverProcesses.apply(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            unbiased = variance * (count / max(count - 1, 1))
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                cast(Tensor, running).lerp_(new, self.momentum or 0.0)
            cast(Tensor, self.num_batches_tracked).add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        found = centred * scale[:, None, None] + self.bias[:, None, None]
        return found.to(x.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class ConvolutionalTower(nn.Module):
    """A ResNet, or a ResNeXt, without pooling and classes.

    Args:
        config: of the model.
    """

    patch_positions: nn.Parameter | None

    def __init__(self, config: COOKIEConfig) -> None:
        super().__init__()
        self.config = config
        self.cnn = ResNetModel(config.resnet())
        self.layers = nn.ModuleList()
        self.register_parameter("patch_positions", None)
        if config.cnn_groups > 1:
            _group_convolutions(self.cnn, config.cnn_groups, config.cnn_group_width)
        for module in list(self.cnn.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    shared = SharedBatchNorm2d(
                        child.num_features, frozen=config.cnn_norm == "frozen"
                    )
                    setattr(module, name, shared)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Features ``(batch, channels, rows, columns)`` of images.

        Args:
            pixel_values: ``(batch, 3, image_size, image_size)`` or ``(batch, 1, 3, ...)``, of mean
                0.5 and deviation 0.5.
        """
        config, size = self.config, self.config.image_size
        images = pixel_values.squeeze(1) if pixel_values.dim() == 5 else pixel_values
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"ConvolutionalTower: pixel_values must have shape (batch, 3, {size}, {size}), "
                f"got {tuple(pixel_values.shape)}"
            )
        images = renormalized(images, config.image_mean, config.image_std)
        return cast(Tensor, self.cnn(images).last_hidden_state)

    def reset_positions(self, device: torch.device | None = None) -> None:
        """Nothing: positions are weights."""


def _group_convolutions(cnn: Any, groups: int, width: int) -> None:
    """Make the bottlenecks those of a ResNeXt, ``groups`` groups of ``width`` doubled by stages."""
    conv: Any = ResNetConvLayer
    for number, stage in enumerate(cnn.encoder.stages):
        inner = groups * width * 2**number
        for layer in stage.layers:
            first, middle, last = (part.convolution for part in layer.layer)
            layer.layer[0] = conv(first.in_channels, inner, kernel_size=1)
            layer.layer[1] = conv(inner, inner)
            layer.layer[1].convolution = nn.Conv2d(
                inner, inner, 3, middle.stride, 1, groups=groups, bias=False
            )
            layer.layer[2] = conv(inner, last.out_channels, kernel_size=1, activation=None)

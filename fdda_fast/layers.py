"""Modules of networks that compute by this library's operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import ops
from .quantization.modules import QuantConv2d
from .stem import FrozenStem


def convolved(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """What `conv` makes of x with that weight, by `ops.conv3x3` where it fits."""
    if not Conv3x3.fits(conv):
        return conv._conv_forward(x, weight, conv.bias)
    # The layout that forward and backward read: one copy instead of two.
    y = ops.conv3x3(x, weight.contiguous(memory_format=torch.channels_last))
    return y if conv.bias is None else y + conv.bias.to(y.dtype)[:, None, None]


class Conv3x3(nn.Module):
    """A Conv2d or QuantConv2d by `ops.conv3x3`; its parameters stay shared.

    Args:
        conv: for which `fits` holds.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return (
            type(module) in (nn.Conv2d, QuantConv2d)
            and module.kernel_size == (3, 3)
            and module.stride == module.padding == module.dilation == (1, 1)
            and module.groups == 1
            and module.padding_mode == "zeros"
        )

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        weight = conv.quantized_weight() if isinstance(conv, QuantConv2d) else conv.weight
        return convolved(conv, x, weight)


class MaxPool2d(nn.Module):
    """An nn.MaxPool2d by `ops.max_pool2d`.

    Args:
        pool: for which `fits` holds.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.windows = (
            pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        )  # fmt: skip

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return type(module) is nn.MaxPool2d and not module.return_indices

    def forward(self, x: Tensor) -> Tensor:
        return ops.max_pool2d(x, *self.windows)


Layer = type[Conv3x3 | MaxPool2d | FrozenStem]
LAYERS: tuple[Layer, ...] = (MaxPool2d, Conv3x3)
"""For networks of any dtype, trained or not."""


def use_layers(network: nn.Module, kinds: Sequence[Layer]) -> None:
    """Puts the first of `kinds` that fits in the place of every module."""
    for name, module in list(network.named_modules()):
        kind = next((k for k in kinds if k.fits(module)), None)
        if kind is not None:
            network.set_submodule(name, kind(module))

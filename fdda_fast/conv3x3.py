"""Conv2d modules that compute by `ops.conv3x3`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .quantization.modules import QuantConv2d


class Conv3x3(nn.Module):
    """A float32 Conv2d or QuantConv2d by `ops.conv3x3`; its parameters stay shared.

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
        # The layout that forward and backward read: one copy instead of two.
        y = ops.conv3x3(x, weight.contiguous(memory_format=torch.channels_last))
        return y if conv.bias is None else y + conv.bias[:, None, None]


def use_conv3x3(network: nn.Module) -> None:
    """Puts a Conv3x3 in the place of every layer that fits."""
    for name, module in list(network.named_modules()):
        if Conv3x3.fits(module):
            network.set_submodule(name, Conv3x3(module))

"""Gradient of a strided convolution of few channels, the images', in one dense convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW_CHANNELS = 4


class FrozenStem(nn.Module):
    """A strided Conv2d without weight gradients, whose input gradient is quick.

    Every phase of the gradient, pixels (stride * i + p, stride * j + q), is a convolution of
    grad_y with the taps that fall on it: one convolution with channels * stride^2 outputs makes
    all, where libraries scatter into a few channels at a time.

    Args:
        conv: for which `fits` holds.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = conv.stride[0], conv.padding[0]

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Conv2d)
            and module.in_channels <= _FEW_CHANNELS
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and module.dilation == (1, 1)
            and all(len(set(pair)) == 1 for pair in (module.stride, module.padding))
            and module.kernel_size[0] == module.kernel_size[1] > module.stride[0] > 1
        )

    def forward(self, x: Tensor) -> Tensor:
        return _StemConvolution.apply(x, self.weight, self.bias, self.stride, self.padding)


class _StemConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(weight)
        ctx.size, ctx.stride, ctx.padding = x.shape[2:], stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad_y):
        (weight,) = ctx.saved_tensors
        return stem_gradient(grad_y, weight, ctx.size, ctx.stride, ctx.padding), *[None] * 4


def stem_gradient(
    grad_y: Tensor, weight: Tensor, size: torch.Size, stride: int, padding: int
) -> Tensor:
    """grad_y [N, O, h, w], weight [O, C, K, K] -> gradient [N, C, *size], channels_last."""
    taps, lowest, highest = _phases(weight, stride, padding)
    blocks = [-(-length // stride) for length in size]
    margin = max(
        0,
        -lowest,
        *(highest + n - rows for n, rows in zip(blocks, grad_y.shape[2:], strict=True)),
    )
    y = F.conv2d(grad_y, taps.contiguous(memory_format=torch.channels_last), padding=margin)
    first = lowest + margin
    y = y[:, :, first : first + blocks[0], first : first + blocks[1]].permute(0, 2, 3, 1)
    pixels = y.unflatten(3, (stride, stride, -1)).transpose(2, 3)  # [N, i, p, j, q, C]
    grad_x = pixels.flatten(1, 2).flatten(2, 3)
    return grad_x[:, : size[0], : size[1]].permute(0, 3, 1, 2)


def _phases(weight: Tensor, stride: int, padding: int) -> tuple[Tensor, int, int]:
    """[stride^2 * C, O, T, T]; tap t reads grad_y at i + lowest + t. And lowest, highest."""
    outputs, channels, size, _ = weight.shape
    lowest = -((size - 1 - padding) // stride)
    highest = (stride - 1 + padding) // stride
    taps = weight.new_zeros(stride, stride, channels, outputs, *[highest - lowest + 1] * 2)
    for k in range(size):
        for m in range(size):
            p, q = (k - padding) % stride, (m - padding) % stride
            u, v = (p + padding - k) // stride, (q + padding - m) // stride
            taps[p, q, :, :, u - lowest, v - lowest] = weight[:, :, k, m].t()
    return taps.flatten(0, 2), lowest, highest

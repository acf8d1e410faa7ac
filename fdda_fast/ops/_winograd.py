"""CPU implementation of conv3x3: Winograd's F(4x4, 3x3), 36 products where 144 would do.

Tiles of 6 x 6 pixels and the filters are transformed to 36 positions, at each of which one matrix
product over the channels makes the transform of 4 x 4 outputs. The gradient of x is the convolution
with the filters rotated; that of the weights is the exact adjoint. The products run in the
library's GEMM, a group of tiles at a time, so that what is transformed stays in cache;
csrc/cpu/winograd.cpp transforms.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fdda_fast.ops._layout import nhwc

# Tiles a matrix product takes at most. Measured: 256 to 512 differ little. The weights' gradient
# sums that many; libraries were seen to split longer sums by the number of threads.
TILES = 512


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    return _convolution(x, _positions(weight).transpose(1, 2))


@torch.no_grad()
def conv3x3_input_gradient(grad_y: Tensor, weight: Tensor) -> Tensor:
    return _convolution(grad_y, _positions(weight, rotated=True))


@torch.no_grad()
def conv3x3_weight_gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    x, grad_y = nhwc(x), nhwc(grad_y)
    outputs, inputs = grad_y.shape[3], x.shape[3]
    total = x.new_zeros(36, outputs, inputs)
    x_memory, grad_memory = _Memory(x), _Memory(grad_y)
    for first, count in _groups(x):
        values, grads = x_memory.positions(count), grad_memory.positions(count)
        torch.ops.fdda._winograd_input(x, values, first)
        torch.ops.fdda._winograd_gradient(grad_y, grads, first)
        total.baddbmm_(grads.transpose(1, 2), values)
    grad_weight = x.new_empty(outputs, 3, 3, inputs)
    torch.ops.fdda._winograd_weight_gradient(total, grad_weight)
    return grad_weight.permute(0, 3, 1, 2)


def _convolution(x: Tensor, weights: Tensor) -> Tensor:
    """weights: [36, inputs, outputs]"""
    x = nhwc(x)
    y = x.new_empty(*x.shape[:3], weights.shape[2])
    x_memory, y_memory = _Memory(x), _Memory(y)
    for first, count in _groups(x):
        values, products = x_memory.positions(count), y_memory.positions(count)
        torch.ops.fdda._winograd_input(x, values, first)
        torch.bmm(values, weights, out=products)
        torch.ops.fdda._winograd_output(products, y, first)
    return y.permute(0, 3, 1, 2)


def _positions(weight: Tensor, rotated: bool = False) -> Tensor:
    """[36, outputs, inputs] of [outputs, inputs, 3, 3]"""
    outputs, inputs = weight.shape[:2]
    positions = weight.new_empty(36, outputs, inputs)
    torch.ops.fdda._winograd_weights(nhwc(weight), positions, rotated)
    return positions


def _groups(x: Tensor) -> list[tuple[int, int]]:
    """First tile and number of tiles, in nearly equal shares, by the shape alone."""
    batch, height, width, _ = x.shape
    tiles = batch * -(-height // 4) * -(-width // 4)
    groups = -(-tiles // TILES)
    edges = [tiles * k // groups for k in range(groups + 1)] if groups else []
    return [(first, end - first) for first, end in itertools.pairwise(edges)]


class _Memory:
    """Positions of the groups' tiles of x [N, H, W, C]: fresh pages would cost more than a pass."""

    def __init__(self, x: Tensor) -> None:
        self.channels = x.shape[3]
        most = max((count for _, count in _groups(x)), default=0)
        self.memory = x.new_empty(36 * most * self.channels)

    def positions(self, count: int) -> Tensor:
        return self.memory[: 36 * count * self.channels].view(36, count, self.channels)

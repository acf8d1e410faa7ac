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
    groups = tile_groups(x, TILES)
    x_memory, grad_memory = (TileMemory(t, groups, 36) for t in (x, grad_y))
    for first, count in groups:
        values, grads = (m.of(count).view(36, count, -1) for m in (x_memory, grad_memory))
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
    groups = tile_groups(x, TILES)
    x_memory, y_memory = (TileMemory(t, groups, 36) for t in (x, y))
    for first, count in groups:
        values, products = (m.of(count).view(36, count, -1) for m in (x_memory, y_memory))
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


def winograd_pays(x: Tensor, weight: Tensor, channels: int, pixels: int) -> bool:
    """Whether [N, C, H, W] has so many pixels, and the filters so many channels.

    With fewer channels the transforms, with fewer pixels those of the weights cost more than the
    products saved; and what lies beyond the image is computed, too.
    """
    batch, _, height, width = x.shape
    computed = 16 * batch * -(-height // 4) * -(-width // 4)
    enough = batch * height * width >= max(pixels, computed / 2)
    return enough and min(weight.shape[:2]) >= channels


def tile_groups(x: Tensor, most: int) -> list[tuple[int, int]]:
    """First tile and number of tiles, in nearly equal shares, by the shape [N, H, W, C] alone."""
    batch, height, width, _ = x.shape
    tiles = batch * -(-height // 4) * -(-width // 4)
    groups = -(-tiles // most)
    edges = [tiles * k // groups for k in range(groups + 1)] if groups else []
    return [(first, end - first) for first, end in itertools.pairwise(edges)]


class TileMemory:
    """`parts` pixels of x [N, H, W, C] for every tile of a group, each group after the other.

    Fresh pages would cost more than a pass.
    """

    def __init__(self, x: Tensor, groups: list[tuple[int, int]], parts: int) -> None:
        self.size = parts * x.shape[3]
        self.memory = x.new_empty(self.size * max((count for _, count in groups), default=0))

    def of(self, count: int) -> Tensor:
        return self.memory[: self.size * count]

"""CPU implementation of conv3x3: Winograd's F(4x4, 3x3), 36 products where 144 would do.

That is float32's; bfloat16 has its own in _winograd_bfloat16.py.

Tiles of 6 x 6 pixels and the filters are transformed to 36 positions, at each of which one matrix
product over the channels makes the transform of 4 x 4 outputs. The gradient of x is the convolution
with the filters rotated; that of the weights is the exact adjoint. The products run in a
GEMM (_products.py), a group of tiles at a time, so that what is transformed stays in cache;
csrc/cpu/winograd.cpp transforms.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fdda_fast.ops import _winograd_bfloat16
from fdda_fast.ops._layout import nhwc
from fdda_fast.ops._products import add_products, multiply

# Tiles a matrix product takes at most. Measured: 256 to 512 differ little. The weights' gradient
# sums that many; libraries were seen to split longer sums by the number of threads.
TILES = 512


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16:
        return _winograd_bfloat16.conv3x3(x, weight)
    return _convolution(x, _positions(weight).transpose(1, 2))


@torch.no_grad()
def conv3x3_input_gradient(grad_y: Tensor, weight: Tensor) -> Tensor:
    if grad_y.dtype == torch.bfloat16:
        return _winograd_bfloat16.conv3x3_input_gradient(grad_y, weight)
    return _convolution(grad_y, _positions(weight, rotated=True))


@torch.no_grad()
def conv3x3_weight_gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16:
        return _winograd_bfloat16.conv3x3_weight_gradient(grad_y, x)
    x, grad_y = nhwc(x), nhwc(grad_y)
    outputs, inputs = grad_y.shape[3], x.shape[3]
    total = x.new_zeros(36, outputs, inputs)
    for first, values, grads in tile_groups(x, grad_y, TILES, 36):
        grads = grads.view(*values.shape[:2], outputs)
        torch.ops.fdda._winograd_input(x, values, first)
        torch.ops.fdda._winograd_gradient(grad_y, grads, first)
        add_products(grads.transpose(1, 2), values, total)
    grad_weight = x.new_empty(outputs, 3, 3, inputs)
    torch.ops.fdda._winograd_weight_gradient(total, grad_weight)
    return grad_weight.permute(0, 3, 1, 2)


def _convolution(x: Tensor, weights: Tensor) -> Tensor:
    """weights: [36, inputs, outputs]"""
    x = nhwc(x)
    y = x.new_empty(*x.shape[:3], weights.shape[2])
    for first, values, products in tile_groups(x, y, TILES, 36):
        products = products.view(*values.shape[:2], y.shape[3])
        torch.ops.fdda._winograd_input(x, values, first)
        multiply(values, weights, products)
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


def tile_groups(
    x: Tensor, y: Tensor, most: int, products: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Tiles of x [N, H, W, Cx], at most so many at a time, in nearly equal shares.

    By the shape alone. Groups share their memory: fresh pages would cost more than a pass.

    Yields:
        The first tile, memory for its group's positions [36, tiles, Cx], and for their products,
        flat [products * tiles * Cy], with the channels of y [..., Cy].
    """
    batch, height, width, channels = x.shape
    tiles = batch * -(-height // 4) * -(-width // 4)
    groups = -(-tiles // most)
    largest = -(-tiles // max(1, groups))
    x_memory = x.new_empty(36 * largest * channels)
    y_memory = y.new_empty(products * largest * y.shape[3])
    for k in range(groups):
        first = tiles * k // groups
        count = tiles * (k + 1) // groups - first
        positions = x_memory[: 36 * count * channels].view(36, count, channels)
        yield first, positions, y_memory[: products * count * y.shape[3]]

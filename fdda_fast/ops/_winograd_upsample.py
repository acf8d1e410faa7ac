"""CPU implementation of upsample_conv3x3 in float32: Winograd, 81 products where 576 would do.

These make 8 x 8 outputs; _nine_products.py has 144. A tile of 6 x 6 pixels is transformed to 36
positions. The filters that make the even outputs and those that make the odd ones coincide at some
of them, so that 9 positions meet one product, 18 two and 9 four. All gradients are the exact
adjoints. The products run in a GEMM (_products.py), a group of tiles at a time, so that what is
transformed stays in cache; csrc/cpu/winograd_upsample.cpp transforms.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fdda_fast.ops import _nine_products, _winograd_bfloat16
from fdda_fast.ops._layout import nhwc
from fdda_fast.ops._products import add_products, multiply
from fdda_fast.ops._strips import Strip, strips_of
from fdda_fast.ops._winograd import tile_groups, winograd_pays

TILES = 160  # a matrix product takes at most; measured: 96 to 192 differ little, 256 is slower
# Positions that meet as many products.
_POSITIONS = {1: 9, 2: 18, 4: 9}
_TILE = 4  # pixels of x, from one tile to the next
_CENTER = 4  # the product that every output has, once


def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if _winograd_bfloat16.pays(x, weight):
        return _winograd_bfloat16.upsample_conv3x3(x, weight, bias)
    if not upsample_pays(x, weight):
        return _nine_products.upsample_conv3x3(x, weight, bias)
    x = nhwc(x)
    batch, height, width, _ = x.shape
    y = x.new_empty(batch, 2 * height, 2 * width, len(weight))
    for first, products in tile_products(x, weight, bias, y):
        torch.ops.fdda._winograd_upsample_output(products, y, first)
    return y.permute(0, 3, 1, 2)


def tile_products(
    x: Tensor, weight: Tensor, bias: Tensor, y: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """The first tile of every group, and its products [81 * tiles * Cout].

    Of a dense x [N, H, W, Cin], for y [N, 2 * H, 2 * W, Cout].
    """
    weights = _weights(weight)
    for first, values, products in tile_groups(x, y, TILES, 81):
        _multiply(x, weights, bias, first, values, products)
        yield first, products


def strip_products(x: Tensor, weight: Tensor, bias: Tensor) -> Iterator[tuple[Strip, Tensor]]:
    """The same for strips of the result that are whole rows of tiles."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // _TILE), -(-width // _TILE)
    weights = _weights(weight)
    parts = strips_of(batch, rows, TILES // columns)
    most = max((part.images * (part.row_end - part.row) for part in parts), default=0) * columns
    values_memory = x.new_empty(36 * most * channels)
    products_memory = x.new_empty(81 * most * len(weight))
    for part in parts:
        tiles = part.images * (part.row_end - part.row) * columns
        values = values_memory[: 36 * tiles * channels].view(36, tiles, channels)
        products = products_memory[: 81 * tiles * len(weight)]
        first = (part.image * rows + part.row) * columns
        _multiply(x, weights, bias, first, values, products)
        edges = (min(2 * _TILE * row, 2 * height) for row in (part.row, part.row_end))
        yield Strip(part.image, part.images, *edges), products


def pixels_of_a_strip(x: Tensor) -> int:
    """That `strip_products` makes of x [N, H, W, Cin] at a time, at most."""
    return (2 * _TILE) ** 2 * max(TILES, -(-x.shape[2] // _TILE))


def _multiply(
    x: Tensor, weights: list[Tensor], bias: Tensor, first: int, values: Tensor, products: Tensor
) -> None:
    """The products [81 * tiles * Cout] of the tiles from `first` on; values [36, tiles, Cin]."""
    torch.ops.fdda._winograd_upsample_input(x, values, first)
    terms = _products(products, values.shape[1])
    for value, w, term in zip(_positions(values), weights, terms, strict=True):
        multiply(value, w, term)
    terms[0][_CENTER] += bias


@torch.no_grad()
def upsample_conv3x3_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if _winograd_bfloat16.pays(x, weight):
        return _winograd_bfloat16.upsample_conv3x3_backward(grad_y, x, weight)
    if not upsample_pays(x, weight):
        return _nine_products.upsample_conv3x3_backward(grad_y, x, weight)
    x, grad_y = nhwc(x), nhwc(grad_y)
    outputs, inputs = weight.shape[:2]
    grad_x, grad_weight = torch.empty_like(x), weight.new_empty(inputs, 3, 3, outputs)
    grad_bias = weight.new_zeros(outputs, dtype=torch.float64)
    # Products with transposed views were seen to take a quarter longer.
    weights = [w.transpose(1, 2).contiguous() for w in _weights(weight)]
    total = weight.new_zeros(81 * inputs * outputs)
    for first, values, products in tile_groups(x, grad_y, TILES, 81):
        sums = grad_bias.new_empty(values.shape[1], outputs)
        torch.ops.fdda._winograd_upsample_gradient(grad_y, products, sums, first)
        grads = _products(products, values.shape[1])
        grad_bias += sums.sum(0)
        torch.ops.fdda._winograd_upsample_input(x, values, first)
        for grad, value, w, sums in zip(
            grads, _positions(values), weights, _products(total, inputs), strict=True
        ):
            add_products(value.transpose(1, 2), grad, sums)
            multiply(grad, w, value)
        torch.ops.fdda._winograd_upsample_input_gradient(values, grad_x, first)
    torch.ops.fdda._winograd_upsample_weight_gradient(total, grad_weight)
    grad_weight = grad_weight.permute(3, 0, 1, 2).contiguous()
    return grad_x.permute(0, 3, 1, 2), grad_weight, grad_bias.float()


def upsample_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether x [N, Cin, H, W] is large enough for these passes."""
    return x.dtype == torch.float32 and winograd_pays(x, weight, channels=16, pixels=1568)


def _weights(weight: Tensor) -> list[Tensor]:
    """As `_products`, of [outputs, inputs, 3, 3] with a row per input."""
    memory = weight.new_empty(81 * weight[:, :, 0, 0].numel())
    torch.ops.fdda._winograd_upsample_weights(weight.permute(1, 2, 3, 0).contiguous(), memory)
    return _products(memory, weight.shape[1])


def _positions(values: Tensor) -> tuple[Tensor, ...]:
    return values.split(list(_POSITIONS.values()))


def _products(memory: Tensor, rows: int) -> list[Tensor]:
    """[81 * rows * outputs] as [positions, rows, products * outputs]"""
    one = len(memory) // 81
    parts = memory.split([count * n * one for count, n in _POSITIONS.items()])
    return [p.view(n, rows, -1) for p, n in zip(parts, _POSITIONS.values(), strict=True)]

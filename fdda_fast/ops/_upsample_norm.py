"""An up-sampling convolution and a norm behind it, of upsample_twice_conv3x3, by other products.

Strip by strip: what the convolution made is normalised, and goes through the convolution behind,
before it leaves the cache. Otherwise these passes wait for memory, which processes share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdda_fast.ops._few_outputs import taps_of
from fdda_fast.ops._layout import nhwc
from fdda_fast.ops._norm_few_outputs import fixed_bn_lrelu, fixed_bn_lrelu_conv3x3
from fdda_fast.ops._products import multiply
from fdda_fast.ops._winograd_upsample import (
    pixels_of_a_strip,
    strip_products,
    tile_products,
    upsample_conv3x3,
    upsample_pays,
)

_HALO = 2  # rows of the strip before that the next one's convolution reads


def upsample_fixed_bn_lrelu(
    x: Tensor, weight: Tensor, bias: Tensor, tables: Tensor, negative_slope: float
) -> Tensor:
    if not upsample_pays(x, weight):
        return fixed_bn_lrelu(upsample_conv3x3(x, weight, bias), tables, negative_slope)
    x = nhwc(x)
    batch, height, width, _ = x.shape
    y = x.new_empty(batch, 2 * height, 2 * width, len(weight))
    tables = tables.contiguous()
    for first, products in tile_products(x, weight, bias, y):
        torch.ops.fdda._winograd_upsample_norm_output(products, tables, negative_slope, y, first)
    return y.permute(0, 3, 1, 2)


def upsample_fixed_bn_lrelu_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tables: Tensor,
    negative_slope: float,
    out_weight: Tensor,
    out_bias: Tensor,
) -> Tensor:
    if not upsample_pays(x, weight):
        y = upsample_conv3x3(x, weight, bias)
        return fixed_bn_lrelu_conv3x3(y, tables, negative_slope, out_weight, out_bias)
    x = nhwc(x)
    batch, height, width = x.shape[0], 2 * x.shape[1], 2 * x.shape[2]
    channels, halo_size = len(weight), _HALO * width * len(weight)
    y = x.new_empty(batch, height, width, len(out_weight))
    taps = taps_of(out_weight, x.dtype)
    most = _HALO * width + pixels_of_a_strip(x)
    memory, planes_memory = x.new_empty(most * channels), x.new_empty(most * len(taps))
    for strip, products in strip_products(x, weight, bias):
        shape = strip.images, strip.row_end - strip.row, width, channels
        end = halo_size + math.prod(shape)
        values = memory[halo_size:end].view(shape)
        own = tables[:, strip.image : strip.image + strip.images].contiguous()
        torch.ops.fdda._winograd_upsample_norm_output(products, own, negative_slope, values, 0)
        pixels = memory[0 if strip.row else halo_size : end].view(-1, channels)
        planes = planes_memory[: len(taps) * len(pixels)].view(len(taps), -1)
        multiply(taps, pixels.t(), planes)
        # An output row needs the one below it: the last one waits for the next strip.
        row, row_end = max(0, strip.row - 1), strip.row_end - (strip.row_end < height)
        torch.ops.fdda._sum_taps(planes, out_bias, y, strip.image, strip.images, row, row_end)
        memory[:halo_size] = memory[end - halo_size : end]
    return y.permute(0, 3, 1, 2)

"""Fake quantisation to the minimum and maximum of a slice.

A slice that is contiguous takes one kernel: it is read once and held on chip, or, where it is
longer than that, read twice. Other slices take two stages of minima and maxima, then
`fake_quantize_range`. A NaN or an infinity makes its slice NaN, which the formula gives too.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdda_fast.kernels._tiles import (
    PROGRAMS,
    WARP,
    View,
    gapless,
    kernel,
    place,
    store_partial,
    tile,
)
from fdda_fast.kernels.fake_quantize import fake_quantize_range, quantize_to_range, range_parameters

# (BLOCK, LOOPED, threads): rows up to BLOCK are held in registers.
ROW_CONFIGS = ((512, False, 64), (1024, False, 128), (4096, False, 256), (16384, False, 512))
LONG_ROW_CONFIG = (4096, True, 256)


@kernel
def row_kernel(
    x, y, half, pixel_units, ALIGN: tl.constexpr, BLOCK: tl.constexpr, LOOPED: tl.constexpr
):
    size = pixel_units.to(tl.int64) * ALIGN
    start = tl.program_id(0).to(tl.int64) * size
    index = tl.arange(0, BLOCK)
    if LOOPED:
        low = tl.full((BLOCK,), float("inf"), tl.float32)
        high = tl.full((BLOCK,), float("-inf"), tl.float32)
        poison = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, size, BLOCK):
            mask = first + index < size
            value = tl.load(x + start + first + index, mask=mask, other=0.0).to(tl.float32)
            low = tl.minimum(low, tl.where(mask, value, float("inf")))
            high = tl.maximum(high, tl.where(mask, value, float("-inf")))
            poison += value - value
    else:
        mask = index < size
        value = tl.load(x + start + index, mask=mask, other=0.0).to(tl.float32)
        low = tl.where(mask, value, float("inf"))
        high = tl.where(mask, value, float("-inf"))
        poison = value - value
    spoilt = tl.sum(poison, 0)
    row_min = tl.min(low, 0) + spoilt
    row_max = tl.max(high, 0) + spoilt
    scale, zero_point = range_parameters(row_min, row_max, half)
    if LOOPED:
        for first in range(0, size, BLOCK):
            mask = first + index < size
            value = tl.load(x + start + first + index, mask=mask, other=0.0).to(tl.float32)
            result = quantize_to_range(value, scale, zero_point, half)
            tl.store(y + start + first + index, result.to(y.dtype.element_ty), mask=mask)
    else:
        result = quantize_to_range(value, scale, zero_point, half)
        tl.store(y + start + index, result.to(y.dtype.element_ty), mask=mask)


@kernel
def minmax_kernel(
    x,
    partials,
    pixel_units,
    channel_units,
    splits,
    tiles,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pixels, channels, sample, channel, split = place(
        pixel_units, channel_units, splits, ALIGN, LAST, BLOCK_C
    )
    low = tl.full((BLOCK_P, BLOCK_C), float("inf"), tl.float32)
    high = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    poison = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for number in range(split * tiles, (split + 1) * tiles):
        offset, mask = tile(sample, number, channel, pixels, channels, BLOCK_P, LAST)
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.where(mask, value, float("inf")))
        high = tl.maximum(high, tl.where(mask, value, float("-inf")))
        poison += value - value
    spoilt = tl.sum(poison, 0)
    store_partial(partials, 0, tl.min(low, 0) + spoilt, sample, split, splits, channel, channels)
    store_partial(partials, 1, tl.max(high, 0) + spoilt, sample, split, splits, channel, channels)


@kernel
def merge_kernel(partials, out, rows, channel_units, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """out [2, channels]: minimum and maximum of partials [2, rows, channels]."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    low = tl.full((BLOCK_R, BLOCK_C), float("inf"), tl.float32)
    high = tl.full((BLOCK_R, BLOCK_C), float("-inf"), tl.float32)
    poison = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (row[:, None] < rows) & (channel[None, :] < channel_units)
        offset = partials + row[:, None] * channel_units + channel[None, :]
        value = tl.load(offset, mask=mask, other=float("inf"))
        low = tl.minimum(low, value)
        poison += tl.where(mask, value - value, 0.0)
        offset += rows * channel_units
        high = tl.maximum(high, tl.load(offset, mask=mask, other=float("-inf")))
    spoilt = tl.sum(poison, 0)
    mask = channel < channel_units
    tl.store(out + channel, tl.min(low, 0) + spoilt, mask=mask)
    tl.store(out + channel_units + channel, tl.max(high, 0) + spoilt, mask=mask)


def row_config(size: int) -> tuple[int, bool, int]:
    return next((c for c in ROW_CONFIGS if size <= c[0]), LONG_ROW_CONFIG)


def fake_quantize_minmax(x: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """`fdda::fake_quantize_minmax`; see `fdda_fast.ops.fake_quantize_minmax`."""
    x = gapless(x)
    if not x.numel():
        return torch.empty_like(x)
    view = View.along(x, axis)
    too_long = view.channels == 1 and view.pixels > ROW_CONFIGS[-1][0]
    if too_long or view.outer > 1 or view.last:
        return fake_quantize_range(x, *_range(x, view), bits, axis)
    y = torch.empty_like(x)
    align = math.gcd(view.pixels, 16)
    block, looped, threads = row_config(view.pixels)
    row_kernel[(view.channels,)](
        x,
        y,
        2.0 ** (bits - 1),
        view.pixels // align,
        ALIGN=align,
        BLOCK=block,
        LOOPED=looped,
        num_warps=threads // WARP,
        enable_fp_fusion=False,
    )
    return y


def observe_range(
    x: Tensor, x_min: Tensor, x_max: Tensor, keep: float, include_zero: bool
) -> tuple[Tensor, Tensor]:
    """x_min and x_max moved towards the minimum and maximum of x: `keep` of them stays.

    `include_zero` widens what is moved towards to hold 0. Of NaN and infinity come NaN.
    """
    x = gapless(x)
    low, high = _range(x, View.along(x, None)).reshape(2, *x_min.shape)
    if include_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    return x_min * keep + low * (1 - keep), x_max * keep + high * (1 - keep)


def _range(x: Tensor, view: View) -> Tensor:
    """Minimum and maximum of every channel, float32 [2, channels]."""
    grid = view.grid(PROGRAMS)
    partials = grid.partials(2, x)
    minmax_kernel[grid.programs](x, partials, tiles=grid.tiles, **grid.sizes)
    out = torch.empty(2, view.channels, dtype=torch.float32, device=x.device)
    block_r, block_c = (1024, 1) if view.channels == 1 else (32, 32)
    merge_kernel[(triton.cdiv(view.channels, block_c),)](
        partials, out, grid.rows, view.channels, BLOCK_R=block_r, BLOCK_C=block_c
    )
    return out

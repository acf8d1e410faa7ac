"""Fake quantisation with given parameters: one read, one write, forward and backward.

Every operation rounds as on the CPU, so that both give the same bits: no contraction to fused
multiply-adds, an IEEE division, and half-to-even rounding by adding and subtracting 1.5 * 2^23.
Gradients of parameters are summed per program, then by a second small kernel: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdda_fast.kernels._tiles import (
    PROGRAMS,
    View,
    clip,
    gapless,
    kernel,
    matching,
    place,
    round_code,
    round_float,
    store_partial,
    tile,
    total,
)


@triton.jit
def range_parameters(x_min, x_max, half):
    """Scale and zero point of the range quantiser, in the reference's float32 operations."""
    width = x_max - x_min
    width = tl.where(width < 1e-8, 1e-8, width)
    scale = tl.div_rn(tl.zeros_like(width) + (2.0 * half - 1.0), width)
    return scale, round_float(scale * x_min) + half


@triton.jit
def quantize_to_range(x, scale, zero_point, half):
    code = round_code(clip(scale * x - zero_point, -half, half - 1.0))
    numerator = code + zero_point
    return tl.div_rn(numerator, tl.broadcast_to(scale, numerator.shape))


@kernel
def affine_kernel(
    x,
    y,
    scale,
    zero_point,
    quant_min,
    quant_max,
    pixel_units,
    channel_units,
    splits,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pixels, channels, sample, channel, split = place(
        pixel_units, channel_units, splits, ALIGN, LAST, BLOCK_C
    )
    s = tl.load(scale + channel, mask=channel < channels, other=1.0)[None, :]
    z = tl.load(zero_point + channel, mask=channel < channels, other=0.0)[None, :]
    offset, mask = tile(sample, split, channel, pixels, channels, BLOCK_P, LAST)
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    code = tl.div_rn(value, tl.broadcast_to(s, value.shape)) + z
    code = round_code(clip(code, quant_min, quant_max))
    tl.store(y + offset, ((code - z) * s).to(y.dtype.element_ty), mask=mask)


@kernel
def affine_backward_kernel(
    grad,
    x,
    grad_x,
    scale,
    zero_point,
    partials,
    quant_min,
    quant_max,
    pixel_units,
    channel_units,
    splits,
    tiles,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CLIPPED: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    """CLIPPED: the gradient of x; PARAMETERS: sums for those of scale and zero_point.

    The latter after LSQ (Esser et al., ICLR 2020) and LSQ+ (Bhalgat et al., 2020).
    """
    pixels, channels, sample, channel, split = place(
        pixel_units, channel_units, splits, ALIGN, LAST, BLOCK_C
    )
    s = tl.load(scale + channel, mask=channel < channels, other=1.0)[None, :]
    z = tl.load(zero_point + channel, mask=channel < channels, other=0.0)[None, :]
    scale_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    zero_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for number in range(split * tiles, (split + 1) * tiles):
        offset, mask = tile(sample, number, channel, pixels, channels, BLOCK_P, LAST)
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        position = tl.div_rn(value, tl.broadcast_to(s, value.shape)) + z
        code = round_code(clip(position, quant_min - 1.0, quant_max + 1.0))
        inside = (code >= quant_min) & (code <= quant_max)
        if CLIPPED:
            through = tl.where(inside, g, 0.0)
            tl.store(grad_x + offset, through.to(grad_x.dtype.element_ty), mask=mask)
        if PARAMETERS:
            center = tl.where(inside, position, z)
            scale_sum += g * (clip(code, quant_min, quant_max) - center)
            zero_sum -= tl.where(inside, 0.0, g * s)
    if PARAMETERS:
        store_partial(partials, 0, tl.sum(scale_sum, 0), sample, split, splits, channel, channels)
        store_partial(partials, 1, tl.sum(zero_sum, 0), sample, split, splits, channel, channels)


@kernel
def range_kernel(
    x,
    y,
    x_min,
    x_max,
    half,
    pixel_units,
    channel_units,
    splits,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pixels, channels, sample, channel, split = place(
        pixel_units, channel_units, splits, ALIGN, LAST, BLOCK_C
    )
    low = tl.load(x_min + channel, mask=channel < channels, other=0.0)
    high = tl.load(x_max + channel, mask=channel < channels, other=1.0)
    scale, zero_point = range_parameters(low, high, half)
    offset, mask = tile(sample, split, channel, pixels, channels, BLOCK_P, LAST)
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    result = quantize_to_range(value, scale[None, :], zero_point[None, :], half)
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def range_gradients(x, g, low, high, scale, zero_point, half):
    """The gradient that a clipped range passes on, and what an element adds to those of x_min and
    x_max: a clipped value moves the end that clips it, every other one contributes its rounding
    error, which grows with the step.

    After LSQ (Esser et al., ICLR 2020). The error is taken in codes, 2^bits - 1 of which make the
    range: that saves dividing by the scale.
    """
    position = scale * x - zero_point
    code = round_code(tl.minimum(tl.maximum(position, -half), half - 1.0))
    levels = scale * tl.maximum(high - low, 1e-8)
    below, above = x < low, x > high
    inside = tl.where(below | above, 0.0, g)
    stretch = inside * (code - position) * (1.0 / levels)
    return inside, tl.where(below, g, 0.0) - stretch, tl.where(above, g, 0.0) + stretch


@kernel
def range_backward_kernel(
    grad,
    x,
    grad_x,
    x_min,
    x_max,
    partials,
    half,
    pixel_units,
    channel_units,
    splits,
    tiles,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CLIPPED: tl.constexpr,
    ENDS: tl.constexpr,
):
    """CLIPPED: the gradient of x; ENDS: sums for those of x_min and x_max."""
    pixels, channels, sample, channel, split = place(
        pixel_units, channel_units, splits, ALIGN, LAST, BLOCK_C
    )
    low = tl.load(x_min + channel, mask=channel < channels, other=0.0)
    high = tl.load(x_max + channel, mask=channel < channels, other=1.0)
    scale, zero_point = range_parameters(low, high, half)
    low, high, scale, zero_point = low[None, :], high[None, :], scale[None, :], zero_point[None, :]
    low_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    high_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for number in range(split * tiles, (split + 1) * tiles):
        offset, mask = tile(sample, number, channel, pixels, channels, BLOCK_P, LAST)
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        inside, low_part, high_part = range_gradients(value, g, low, high, scale, zero_point, half)
        if CLIPPED:
            tl.store(grad_x + offset, inside.to(grad_x.dtype.element_ty), mask=mask)
        if ENDS:
            low_sum += low_part
            high_sum += high_part
    if ENDS:
        low_sum, high_sum = tl.sum(low_sum, 0), tl.sum(high_sum, 0)
        store_partial(partials, 0, low_sum, sample, split, splits, channel, channels)
        store_partial(partials, 1, high_sum, sample, split, splits, channel, channels)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    clipped: bool = False,
) -> Tensor:
    """`fdda::fake_quantize`; see `fdda_fast.ops.fake_quantize`."""
    x = gapless(x)
    y = torch.empty_like(x)
    if x.numel():
        grid = View.along(x, axis).grid()
        affine_kernel[grid.programs](
            x,
            y,
            scale.contiguous(),
            zero_point.contiguous(),
            float(quant_min),
            float(quant_max),
            **grid.sizes,
            enable_fp_fusion=False,
        )
    return y


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    clipped: bool,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fdda::fake_quantize_backward`: gradients of x, scale and zero_point.

    That of x is empty unless `clipped`, otherwise it is `grad` itself; those of scale and
    zero_point are empty unless `parameters`.
    """
    x = gapless(x)
    grad_x = torch.empty_like(x) if clipped else x.new_empty(0)
    grad_scale, grad_zero_point = (_wanted(t, parameters) for t in (scale, zero_point))
    if x.numel() and (clipped or parameters):
        grid = View.along(x, axis).grid(PROGRAMS if parameters else None)
        partials = grid.partials(2 if parameters else 0, x)
        affine_backward_kernel[grid.programs](
            matching(grad, x),
            x,
            grad_x,
            scale.contiguous(),
            zero_point.contiguous(),
            partials,
            float(quant_min),
            float(quant_max),
            tiles=grid.tiles,
            **grid.sizes,
            CLIPPED=clipped,
            PARAMETERS=parameters,
            enable_fp_fusion=False,
        )
        if parameters:
            grad_scale, grad_zero_point = (t.reshape(scale.shape) for t in total(partials))
    return grad_x, grad_scale, grad_zero_point


def _wanted(parameter: Tensor, wanted: bool) -> Tensor:
    return torch.zeros_like(parameter) if wanted else parameter.new_empty(0)


def fake_quantize_range(
    x: Tensor,
    x_min: Tensor,
    x_max: Tensor,
    bits: int,
    axis: int | None = None,
    clipped: bool = False,
) -> Tensor:
    """`fdda::fake_quantize_range`; see `fdda_fast.ops.fake_quantize_range`."""
    x = gapless(x)
    y = torch.empty_like(x)
    if x.numel():
        grid = View.along(x, axis).grid()
        range_kernel[grid.programs](
            x,
            y,
            x_min.contiguous(),
            x_max.contiguous(),
            2.0 ** (bits - 1),
            **grid.sizes,
            enable_fp_fusion=False,
        )
    return y


def fake_quantize_range_backward(
    grad: Tensor,
    x: Tensor,
    x_min: Tensor,
    x_max: Tensor,
    bits: int,
    axis: int | None,
    clipped: bool,
    ends: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fdda::fake_quantize_range_backward`: gradients of x, x_min and x_max.

    That of x is empty unless `clipped`, otherwise it is `grad` itself; those of the ends are empty
    unless `ends`.
    """
    x = gapless(x)
    grad_x = torch.empty_like(x) if clipped else x.new_empty(0)
    grad_min, grad_max = (_wanted(t, ends) for t in (x_min, x_max))
    if x.numel() and (clipped or ends):
        grid = View.along(x, axis).grid(PROGRAMS if ends else None)
        partials = grid.partials(2 if ends else 0, x)
        range_backward_kernel[grid.programs](
            matching(grad, x),
            x,
            grad_x,
            x_min.contiguous(),
            x_max.contiguous(),
            partials,
            2.0 ** (bits - 1),
            tiles=grid.tiles,
            **grid.sizes,
            CLIPPED=clipped,
            ENDS=ends,
            enable_fp_fusion=False,
        )
        if ends:
            grad_min, grad_max = (t.reshape(x_min.shape) for t in total(partials))
    return grad_x, grad_min, grad_max

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
    dense,
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
    LEARNED: tl.constexpr,
):
    """LEARNED: also sums for scale and zero_point (Esser et al., LSQ, ICLR 2020; Bhalgat, LSQ+)."""
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
        steps = tl.div_rn(value, tl.broadcast_to(s, value.shape))
        code = round_code(clip(steps + z, quant_min - 1.0, quant_max + 1.0))
        inside = (code >= quant_min) & (code <= quant_max)
        tl.store(grad_x + offset, tl.where(inside, g, 0.0).to(grad_x.dtype.element_ty), mask=mask)
        if LEARNED:
            stretch = clip(code, quant_min, quant_max) - z
            scale_sum += g * tl.where(inside, stretch - steps, stretch)
            zero_sum -= tl.where(inside, 0.0, g * s)
    if LEARNED:
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
def range_gradients(g, error, above, below, width):
    """What an element adds to the gradients of x_min and x_max: a clipped value moves the end that
    clips it, every other one contributes its rounding error, which grows with the step.
    """
    stretch = g * error / width
    low = tl.where(below, g, tl.where(above, 0.0, -stretch))
    return low, tl.where(above, g, tl.where(below, 0.0, stretch))


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
):
    pixels, channels, sample, channel, split = place(
        pixel_units, channel_units, splits, ALIGN, LAST, BLOCK_C
    )
    low = tl.load(x_min + channel, mask=channel < channels, other=0.0)
    high = tl.load(x_max + channel, mask=channel < channels, other=1.0)
    scale, zero_point = range_parameters(low, high, half)
    width = tl.maximum(high - low, 1e-8)[None, :]
    low_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    high_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for number in range(split * tiles, (split + 1) * tiles):
        offset, mask = tile(sample, number, channel, pixels, channels, BLOCK_P, LAST)
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        below, above = value < low[None, :], value > high[None, :]
        inside = tl.where(below | above, 0.0, g)
        tl.store(grad_x + offset, inside.to(grad_x.dtype.element_ty), mask=mask)
        y = quantize_to_range(value, scale[None, :], zero_point[None, :], half)
        low_part, high_part = range_gradients(g, y - value, above, below, width)
        low_sum += low_part
        high_sum += high_part
    store_partial(partials, 0, tl.sum(low_sum, 0), sample, split, splits, channel, channels)
    store_partial(partials, 1, tl.sum(high_sum, 0), sample, split, splits, channel, channels)


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
    x, y = dense(x)
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
    axis: int | None = None,
) -> Tensor:
    """`fdda::fake_quantize_backward`: the gradient where the code needed no clamping."""
    return _affine_backward(grad, x, scale, zero_point, quant_min, quant_max, axis, False)[0]


def fake_quantize_learned_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (clipped), scale and zero_point (LSQ)."""
    grad_x, sums = _affine_backward(grad, x, scale, zero_point, quant_min, quant_max, axis, True)
    return grad_x, *(s.reshape(scale.shape) for s in sums)


def _affine_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    learned: bool,
) -> tuple[Tensor, Tensor]:
    x, grad_x = dense(x)
    if not x.numel():
        return grad_x, x.new_zeros((2, scale.numel()), dtype=torch.float32)
    grid = View.along(x, axis).grid(PROGRAMS if learned else None)
    partials = grid.partials(2 if learned else 0, x)
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
        LEARNED=learned,
        enable_fp_fusion=False,
    )
    return grad_x, total(partials)


def fake_quantize_range(
    x: Tensor, x_min: Tensor, x_max: Tensor, bits: int, axis: int | None = None
) -> Tensor:
    """`fdda::fake_quantize_range`; see `fdda_fast.ops.fake_quantize_range`."""
    x, y = dense(x)
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
    grad: Tensor, x: Tensor, x_min: Tensor, x_max: Tensor, bits: int, axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (zero where clipped), x_min and x_max."""
    x, grad_x = dense(x)
    if not x.numel():
        return grad_x, torch.zeros_like(x_min), torch.zeros_like(x_max)
    grid = View.along(x, axis).grid(PROGRAMS)
    partials = grid.partials(2, x)
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
        enable_fp_fusion=False,
    )
    low, high = total(partials)
    return grad_x, low.reshape(x_min.shape), high.reshape(x_max.shape)

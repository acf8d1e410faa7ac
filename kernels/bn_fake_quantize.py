"""Eval-mode batch norm, residual addition, clipping and fake quantisation in one pass.

The backward pass recomputes them and sums the gradients of all parameters while it reads.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fdda_fast.kernels._tiles import (
    PROGRAMS,
    View,
    by_sample,
    clip,
    kernel,
    like,
    matching,
    place,
    store_partial,
    tile,
    total,
)
from fdda_fast.kernels.class_moments import fold
from fdda_fast.kernels.fake_quantize import quantize_to_range, range_gradients, range_parameters


@kernel
def range_parameters_kernel(x_min, x_max, quantizer, half):
    """quantizer [4] = x_min, x_max, scale, zero point: divided once, not by every program."""
    one = tl.arange(0, 1)
    low, high = tl.load(x_min + one), tl.load(x_max + one)
    scale, zero_point = range_parameters(low, high, half)
    tl.store(quantizer + one, low)
    tl.store(quantizer + 1 + one, high)
    tl.store(quantizer + 2 + one, scale)
    tl.store(quantizer + 3 + one, zero_point)


@kernel
def bn_fake_quantize_kernel(
    x,
    residual,
    y,
    folded,
    quantizer,
    half,
    low,
    high,
    pixel_units,
    channel_units,
    splits,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    pixels, channels, sample, channel, split = place(
        pixel_units, channel_units, splits, ALIGN, LAST, BLOCK_C
    )
    q_scale, zero_point = tl.load(quantizer + 2), tl.load(quantizer + 3)
    scale = tl.load(folded + channel, mask=channel < channels, other=0.0)[None, :]
    shift = tl.load(folded + channels + channel, mask=channel < channels, other=0.0)[None, :]
    offset, mask = tile(sample, split, channel, pixels, channels, BLOCK_P, LAST)
    v = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) * scale + shift
    if RESIDUAL:
        v += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    v = quantize_to_range(clip(v, low, high), q_scale, zero_point, half)
    tl.store(y + offset, v.to(y.dtype.element_ty), mask=mask)


@kernel
def bn_fake_quantize_backward_kernel(
    grad,
    x,
    residual,
    grad_x,
    grad_residual,
    running_mean,
    folded,
    quantizer,
    partials,
    half,
    low,
    high,
    above_low,
    below_high,
    pixel_units,
    channel_units,
    splits,
    tiles,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CLIPPED: tl.constexpr,
    ENDS: tl.constexpr,
):
    """Gradients of x and residual; sums for weight, bias and, with ENDS, x_min and x_max.

    above_low, below_high: the floats next to low and high, where the gradient begins to pass.
    """
    pixels, channels, sample, channel, split = place(
        pixel_units, channel_units, splits, ALIGN, LAST, BLOCK_C
    )
    range_low, range_high = tl.load(quantizer), tl.load(quantizer + 1)
    q_scale, zero_point = tl.load(quantizer + 2), tl.load(quantizer + 3)
    pass_low, pass_high = above_low, below_high
    if CLIPPED:
        pass_low = tl.maximum(above_low, range_low)
        pass_high = tl.minimum(below_high, range_high)
    valid = channel < channels
    scale = tl.load(folded + channel, mask=valid, other=0.0)[None, :]
    shift = tl.load(folded + channels + channel, mask=valid, other=0.0)[None, :]
    inverse = tl.load(folded + 2 * channels + channel, mask=valid, other=0.0)
    mean = tl.load(running_mean + channel, mask=valid, other=0.0)[None, :]
    weight_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    bias_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    low_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    high_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for number in range(split * tiles, (split + 1) * tiles):
        offset, mask = tile(sample, number, channel, pixels, channels, BLOCK_P, LAST)
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        v = value * scale + shift
        if RESIDUAL:
            v += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
        kept = tl.minimum(tl.maximum(v, low), high)
        _, low_part, high_part = range_gradients(
            kept, g, range_low, range_high, q_scale, zero_point, half
        )
        through = tl.where((v >= pass_low) & (v <= pass_high), g, 0.0)
        tl.store(grad_x + offset, (through * scale).to(grad_x.dtype.element_ty), mask=mask)
        if RESIDUAL:
            out = through.to(grad_residual.dtype.element_ty)
            tl.store(grad_residual + offset, out, mask=mask)
        weight_sum += through * (value - mean)
        bias_sum += through
        if ENDS:
            low_sum += low_part
            high_sum += high_part
    # In the other order of stores, LLVM fails on unaligned channels for sm_90.
    if ENDS:
        low_sum, high_sum = tl.sum(low_sum, 0), tl.sum(high_sum, 0)
        store_partial(partials, 2, low_sum, sample, split, splits, channel, channels)
        store_partial(partials, 3, high_sum, sample, split, splits, channel, channels)
    weight_sum, bias_sum = tl.sum(weight_sum, 0) * inverse, tl.sum(bias_sum, 0)
    store_partial(partials, 0, weight_sum, sample, split, splits, channel, channels)
    store_partial(partials, 1, bias_sum, sample, split, splits, channel, channels)


def _quantizer(x_min: Tensor, x_max: Tensor, bits: int) -> Tensor:
    quantizer = torch.empty(4, dtype=torch.float32, device=x_min.device)
    half = 2.0 ** (bits - 1)
    range_parameters_kernel[(1,)](x_min, x_max, quantizer, half, enable_fp_fusion=False)
    return quantizer


def _inner(low: float, high: float) -> list[float]:
    """The smallest and the largest float32 strictly between low and high."""
    ends = torch.tensor([low, high])
    return torch.nextafter(ends, ends.flip(0)).tolist()


def bn_relu_fake_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    x_min: Tensor,
    x_max: Tensor,
    bits: int,
    low: float,
    high: float,
    residual: Tensor | None = None,
    clipped: bool = False,
) -> Tensor:
    """`fake_quantize_range(clip(batch_norm(x) + residual, low, high), x_min, x_max, bits)`."""
    read = by_sample(x)
    y = torch.empty_like(read)
    grid = View.channelwise(read).grid()
    if grid.view.size:
        bn_fake_quantize_kernel[grid.programs](
            read,
            read if residual is None else matching(residual, read),
            y,
            fold(weight, bias, running_mean, running_var, eps),
            _quantizer(x_min, x_max, bits),
            2.0 ** (bits - 1),
            low,
            high,
            **grid.sizes,
            RESIDUAL=residual is not None,
            enable_fp_fusion=False,
        )
    return like(y, x)


def bn_relu_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    x_min: Tensor,
    x_max: Tensor,
    bits: int,
    low: float,
    high: float,
    residual: Tensor | None,
    clipped: bool,
    range_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight, bias, x_min and x_max of `bn_relu_fake_quantize`.

    Empty: that of residual where there is none, those of x_min and x_max unless `range_gradient`.
    `clipped`: beyond x_min and x_max nothing passes.
    """
    read = by_sample(x)
    grad_x = torch.empty_like(read)
    grad_residual = x.new_empty(0) if residual is None else torch.empty_like(read)
    grid = View.channelwise(read).grid(PROGRAMS)
    partials = grid.partials(4 if range_gradient else 2, x)
    if grid.view.size:
        bn_fake_quantize_backward_kernel[grid.programs](
            matching(grad, read),
            read,
            read if residual is None else matching(residual, read),
            grad_x,
            grad_residual,
            running_mean.contiguous(),
            fold(weight, bias, running_mean, running_var, eps),
            _quantizer(x_min, x_max, bits),
            partials,
            2.0 ** (bits - 1),
            low,
            high,
            *_inner(low, high),
            tiles=grid.tiles,
            **grid.sizes,
            RESIDUAL=residual is not None,
            CLIPPED=clipped,
            ENDS=range_gradient,
            enable_fp_fusion=False,
        )
    grad_weight, grad_bias = total(partials[:2])[:, 0]
    grad_min, grad_max = x_min.new_empty(2, 0)
    if range_gradient:
        of_range = total(partials[2:].reshape(2, -1, 1))
        grad_min, grad_max = (t.reshape(x_min.shape) for t in of_range)
    grad_residual = grad_residual if residual is None else like(grad_residual, x)
    return like(grad_x, x), grad_residual, grad_weight, grad_bias, grad_min, grad_max

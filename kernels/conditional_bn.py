"""Train-mode batch norm with a weight and a bias per class, then LeakyReLU.

Forward: the moments of every group (`class_moments`), then one pass. Backward: one pass for the
sums per (sample, channel), which are added up by class and by group, then one for the gradient.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdda_fast.kernels._tiles import (
    PROGRAMS,
    View,
    by_sample,
    kernel,
    like,
    matching,
    place,
    store_partial,
    tile,
    total,
)
from fdda_fast.kernels.class_moments import merge, sample_moments


@triton.jit
def norm_parameters(
    sample, channel, channels, ids, labels, weight, bias, mean, var, eps, BLOCK_C: tl.constexpr
):
    """Group of a sample; mean, inverse standard deviation, weight and bias of its channels."""
    mask = channel < channels
    group = tl.load(ids + sample)
    label = tl.load(labels + sample)
    center = tl.load(mean + group * channels + channel, mask=mask, other=0.0)
    variance = tl.load(var + group * channels + channel, mask=mask, other=1.0)
    inverse = tl.div_rn(tl.full((BLOCK_C,), 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    w = tl.load(weight + label * channels + channel, mask=mask, other=0.0)
    b = tl.load(bias + label * channels + channel, mask=mask, other=0.0)
    return group, center[None, :], inverse[None, :], w[None, :], b[None, :]


@kernel
def conditional_bn_kernel(
    x,
    y,
    ids,
    labels,
    weight,
    bias,
    mean,
    var,
    eps,
    negative_slope,
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
    _, center, inverse, w, b = norm_parameters(
        sample, channel, channels, ids, labels, weight, bias, mean, var, eps, BLOCK_C
    )
    offset, mask = tile(sample, split, channel, pixels, channels, BLOCK_P, LAST)
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    v = w * ((value - center) * inverse) + b
    v = tl.where(v > 0, v, v * negative_slope)
    tl.store(y + offset, v.to(y.dtype.element_ty), mask=mask)


@kernel
def conditional_bn_sums_kernel(
    grad,
    x,
    partials,
    ids,
    labels,
    weight,
    bias,
    mean,
    var,
    eps,
    negative_slope,
    pixel_units,
    channel_units,
    splits,
    tiles,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of dv and dv * normalised x, v being what LeakyReLU reads."""
    pixels, channels, sample, channel, split = place(
        pixel_units, channel_units, splits, ALIGN, LAST, BLOCK_C
    )
    _, center, inverse, w, b = norm_parameters(
        sample, channel, channels, ids, labels, weight, bias, mean, var, eps, BLOCK_C
    )
    plain = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    scaled = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for number in range(split * tiles, (split + 1) * tiles):
        offset, mask = tile(sample, number, channel, pixels, channels, BLOCK_P, LAST)
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        normalized = (value - center) * inverse
        g = tl.where(w * normalized + b > 0, g, g * negative_slope)
        plain += g
        scaled += g * normalized
    plain, scaled = tl.sum(plain, 0), tl.sum(scaled, 0)
    store_partial(partials, 0, plain, sample, split, splits, channel, channels)
    store_partial(partials, 1, scaled, sample, split, splits, channel, channels)


@kernel
def conditional_bn_backward_kernel(
    grad,
    x,
    grad_x,
    ids,
    labels,
    weight,
    bias,
    mean,
    var,
    sums,
    sizes,
    eps,
    negative_slope,
    pixel_units,
    channel_units,
    splits,
    groups,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sums [2, groups, channels]: of weight * dv and weight * dv * normalised x."""
    pixels, channels, sample, channel, split = place(
        pixel_units, channel_units, splits, ALIGN, LAST, BLOCK_C
    )
    group, center, inverse, w, b = norm_parameters(
        sample, channel, channels, ids, labels, weight, bias, mean, var, eps, BLOCK_C
    )
    size = (tl.load(sizes + group) * pixels).to(tl.float32)
    row = sums + group * channels + channel
    shift = tl.load(row, mask=channel < channels, other=0.0)[None, :] / size
    row += groups * channels
    slope = tl.load(row, mask=channel < channels, other=0.0)[None, :] / size
    offset, mask = tile(sample, split, channel, pixels, channels, BLOCK_P, LAST)
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    normalized = (value - center) * inverse
    g = tl.where(w * normalized + b > 0, g, g * negative_slope)
    result = inverse * (w * g - shift - normalized * slope)
    tl.store(grad_x + offset, result.to(grad_x.dtype.element_ty), mask=mask)


@lru_cache(maxsize=64)
def _groups(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The group of every sample, and the sizes, int64."""
    size = torch.tensor(sizes, dtype=torch.int64)
    return torch.arange(len(sizes)).repeat_interleave(size).to(device), size.to(device)


def conditional_bn_lrelu(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: list[int],
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`leaky_relu(weight[label] * (x - mean) / sqrt(var + eps) + bias[label])` and the statistics.

    x [N, C, H, W] or [N, C]; mean and biased var, float32 [G, C], of `groups` of consecutive
    samples.
    """
    read = by_sample(x)
    y = torch.empty_like(read)
    ids, _ = _groups(tuple(groups), x.device)
    partials, moments_grid = sample_moments(read)
    mean, var, _ = merge(partials, moments_grid, ids, len(groups))
    grid = View.samples(read).grid()
    if grid.view.size:
        conditional_bn_kernel[grid.programs](
            read,
            y,
            ids,
            labels.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            mean,
            var,
            eps,
            negative_slope,
            **grid.sizes,
        )
    return like(y, x), mean, var


def conditional_bn_lrelu_backward(
    grad_y: Tensor,
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    groups: list[int],
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias of `conditional_bn_lrelu`."""
    read = by_sample(x)
    grad_x = torch.empty_like(read)
    view = View.samples(read)
    if not view.size:
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    ids, sizes = _groups(tuple(groups), x.device)
    grad_y, labels, weight = matching(grad_y, read), labels.contiguous(), weight.contiguous()
    parameters = (ids, labels, weight, bias.contiguous(), mean.contiguous(), var.contiguous())
    grid = view.grid(PROGRAMS)
    partials = grid.partials(2, x)
    conditional_bn_sums_kernel[grid.programs](
        grad_y, read, partials, *parameters, eps, negative_slope, tiles=grid.tiles, **grid.sizes
    )
    grad_bias, grad_weight = total(partials, grid.splits, labels, len(weight))
    sums = total(partials, grid.splits, ids, len(groups), labels, weight)
    grid = view.grid()
    conditional_bn_backward_kernel[grid.programs](
        grad_y,
        read,
        grad_x,
        *parameters,
        sums,
        sizes,
        eps,
        negative_slope,
        groups=len(groups),
        **grid.sizes,
    )
    return like(grad_x, x), grad_weight, grad_bias

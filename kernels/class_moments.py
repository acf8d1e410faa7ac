"""Moments per class, alone and beside the batch norm that reads the same tensor.

One pass over x for mean and M2 of every (sample, channel, split of its pixels), merged by class in
float64. A tile is reduced twice while it is in registers, tiles merge by the formula of Chan, Golub
and LeVeque (1979): nothing cancels. Every sum has a fixed order and there are no atomics: results
repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdda_fast.kernels._tiles import (
    PROGRAMS,
    Grid,
    View,
    by_sample,
    clip,
    kernel,
    like,
    matching,
    place,
    store_partial,
    tile,
)


@kernel
def fold_kernel(
    weight,
    bias,
    running_mean,
    running_var,
    folded,
    eps,
    channel_units,
    BLOCK: tl.constexpr,
):
    """folded [3, channels] = scale, shift of batch norm in eval mode; 1 / standard deviation.

    In float64, like the reference. A kernel of its own: float64 is slow on many devices.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channel_units
    var = tl.load(running_var + channel, mask=mask, other=1.0).to(tl.float64)
    inverse = 1.0 / tl.sqrt(var + eps)
    scale = tl.load(weight + channel, mask=mask, other=0.0) * inverse
    mean = tl.load(running_mean + channel, mask=mask, other=0.0)
    shift = tl.load(bias + channel, mask=mask, other=0.0) - mean * scale
    tl.store(folded + channel, scale.to(tl.float32), mask=mask)
    tl.store(folded + channel_units + channel, shift.to(tl.float32), mask=mask)
    tl.store(folded + 2 * channel_units + channel, inverse.to(tl.float32), mask=mask)


@kernel
def moments_kernel(
    x,
    residual,
    y,
    folded,
    partials,
    low,
    high,
    pixel_units,
    channel_units,
    splits,
    tiles,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Mean and M2 of x per split; NORM: y = clip(x * scale + shift + residual), too."""
    pixels, channels, sample, channel, split = place(
        pixel_units, channel_units, splits, ALIGN, LAST, BLOCK_C
    )
    if NORM:
        scale = tl.load(folded + channel, mask=channel < channels, other=0.0)[None, :]
        shift = tl.load(folded + channels + channel, mask=channel < channels, other=0.0)[None, :]
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    seen = 0.0
    for number in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(pixels, BLOCK_P))):
        offset, mask = tile(sample, number, channel, pixels, channels, BLOCK_P, LAST)
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            result = value * scale + shift
            if RESIDUAL:
                result += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
            tl.store(y + offset, clip(result, low, high).to(y.dtype.element_ty), mask=mask)
        count = tl.minimum(pixels - number * BLOCK_P, BLOCK_P).to(tl.float32)
        tile_mean = tl.sum(value, 0) / count
        deviation = tl.where(mask, value - tile_mean[None, :], 0.0)
        # The mean was rounded: the deviations' own mean corrects it.
        correction = tl.sum(deviation, 0) / count
        tile_m2 = tl.sum(deviation * deviation, 0) - count * correction * correction
        total = seen + count
        delta = tile_mean - mean + correction
        mean += delta * (count / total)
        m2 += tile_m2 + delta * delta * (seen * (count / total))
        seen = total
    store_partial(partials, 0, mean, sample, split, splits, channel, channels)
    store_partial(partials, 1, m2, sample, split, splits, channel, channels)


@kernel
def merge_moments_kernel(
    partials,
    ids,
    moments,
    counts,
    rows,
    splits,
    chunk,
    pixels,
    channel_units,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean, biased variance and number of samples of group program_id(0).

    Row r is split r % splits, of `chunk` pixels or what is left of them, of sample r // splits,
    which belongs to group ids[sample]. An empty group has zeros.
    """
    group = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    size = tl.zeros((BLOCK_R,), tl.float64)
    samples = tl.zeros((BLOCK_R,), tl.int64)
    for start in range(0, rows, BLOCK_R):
        row = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        split = row % splits
        member = tl.load(ids + row // splits, mask=row < rows, other=-1) == group
        count = tl.where(member, tl.minimum(pixels - split * chunk, chunk), 0).to(tl.float64)
        mask = member[:, None] & (channel[None, :] < channel_units)
        offset = row[:, None] * channel_units + channel[None, :]
        mean = tl.load(partials + offset, mask=mask, other=0.0)
        total += count[:, None] * mean
        size += count
        samples += tl.where(member & (split == 0), 1, 0)
    count = tl.sum(samples, 0)
    size_sum = tl.maximum(tl.sum(size, 0), 1.0)
    group_mean = tl.sum(total, 0) / size_sum
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    for start in range(0, rows, BLOCK_R):
        row = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        split = row % splits
        member = tl.load(ids + row // splits, mask=row < rows, other=-1) == group
        size = tl.where(member, tl.minimum(pixels - split * chunk, chunk), 0).to(tl.float64)
        mask = member[:, None] & (channel[None, :] < channel_units)
        offset = row[:, None] * channel_units + channel[None, :]
        mean = tl.load(partials + offset, mask=mask, other=0.0).to(tl.float64)
        offset += tl.cast(rows, tl.int64) * channel_units
        m2 = tl.load(partials + offset, mask=mask, other=0.0)
        between = tl.where(mask, mean - group_mean[None, :], 0.0)
        total += m2 + size[:, None] * between * between
    out = group * channel_units + channel
    mask = channel < channel_units
    tl.store(moments + out, group_mean.to(tl.float32), mask=mask)
    out += tl.num_programs(0).to(tl.int64) * channel_units
    tl.store(moments + out, (tl.sum(total, 0) / size_sum).to(tl.float32), mask=mask)
    tl.store(counts + group, count, mask=tl.program_id(1) == 0)


@kernel
def moments_backward_kernel(
    x,
    residual,
    grad_y,
    grad_x,
    grad_residual,
    folded,
    labels,
    grad_mean,
    grad_var,
    mean,
    count,
    low,
    high,
    pixel_units,
    channel_units,
    splits,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """dx = (g_mean + 2 (x - mean) g_var) / (count * pixels); NORM: + grad_y through y."""
    pixels, channels, sample, channel, split = place(
        pixel_units, channel_units, splits, ALIGN, LAST, BLOCK_C
    )
    label = tl.load(labels + sample)
    size = (tl.load(count + label) * pixels).to(tl.float32)
    row = label * channels + channel
    center = tl.load(mean + row, mask=channel < channels, other=0.0)[None, :]
    slope = tl.load(grad_var + row, mask=channel < channels, other=0.0)[None, :] * (2.0 / size)
    constant = tl.load(grad_mean + row, mask=channel < channels, other=0.0)[None, :] / size
    offset, mask = tile(sample, split, channel, pixels, channels, BLOCK_P, LAST)
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    result = constant + (value - center) * slope
    if NORM:
        scale = tl.load(folded + channel, mask=channel < channels, other=0.0)[None, :]
        shift = tl.load(folded + channels + channel, mask=channel < channels, other=0.0)[None, :]
        y = value * scale + shift
        if RESIDUAL:
            y += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_y + offset, mask=mask, other=0.0).to(tl.float32)
        through = tl.where((y > low) & (y < high), g, 0.0)
        if RESIDUAL:
            out = through.to(grad_residual.dtype.element_ty)
            tl.store(grad_residual + offset, out, mask=mask)
        result += through * scale
    tl.store(grad_x + offset, result.to(grad_x.dtype.element_ty), mask=mask)


def fold(
    weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> Tensor:
    """Batch norm in eval mode: float32 [3, C], scale, shift and 1 / standard deviation."""
    folded = torch.empty(3, weight.numel(), dtype=torch.float32, device=weight.device)
    if weight.numel():
        parameters = (t.contiguous() for t in (weight, bias, running_mean, running_var))
        fold_kernel[(triton.cdiv(weight.numel(), 256),)](
            *parameters, folded, eps, weight.numel(), BLOCK=256, enable_fp_fusion=False
        )
    return folded


def merge(partials: Tensor, grid: Grid, ids: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance [groups, C] and samples [groups] of what `moments_kernel` left."""
    channels = partials.shape[2]
    moments = torch.empty(2, groups, channels, dtype=torch.float32, device=partials.device)
    count = torch.zeros(groups, dtype=torch.int64, device=partials.device)
    if moments.numel():
        merge_moments_kernel[(groups, triton.cdiv(channels, 32))](
            partials,
            ids,
            moments,
            count,
            grid.rows,
            grid.splits,
            grid.tiles * grid.view.blocks[0],
            grid.view.pixels,
            channels,
            BLOCK_R=32,
            BLOCK_C=32,
        )
    return *moments, count


def sample_moments(
    x: Tensor,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    folded: Tensor | None = None,
    low: float = 0.0,
    high: float = 0.0,
) -> tuple[Tensor, Grid]:
    """Runs `moments_kernel` on x as `by_sample` gives it; its partial results and their grid."""
    grid = View.samples(x).grid(PROGRAMS)
    partials = grid.partials(2, x)
    if grid.view.size:
        moments_kernel[grid.programs](
            x,
            x if residual is None else residual,
            x if y is None else y,
            partials if folded is None else folded,
            partials,
            low,
            high,
            tiles=grid.tiles,
            **grid.sizes,
            NORM=y is not None,
            RESIDUAL=residual is not None,
            enable_fp_fusion=False,
        )
    return partials, grid


def class_moments(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """`fdda::class_moments`; see `fdda_fast.ops.class_moments`. Labels are not checked."""
    partials, grid = sample_moments(by_sample(x))
    return merge(partials, grid, labels.contiguous(), num_classes)


def bn_relu_class_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    labels: Tensor,
    num_classes: int,
    low: float,
    high: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fdda::bn_relu_class_moments`; see `fdda_fast.ops.bn_relu_class_moments`."""
    folded = fold(weight, bias, running_mean, running_var, eps)
    read = by_sample(x)
    y = torch.empty_like(read)
    if residual is not None:
        residual = matching(residual, read)
    partials, grid = sample_moments(read, y, residual, folded, low, high)
    return like(y, x), *merge(partials, grid, labels.contiguous(), num_classes)


def class_moments_backward(
    grad_mean: Tensor, grad_var: Tensor, x: Tensor, labels: Tensor, mean: Tensor, count: Tensor
) -> Tensor:
    """`fdda::class_moments_backward`: dx = (g_mean + 2 (x - mean) g_var) / (count * pixels)."""
    return _backward(grad_mean, grad_var, x, labels, mean, count)[0]


def bn_relu_class_moments_backward(
    grad_y: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    labels: Tensor,
    mean: Tensor,
    count: Tensor,
    low: float,
    high: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fdda::bn_relu_class_moments_backward`: gradients of x and, where there is one, residual."""
    folded = fold(weight, bias, running_mean, running_var, eps)
    moments = (grad_mean, grad_var, x, labels, mean, count)
    return _backward(*moments, grad_y, folded, low, high, residual)


def _backward(
    grad_mean: Tensor,
    grad_var: Tensor,
    x: Tensor,
    labels: Tensor,
    mean: Tensor,
    count: Tensor,
    grad_y: Tensor | None = None,
    folded: Tensor | None = None,
    low: float = 0.0,
    high: float = 0.0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    read = by_sample(x)
    grad_x = torch.empty_like(read)
    grad_residual = x.new_empty(0) if residual is None else torch.empty_like(read)
    grid = View.samples(read).grid()
    if grid.view.size:
        moments_backward_kernel[grid.programs](
            read,
            read if residual is None else matching(residual, read),
            read if grad_y is None else matching(grad_y, read),
            grad_x,
            grad_residual,
            mean if folded is None else folded,
            labels.contiguous(),
            grad_mean.contiguous(),
            grad_var.contiguous(),
            mean.contiguous(),
            count.contiguous(),
            low,
            high,
            **grid.sizes,
            NORM=grad_y is not None,
            RESIDUAL=residual is not None,
            enable_fp_fusion=False,
        )
    return like(grad_x, x), grad_residual if residual is None else like(grad_residual, x)

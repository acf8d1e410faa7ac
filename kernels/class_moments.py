"""Moments per class: one pass over x for count, mean and M2 of every (sample, channel), merged
after.

A tile is reduced twice while it is in registers, tiles merge by the formula of Chan, Golub and
LeVeque (1979): nothing cancels. Every sum has a fixed order and there are no atomics: results
repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def sample_moments_kernel(
    x,
    mean_out,
    m2_out,
    channels,
    pixels,
    stride_n,
    stride_c,
    stride_p,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = x + sample * stride_n + channel.to(tl.int64)[None, :] * stride_c
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        mask = (pixel[:, None] < pixels) & (channel[None, :] < channels)
        tile = tl.load(row + pixel.to(tl.int64)[:, None] * stride_p, mask=mask, other=0.0)
        tile = tile.to(tl.float32)
        count = tl.minimum(pixels - start, BLOCK_P).to(tl.float32)
        tile_mean = tl.sum(tile, 0) / count
        deviation = tl.where(mask, tile - tile_mean[None, :], 0.0)
        # The mean was rounded: the deviations' own mean corrects it.
        shift = tl.sum(deviation, 0) / count
        tile_m2 = tl.sum(deviation * deviation, 0) - count * shift * shift
        seen = start + count
        delta = tile_mean - mean + shift
        mean += delta * (count / seen)
        m2 += tile_m2 + delta * delta * (start * (count / seen))
    out = sample * channels + channel
    tl.store(mean_out + out, mean, mask=channel < channels)
    tl.store(m2_out + out, m2, mask=channel < channels)


@triton.jit
def backward_kernel(
    x,
    grad_x,
    shift,
    slope,
    mean,
    size,
    stride_n,
    batch,
    stride_c,
    channels,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    row = (offset // stride_n) % batch * channels + (offset // stride_c) % channels
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    center = tl.load(mean + row, mask=mask, other=0.0)
    slopes = tl.load(slope + row, mask=mask, other=0.0)
    result = tl.load(shift + row, mask=mask, other=0.0) + (value - center) * slopes
    tl.store(grad_x + offset, result.to(grad_x.dtype.element_ty), mask=mask)


def class_moments(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """`fdda::class_moments`; see `fdda_fast.ops.class_moments`. Labels are not checked."""
    batch, channels = x.shape[:2]
    pixels = x.shape[2] * x.shape[3] if x.dim() == 4 else 1
    channels_last = x.dim() == 4 and x.stride(1) == 1 and x.stride(2) == x.shape[3] * x.stride(3)
    if x.dim() == 4 and not channels_last:
        x = x.contiguous()
    mean, m2 = torch.empty(2, batch, channels, dtype=torch.float32, device=x.device)
    if mean.numel():
        wide = channels_last or pixels == 1
        block_p, block_c = (64, 64) if wide else (BLOCK, 1)
        sample_moments_kernel[(batch, triton.cdiv(channels, block_c))](
            x,
            mean,
            m2,
            channels,
            pixels,
            x.stride(0),
            x.stride(1),
            x.stride(3) if x.dim() == 4 else 0,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
        )
    # A product with the one-hot labels adds in a fixed order; index_add would use atomics.
    classes = torch.arange(num_classes, device=x.device)
    member = (labels == classes[:, None]).double()
    count = member.sum(1)
    class_mean = member @ mean.double() / count.clamp(min=1)[:, None]
    between = (mean.double() - class_mean[labels]).square() * pixels
    var = member @ (m2.double() + between) / (count * pixels).clamp(min=1)[:, None]
    return class_mean.float(), var.float(), count.long()


def class_moments_backward(
    grad_mean: Tensor, grad_var: Tensor, x: Tensor, labels: Tensor, mean: Tensor, count: Tensor
) -> Tensor:
    """`fdda::class_moments_backward`: dx = (g_mean + 2 (x - mean) g_var) / (count * pixels)."""
    pixels = x.shape[2] * x.shape[3] if x.dim() == 4 else 1
    size = (count * pixels).clamp(min=1)[:, None]
    shift, slope = (grad_mean / size)[labels], (2 * grad_var / size)[labels]
    grad_x = torch.empty_like(x)
    if grad_x.stride() != x.stride():
        x = grad_x.copy_(x)
    if x.numel():
        backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x,
            grad_x,
            shift,
            slope,
            mean[labels],
            x.numel(),
            x.stride(0),
            x.shape[0],
            x.stride(1),
            x.shape[1],
            BLOCK=BLOCK,
        )
    return grad_x

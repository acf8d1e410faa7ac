"""Fake quantisation to a given range: one read, one write.

Every operation rounds as on the CPU, so that both give the same bits: no contraction to fused
multiply-adds, an IEEE division, and half-to-even rounding by adding and subtracting 1.5 * 2^23.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def fake_quantize_kernel(
    x,
    y,
    scale,
    zero_point,
    size,
    channel_stride,
    channels,
    half,
    PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    if PER_CHANNEL:
        channel = (offset // channel_stride) % channels
        s = tl.load(scale + channel, mask=mask, other=1.0)
        z = tl.load(zero_point + channel, mask=mask, other=0.0)
    else:
        s = tl.load(scale)
        z = tl.load(zero_point)
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    code = s * value - z
    # Comparisons let NaN through, as torch.clamp does.
    code = tl.where(code < -half, -half, code)
    code = tl.where(code > half - 1.0, half - 1.0, code)
    code = (code + 12582912.0) - 12582912.0
    result = tl.div_rn(code + z, tl.broadcast_to(s, (BLOCK,)))
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=mask)


def fake_quantize_range(
    x: Tensor,
    x_min: Tensor,
    x_max: Tensor,
    bits: int,
    axis: int | None = None,
    clipped: bool = False,
) -> Tensor:
    """`fdda::fake_quantize_range`; see `fdda_fast.ops.fake_quantize_range`."""
    half = 2.0 ** (bits - 1)
    scale = torch.full_like(x_min, 2.0**bits - 1) / torch.clamp(x_max - x_min, min=1e-8)
    zero_point = torch.round(scale * x_min) + half
    y = torch.empty_like(x)
    if y.stride() != x.stride():  # gaps or overlaps: y gets a dense copy, quantised in place
        x = y.copy_(x)
    size = x.numel()
    if size:
        fake_quantize_kernel[(triton.cdiv(size, BLOCK),)](
            x,
            y,
            scale.contiguous(),
            zero_point.contiguous(),
            size,
            1 if axis is None else x.stride(axis),
            1 if axis is None else x.shape[axis],
            half,
            PER_CHANNEL=axis is not None,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
    return y


def fake_quantize_minmax(x: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """`fdda::fake_quantize_minmax`; see `fdda_fast.ops.fake_quantize_minmax`."""
    if x.numel() == 0:
        return torch.empty_like(x)
    dims = [d for d in range(x.dim()) if d != axis]
    x_min, x_max = (x.amin(dims), x.amax(dims)) if dims else (x, x)
    return fake_quantize_range(x, x_min.float(), x_max.float(), bits, axis)

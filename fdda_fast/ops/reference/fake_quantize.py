"""Fake quantisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops.reference._shapes import along, like


def _affine(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    return x.float() / along(scale, x, axis) + along(zero_point, x, axis)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    clipped: bool = False,
) -> Tensor:
    q = torch.round(_affine(x, scale, zero_point, axis)).clamp(quant_min, quant_max)
    q = q + 0.0  # a code has no sign of zero
    return like((q - along(zero_point, x, axis)) * along(scale, x, axis), x)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    q = torch.round(_affine(x, scale, zero_point, axis))
    inside = (q >= quant_min) & (q <= quant_max)
    return like(torch.where(inside, grad, 0.0), x)


def fake_quantize_range(
    x: Tensor, x_min: Tensor, x_max: Tensor, bits: int, axis: int | None = None
) -> Tensor:
    half = 2.0 ** (bits - 1)
    # number / tensor would multiply by the reciprocal, which rounds twice.
    scale = torch.full_like(x_min, 2.0**bits - 1) / torch.clamp(x_max - x_min, min=1e-8)
    zero_point = along(torch.round(scale * x_min) + half, x, axis)
    scale = along(scale, x, axis)
    q = torch.round(scale * x.float() - zero_point).clamp(-half, half - 1)
    return like((q + zero_point) / scale, x)


def fake_quantize_minmax(x: Tensor, bits: int, axis: int | None = None) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    dims = [d for d in range(x.dim()) if d != axis]
    if dims:
        x_min, x_max = x.float().amin(dims), x.float().amax(dims)
    else:
        x_min = x_max = x.float()
    return fake_quantize_range(x, x_min, x_max, bits, axis)

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
    clipped: bool = True,
    parameters: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    position = _affine(x, scale, zero_point, axis)
    q = torch.round(position)
    inside = (q >= quant_min) & (q <= quant_max)
    grad_x = like(torch.where(inside, grad, 0.0), x) if clipped else _unwanted(x)
    if not parameters:
        return grad_x, _unwanted(scale), _unwanted(zero_point)
    q = q.clamp(quant_min, quant_max).double()
    center = torch.where(inside, position.double(), along(zero_point, x, axis).double())
    grad_scale = _sum_to(grad.double() * (q - center), scale, axis)
    shift = torch.where(inside, 0.0, -grad.double() * along(scale, x, axis))
    return grad_x, grad_scale, _sum_to(shift, zero_point, axis)


def _unwanted(t: Tensor) -> Tensor:
    """In place of a result that is not asked for."""
    return t.new_empty(0)


def _sum_to(addends: Tensor, parameter: Tensor, axis: int | None) -> Tensor:
    """`addends`, float64, summed over all that `parameter` does not run along."""
    dims = [d for d in range(addends.dim()) if d != axis]
    total = addends.sum(dims) if dims else addends
    return total.reshape(parameter.shape).to(parameter.dtype)


def fake_quantize_range(
    x: Tensor,
    x_min: Tensor,
    x_max: Tensor,
    bits: int,
    axis: int | None = None,
    clipped: bool = False,
) -> Tensor:
    half = 2.0 ** (bits - 1)
    # number / tensor would multiply by the reciprocal, which rounds twice.
    scale = torch.full_like(x_min, 2.0**bits - 1) / torch.clamp(x_max - x_min, min=1e-8)
    zero_point = along(torch.round(scale * x_min) + half, x, axis)
    scale = along(scale, x, axis)
    q = torch.round(scale * x.float() - zero_point).clamp(-half, half - 1)
    return like((q + zero_point) / scale, x)


def fake_quantize_range_backward(
    grad: Tensor,
    x: Tensor,
    x_min: Tensor,
    x_max: Tensor,
    bits: int,
    axis: int | None = None,
    clipped: bool = True,
    ends: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    v = x.float()  # scalar ranges do not promote
    below, above = v < along(x_min, x, axis), v > along(x_max, x, axis)
    grad_x = like(torch.where(below | above, 0.0, grad), x) if clipped else _unwanted(x)
    if not ends:
        return grad_x, _unwanted(x_min), _unwanted(x_max)
    exact = grad.double()
    y = fake_quantize_range(v, x_min, x_max, bits, axis).double()
    error = torch.where(below | above, 0.0, exact * (y - x.double()))
    stretch = error / along((x_max - x_min).clamp(min=1e-8), x, axis)
    grad_x_min = _sum_to(torch.where(below, exact, -stretch), x_min, axis)
    grad_x_max = _sum_to(torch.where(above, exact, stretch), x_max, axis)
    return grad_x, grad_x_min, grad_x_max


def observe_range(
    x: Tensor, x_min: Tensor, x_max: Tensor, keep: float, include_zero: bool
) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(x.float())
    poison = (low - low) + (high - high)  # NaN where x is not finite
    low, high = low + poison, high + poison
    if include_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    rest = 1 - keep
    return x_min * keep + low * rest, x_max * keep + high * rest


def fake_quantize_minmax(x: Tensor, bits: int, axis: int | None = None) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    dims = [d for d in range(x.dim()) if d != axis]
    if dims:
        x_min, x_max = x.float().amin(dims), x.float().amax(dims)
    else:
        x_min = x_max = x.float()
    return fake_quantize_range(x, x_min, x_max, bits, axis)

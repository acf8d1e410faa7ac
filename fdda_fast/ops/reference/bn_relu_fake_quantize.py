"""Eval-mode batch norm, residual addition, clipping and fake quantisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops.reference._shapes import like
from fdda_fast.ops.reference.class_moments import folded_norm
from fdda_fast.ops.reference.fake_quantize import (
    fake_quantize_range,
    fake_quantize_range_backward,
)


def _normed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What is clipped, and the batch norm's scale, in float32."""
    v, scale = folded_norm(x, weight, bias, running_mean, running_var, eps)
    return (v if residual is None else v + residual.float()), scale


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
    v, _ = _normed(x, weight, bias, running_mean, running_var, eps, residual)
    return like(fake_quantize_range(v.clamp(low, high), x_min, x_max, bits), x)


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
    residual: Tensor | None = None,
    clipped: bool = False,
    range_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    v, scale = _normed(x, weight, bias, running_mean, running_var, eps, residual)
    through, grad_x_min, grad_x_max = fake_quantize_range_backward(
        grad.float(), v.clamp(low, high), x_min, x_max, bits, None, True, range_gradient
    )
    if not clipped:
        through = grad.float()
    through = torch.where((v > low) & (v < high), through, 0.0)
    dims = [d for d in range(x.dim()) if d != 1]
    mean = running_mean.double().view(scale.shape)
    std = (running_var.double() + eps).sqrt().view(scale.shape)
    exact = through.double()
    return (
        like(through * scale, x),
        x.new_empty(0) if residual is None else like(through, x),
        (exact * (x.double() - mean) / std).sum(dims).float(),
        exact.sum(dims).float(),
        grad_x_min,
        grad_x_max,
    )

"""Train-mode batch norm with a weight and a bias per class, on float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops.reference._shapes import like
from fdda_fast.ops.reference.class_moments import class_moments


def conditional_bn_lrelu(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: list[int],
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    group = _group_of(groups, x)
    mean, var, _ = class_moments(x, group, len(groups))
    normalized, _ = _normalized(x, group, mean, var, eps)
    v = _over(weight.double()[labels], x) * normalized + _over(bias.double()[labels], x)
    return like(torch.where(v > 0, v, v * negative_slope), x), mean, var


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
    group = _group_of(groups, x)
    normalized, inverse_std = _normalized(x, group, mean, var, eps)
    scale = weight.double()[labels]
    v = _over(scale, x) * normalized + _over(bias.double()[labels], x)
    grad = torch.where(v > 0, grad_y.double(), grad_y.double() * negative_slope)
    sums = _pixel_sum(grad), _pixel_sum(grad * normalized)
    zeros = grad.new_zeros(weight.shape)
    grad_bias, grad_weight = (zeros.index_add(0, labels, s).float() for s in sums)

    pixels = x.shape[2] * x.shape[3] if x.dim() == 4 else 1
    size = torch.tensor(groups, device=x.device).clamp(min=1).unsqueeze(1) * pixels
    zeros = grad.new_zeros(len(groups), x.shape[1])
    shift, slope = (_over((zeros.index_add(0, group, s * scale) / size)[group], x) for s in sums)
    grad_x = _over(inverse_std, x) * (_over(scale, x) * grad - shift - normalized * slope)
    return like(grad_x, x), grad_weight, grad_bias


def _group_of(groups: list[int], x: Tensor) -> Tensor:
    sizes = torch.tensor(groups, dtype=torch.int64, device=x.device)
    return torch.arange(len(groups), device=x.device).repeat_interleave(sizes)


def _normalized(
    x: Tensor, group: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x - mean) * inverse standard deviation, and the latter [N, C]."""
    inverse_std = (var.double()[group] + eps).rsqrt()
    return (x.double() - _over(mean.double()[group], x)) * _over(inverse_std, x), inverse_std


def _over(values: Tensor, x: Tensor) -> Tensor:
    """[N, C] shaped to broadcast against x."""
    return values[:, :, None, None] if x.dim() == 4 else values


def _pixel_sum(x: Tensor) -> Tensor:
    return x.sum((2, 3)) if x.dim() == 4 else x

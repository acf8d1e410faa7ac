"""Moments per class, alone and beside the batch norm that reads the same tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops.reference._shapes import like


def class_moments(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_labels(labels, num_classes)
    x = x.double().flatten(2) if x.dim() == 4 else x.double().unsqueeze(2)
    count = torch.zeros(num_classes, dtype=torch.int64, device=x.device)
    count.index_add_(0, labels, torch.ones_like(labels))
    size = (count * x.shape[2]).clamp(min=1).double().unsqueeze(1)
    zeros = x.new_zeros(num_classes, x.shape[1])
    mean = zeros.index_add(0, labels, x.sum(2)) / size
    deviation = x - mean[labels].unsqueeze(2)
    var = zeros.index_add(0, labels, deviation.square().sum(2)) / size
    return mean.float(), var.float(), count


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels: expected 0 to {num_classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )


def class_moments_backward(
    grad_mean: Tensor, grad_var: Tensor, x: Tensor, labels: Tensor, mean: Tensor, count: Tensor
) -> Tensor:
    pixels = x.shape[2] * x.shape[3] if x.dim() == 4 else 1
    size = (count * pixels).clamp(min=1).double().unsqueeze(1)
    shape = (*x.shape[:2], 1, 1) if x.dim() == 4 else x.shape
    shift = (grad_mean.double() / size)[labels].reshape(shape)
    slope = (2 * grad_var.double() / size)[labels].reshape(shape)
    return like(shift + (x.double() - mean.double()[labels].reshape(shape)) * slope, x)


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
    y = folded_norm(x, weight, bias, running_mean, running_var, eps)[0]
    if residual is not None:
        y = y + residual.float()
    return like(y.clamp(low, high), x), *class_moments(x, labels, num_classes)


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
    y, scale = folded_norm(x, weight, bias, running_mean, running_var, eps)
    if residual is not None:
        y = y + residual.float()
    through = torch.where((y > low) & (y < high), grad_y.float(), 0.0)
    moments = class_moments_backward(grad_mean, grad_var, x.float(), labels, mean, count)
    grad_residual = x.new_empty(0) if residual is None else like(through, x)
    return like(through * scale + moments, x), grad_residual


def folded_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Eval-mode batch norm on float32, and its scale, broadcast over x."""
    shape = (1, -1, 1, 1) if x.dim() == 4 else (1, -1)
    # In double, since PyTorch's float32 square root is not always the nearest number.
    exact = weight.double() / (running_var.double() + eps).sqrt()
    shift = (bias - running_mean * exact).float().view(shape)
    scale = exact.float().view(shape)
    return x.float() * scale + shift, scale

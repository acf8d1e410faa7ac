"""Eval-mode batch norm, ReLU and the moments of what batch norm reads, in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdda_fast.ops import reference
from fdda_fast.ops._checks import FLOAT_DTYPES, check, check_tensor
from fdda_fast.ops._library import define, register_autograd
from fdda_fast.ops.class_moments import check_classes, fake_moments


def bn_relu_class_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    labels: Tensor,
    num_classes: int,
    relu: bool | float = True,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a frozen network and FDDA's statistics read of one tensor: memory is read once.

    `y = clip((x - running_mean) / sqrt(running_var + eps) * weight + bias + residual)`, computed as
    `x * scale + shift + residual` in float32, and `class_moments(x, labels, num_classes)`.
    Differentiable in x and residual, one pass backward, too; the gradient through y is zero where
    it was clipped. The batch norm's own tensors get no gradient.

    Args:
        x: [N, C, H, W] or [N, C], float32, bfloat16 or float16.
        weight, bias, running_mean, running_var: float32 [C].
        eps: added to running_var.
        labels: [N] int64, 0 to num_classes - 1, on the device of x.
        num_classes: number of classes K.
        relu: True: ReLU; a number: clipped to 0 .. that number (ReLU6: 6.0); False: not clipped.
        residual: of the dtype and shape of x, added before clipping.

    Returns:
        y, of the dtype, shape and strides of x; mean and var, float32 [K, C], see `class_moments`.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or labels do not fit, or a batch norm's tensor requires a gradient.
    """
    check_tensor(x, "x", FLOAT_DTYPES)
    check(x.dim() in (2, 4), "x", "[N, C] or [N, C, H, W]", list(x.shape))
    norm = {"weight": weight, "bias": bias, "running_mean": running_mean}
    for name, tensor in (norm | {"running_var": running_var}).items():
        check_tensor(tensor, name, (torch.float32,), (x.shape[1],))
        check(not tensor.requires_grad, name, "a tensor without gradient", "requires_grad=True")
    check_classes(x, labels, num_classes)
    if residual is not None:
        check_tensor(residual, "residual", (x.dtype,), x.shape)
    low, high = clip_limits(relu)
    return torch.ops.fdda.bn_relu_class_moments(
        x, weight, bias, running_mean, running_var, eps, labels, num_classes, low, high, residual
    )[:3]


def clip_limits(relu: bool | float) -> tuple[float, float]:
    """The limits that `relu` (True, False, a number > 0) stands for; ValueError for others."""
    check(isinstance(relu, bool) or relu > 0, "relu", "True, False or a number > 0", relu)
    return -math.inf if relu is False else 0.0, math.inf if isinstance(relu, bool) else float(relu)


def _fake(x, weight, bias, running_mean, running_var, eps, labels, num_classes, *_):
    return torch.empty_like(x), *fake_moments(x, labels, num_classes)


def _fake_backward(grad_y, grad_mean, grad_var, x, *rest):
    residual = rest[-1]  # a number where it is left out
    has_residual = isinstance(residual, Tensor)
    return torch.empty_like(x), torch.empty_like(x) if has_residual else x.new_empty(0)


def _setup(ctx, inputs: tuple, output: tuple) -> None:
    *norm, ctx.eps, labels, _, ctx.low, ctx.high, residual = inputs
    _, mean, _, count = output
    ctx.mark_non_differentiable(count)
    ctx.save_for_backward(*norm, labels, mean, count, residual)


def _backward(ctx, grad_y: Tensor, grad_mean: Tensor, grad_var: Tensor, _: Tensor | None) -> tuple:
    *norm, labels, mean, count, residual = ctx.saved_tensors
    grad, grad_residual = torch.ops.fdda.bn_relu_class_moments_backward(
        grad_y,
        grad_mean,
        grad_var,
        *norm,
        ctx.eps,
        labels,
        mean,
        count,
        ctx.low,
        ctx.high,
        residual,
    )
    return grad, *[None] * 9, None if residual is None else grad_residual


_NORM = "Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var, float eps"

define(
    f"bn_relu_class_moments(Tensor x, {_NORM}, Tensor labels, int num_classes, float low, "
    "float high, Tensor? residual=None) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.bn_relu_class_moments,
    _fake,
)
register_autograd("bn_relu_class_moments", _backward, _setup)

define(
    "bn_relu_class_moments_backward(Tensor grad_y, Tensor grad_mean, Tensor grad_var, Tensor x, "
    f"{_NORM}, Tensor labels, Tensor mean, Tensor count, float low, float high, "
    "Tensor? residual=None) -> (Tensor, Tensor)",
    reference.bn_relu_class_moments_backward,
    _fake_backward,
)

"""Conditional batch norm, LeakyReLU and a 3x3 convolution with few outputs: a generator's end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdda_fast.ops._checks import check
from fdda_fast.ops._layout import empty_channels_last
from fdda_fast.ops._library import define, register_autograd
from fdda_fast.ops.conditional_bn import check_conditional_bn
from fdda_fast.ops.convolutions import check_convolution


def conditional_bn_lrelu_conv3x3(
    x: Tensor,
    labels: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    groups: Sequence[int],
    eps: float,
    negative_slope: float,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`conv3x3_few_outputs(conditional_bn_lrelu(x, ...)[0], weight, bias)`.

    On the CPU the tensor in between, as large as x, is never stored, nor is its gradient: both are
    made anew strip by strip, where they stay in cache. Elsewhere the two operators run.

    Args:
        x: [N, Cin, H, W], float32, bfloat16 or float16; channels_last is the fast layout.
        labels, norm_weight, norm_bias, groups, eps, negative_slope: see `conditional_bn_lrelu`.
        weight, bias: float32 [Cout, Cin, 3, 3] and [Cout], see `conv3x3_few_outputs`.

    Returns:
        y [N, Cout, H, W] of the dtype of x, channels_last; mean and biased var of every group,
        float32 [len(groups), Cin], without gradient.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes, labels or groups do not fit.
    """
    check(x.dim() == 4, "x", "[N, Cin, H, W]", list(x.shape))
    groups = check_conditional_bn(x, labels, norm_weight, norm_bias, groups, eps, negative_slope)
    check_convolution(x, weight, bias)
    return torch.ops.fdda.conditional_bn_lrelu_conv3x3(
        x, labels, norm_weight, norm_bias, groups, eps, negative_slope, weight, bias
    )


def _composed(x, labels, norm_weight, norm_bias, groups, eps, negative_slope, weight, bias):
    y, mean, var = torch.ops.fdda.conditional_bn_lrelu(
        x, labels, norm_weight, norm_bias, groups, eps, negative_slope
    )
    return torch.ops.fdda.conv3x3_few_outputs(y, weight, bias), mean, var


def _composed_backward(
    grad_y, x, labels, norm_weight, norm_bias, mean, var, weight, groups, eps, negative_slope
):
    norm = labels, norm_weight, norm_bias
    y, *_ = torch.ops.fdda.conditional_bn_lrelu(x, *norm, groups, eps, negative_slope)
    grad, *grads = torch.ops.fdda.conv3x3_few_outputs_backward(grad_y, y, weight)
    return *torch.ops.fdda.conditional_bn_lrelu_backward(
        grad, x, *norm, mean, var, groups, eps, negative_slope
    ), *grads


def _fake(x, labels, norm_weight, norm_bias, groups, eps, negative_slope, weight, bias):
    mean, var = (norm_weight.new_empty(len(groups), x.shape[1]) for _ in range(2))
    return empty_channels_last(x, len(weight)), mean, var


def _fake_backward(grad_y, x, labels, norm_weight, norm_bias, mean, var, weight, *_):
    return (
        torch.empty_like(x),
        torch.empty_like(norm_weight),
        torch.empty_like(norm_bias),
        weight.new_empty(weight.shape),
        weight.new_empty(len(weight)),
    )


def _setup(ctx, inputs: tuple, output: tuple) -> None:
    x, labels, norm_weight, norm_bias, *ctx.settings, weight, _ = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, labels, norm_weight, norm_bias, mean, var, weight)


def _backward(ctx, grad_y: Tensor, *_: Tensor | None) -> tuple:
    grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias = (
        torch.ops.fdda.conditional_bn_lrelu_conv3x3_backward(
            grad_y, *ctx.saved_tensors, *ctx.settings
        )
    )
    settings = (None,) * len(ctx.settings)
    return grad_x, None, grad_norm_weight, grad_norm_bias, *settings, grad_weight, grad_bias


_SETTINGS = "int[] groups, float eps, float negative_slope"
_NORM = "Tensor labels, Tensor norm_weight, Tensor norm_bias"

define(
    f"conditional_bn_lrelu_conv3x3(Tensor x, {_NORM}, {_SETTINGS}, Tensor weight, Tensor bias) "
    "-> (Tensor, Tensor, Tensor)",
    _composed,
    _fake,
)
define(
    f"conditional_bn_lrelu_conv3x3_backward(Tensor grad_y, Tensor x, {_NORM}, Tensor mean, "
    f"Tensor var, Tensor weight, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _composed_backward,
    _fake_backward,
)
register_autograd("conditional_bn_lrelu_conv3x3", _backward, _setup)

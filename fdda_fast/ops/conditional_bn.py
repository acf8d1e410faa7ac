"""Train-mode batch norm with a weight and a bias per class, then LeakyReLU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fdda_fast.ops import reference
from fdda_fast.ops._checks import FLOAT_DTYPES, check, check_int, check_tensor
from fdda_fast.ops._library import define, register_autograd
from fdda_fast.ops.class_moments import check_classes


def conditional_bn_lrelu(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: Sequence[int],
    eps: float,
    negative_slope: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Several batches at once through class-conditional batch norm (de Vries et al. 2017).

    `y = leaky_relu(weight[label] * (x - mean) / sqrt(var + eps) + bias[label])`, each group of
    samples with its own batch statistics, as `class_moments` computes them. Differentiable in x
    (through the statistics, too), weight and bias. Forward: the statistics and one pass; backward:
    one pass for the sums, one for the gradient of x.

    Args:
        x: [N, C, H, W] or [N, C], float32, bfloat16 or float16.
        labels: [N] int64, 0 to K - 1, on the device of x.
        weight, bias: float32 [K, C].
        groups: sizes of consecutive groups of samples; they sum to N.
        eps: added to the variance.
        negative_slope: of LeakyReLU; 1.0: no activation.

    Returns:
        y, of the dtype, shape and strides of x; mean and biased var of every group, float32
        [len(groups), C], without gradient.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes, labels or groups do not fit.
    """
    groups = check_conditional_bn(x, labels, weight, bias, groups, eps, negative_slope)
    return torch.ops.fdda.conditional_bn_lrelu(x, labels, weight, bias, groups, eps, negative_slope)


def check_conditional_bn(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: Sequence[int],
    eps: float,
    negative_slope: float,
) -> list[int]:
    """The groups as a list; raises what the operators document."""
    check_tensor(x, "x", FLOAT_DTYPES)
    check(x.dim() in (2, 4), "x", "[N, C] or [N, C, H, W]", list(x.shape))
    check_tensor(weight, "weight", (torch.float32,), (None, x.shape[1]))
    check_tensor(bias, "bias", (torch.float32,), weight.shape)
    check_classes(x, labels, len(weight))
    groups = list(groups)
    for size in groups:
        check_int(size, "groups", 0, 2**31 - 1)
    check(sum(groups) == x.shape[0], "groups", f"a sum of {x.shape[0]}", groups)
    check(eps > 0, "eps", "a number > 0", eps)
    check(math.isfinite(negative_slope), "negative_slope", "a finite number", negative_slope)
    return groups


def _fake(x, labels, weight, bias, groups, eps, negative_slope):
    moments = (len(groups), x.shape[1])
    mean, var = (x.new_empty(moments, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, var


def _fake_backward(grad_y, x, labels, weight, bias, *_):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _setup(ctx, inputs: tuple, output: tuple) -> None:
    x, labels, weight, bias, *ctx.settings = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, labels, weight, bias, mean, var)


def _backward(ctx, grad_y: Tensor, *_: Tensor | None) -> tuple:
    grad_x, grad_weight, grad_bias = torch.ops.fdda.conditional_bn_lrelu_backward(
        grad_y, *ctx.saved_tensors, *ctx.settings
    )
    return grad_x, None, grad_weight, grad_bias, None, None, None


_SETTINGS = "int[] groups, float eps, float negative_slope"

define(
    f"conditional_bn_lrelu(Tensor x, Tensor labels, Tensor weight, Tensor bias, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor)",
    reference.conditional_bn_lrelu,
    _fake,
)
register_autograd("conditional_bn_lrelu", _backward, _setup)

define(
    "conditional_bn_lrelu_backward(Tensor grad_y, Tensor x, Tensor labels, Tensor weight, "
    f"Tensor bias, Tensor mean, Tensor var, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    reference.conditional_bn_lrelu_backward,
    _fake_backward,
)

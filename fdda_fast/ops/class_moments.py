"""Mean and variance per class and channel, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops import reference
from fdda_fast.ops._checks import FLOAT_DTYPES, check, check_int, check_tensor
from fdda_fast.ops._library import define, register_autograd


def class_moments(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of every channel over the samples (and pixels) of each class.

    Differentiable in x through both. The same input gives the same bits whatever the number of
    threads; nothing cancels, however far the mean lies from 0 (Chan, Golub and LeVeque 1979).

    Args:
        x: [N, C, H, W] or [N, C], float32, bfloat16 or float16.
        labels: [N] int64, 0 to num_classes - 1, on the device of x.
        num_classes: number of classes K.

    Returns:
        mean [K, C] float32, var [K, C] float32, count [K] int64 (samples). A class without samples
        has zeros.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or labels do not fit. Labels on other devices than the CPU are not
            checked.
    """
    check_tensor(x, "x", FLOAT_DTYPES)
    check(x.dim() in (2, 4), "x", "[N, C] or [N, C, H, W]", list(x.shape))
    check_classes(x, labels, num_classes)
    return torch.ops.fdda.class_moments(x, labels, num_classes)


def check_classes(x: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raises TypeError or ValueError unless labels, on the CPU, are those of x."""
    check_tensor(labels, "labels", (torch.int64,), (x.shape[0],))
    check(labels.device == x.device, "labels", f"a tensor on {x.device}", labels.device)
    check_int(num_classes, "num_classes", 1, 2**31 - 1)
    if labels.numel() and labels.is_cpu and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(labels))
        check(
            low >= 0 and high < num_classes,
            "labels",
            f"0 to {num_classes - 1}",
            f"{low} to {high}",
        )


def fake_moments(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    moments = (num_classes, x.shape[1])
    return (
        x.new_empty(moments, dtype=torch.float32),
        x.new_empty(moments, dtype=torch.float32),
        x.new_empty(num_classes, dtype=torch.int64),
    )


def _fake_backward(
    grad_mean: Tensor, grad_var: Tensor, x: Tensor, labels: Tensor, mean: Tensor, count: Tensor
) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx, inputs: tuple, output: tuple) -> None:
    x, labels, _ = inputs
    mean, _, count = output
    ctx.mark_non_differentiable(count)
    ctx.save_for_backward(x, labels, mean, count)


def _backward(ctx, grad_mean: Tensor, grad_var: Tensor, _: Tensor | None) -> tuple:
    x, labels, mean, count = ctx.saved_tensors
    grad = torch.ops.fdda.class_moments_backward(grad_mean, grad_var, x, labels, mean, count)
    return grad, None, None


define(
    "class_moments(Tensor x, Tensor labels, int num_classes) -> (Tensor, Tensor, Tensor)",
    reference.class_moments,
    fake_moments,
)
register_autograd("class_moments", _backward, _setup)

define(
    "class_moments_backward(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor labels, "
    "Tensor mean, Tensor count) -> Tensor",
    reference.class_moments_backward,
    _fake_backward,
)

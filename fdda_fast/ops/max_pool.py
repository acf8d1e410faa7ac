"""Max pooling for training: a byte per output instead of the input and eight bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fdda_fast.ops import reference
from fdda_fast.ops._checks import FLOAT_DTYPES, check_tensor
from fdda_fast.ops._library import define, define_pass, register_autograd
from fdda_fast.ops._windows import Pair, output_size, pool_windows

_MOST_TAPS = 255


def max_pool2d(
    x: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling, differentiable; arguments as in `torch.nn.functional.max_pool2d`.

    On the CPU its backward needs one byte per output, the place of the maximum in its window, where
    the framework keeps the input and an int64 per output. The first of equal values is the
    maximum, NaN where there is one.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16; channels_last is the fast layout.
        kernel_size: (rows, columns) or one number for both.
        stride: (rows, columns) or one number for both.
        padding: (rows, columns) or one number for both, at most half the kernel; never the maximum.
        dilation: (rows, columns) or one number for both.
        ceil_mode: whether a last, partial window counts.

    Returns:
        [N, C, OH, OW] of the dtype of x, channels_last.

    Raises:
        TypeError: x has another dtype.
        ValueError: shapes do not fit.
    """
    check_tensor(x, "x", FLOAT_DTYPES, (None,) * 4)
    windows = pool_windows(kernel_size, stride, padding, dilation)
    output_size(x.shape[2:], *windows)
    if x.device.type != "cpu" or windows[0][0] * windows[0][1] > _MOST_TAPS:
        y = F.max_pool2d(x, *windows, ceil_mode)
        return y.contiguous(memory_format=torch.channels_last)
    return torch.ops.fdda.max_pool2d(x, *windows, ceil_mode)[0]


def _fake(x: Tensor, *windows: list[int] | bool) -> tuple[Tensor, Tensor]:
    batch, channels, *size = x.shape
    y = x.new_empty(batch, *output_size(size, *windows), channels)
    tap = torch.empty_like(y, dtype=torch.uint8)
    return y.permute(0, 3, 1, 2), tap.permute(0, 3, 1, 2)


def _fake_backward(
    grad_y: Tensor, tap: Tensor, size: list[int], *windows: list[int] | bool
) -> Tensor:
    batch, channels = grad_y.shape[:2]
    return grad_y.new_empty(batch, *size, channels).permute(0, 3, 1, 2)


def _setup(ctx, inputs: tuple, output: tuple) -> None:
    x, *windows = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.size, ctx.windows = list(x.shape[2:]), windows


def _backward(ctx, grad_y: Tensor, _: Tensor | None) -> tuple:
    (tap,) = ctx.saved_tensors
    grad_x = torch.ops.fdda.max_pool2d_backward(grad_y, tap, ctx.size, *ctx.windows)
    return grad_x, *[None] * 5


_WINDOWS = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"
define(f"max_pool2d(Tensor x, {_WINDOWS}) -> (Tensor, Tensor)", reference.max_pool2d, _fake)
define(
    f"max_pool2d_backward(Tensor grad_y, Tensor tap, int[] size, {_WINDOWS}) -> Tensor",
    reference.max_pool2d_backward,
    _fake_backward,
)
register_autograd("max_pool2d", _backward, _setup)
define_pass(f"_max_pool2d(Tensor x, Tensor(a!) y, Tensor(b!) tap, {_WINDOWS}) -> ()")
define_pass(f"_max_pool2d_gradient(Tensor grad_y, Tensor tap, Tensor(a!) grad_x, {_WINDOWS}) -> ()")

"""CPU implementation of max_pool2d: memory for the compiled passes."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops._layout import nhwc
from fdda_fast.ops._windows import output_size


def max_pool2d(x: Tensor, *windows: list[int] | bool) -> tuple[Tensor, Tensor]:
    x = nhwc(x)
    batch, height, width, channels = x.shape
    y = x.new_empty(batch, *output_size((height, width), *windows), channels)
    tap = torch.empty_like(y, dtype=torch.uint8)
    torch.ops.fdda._max_pool2d(x, y, tap, *windows)
    return y.permute(0, 3, 1, 2), tap.permute(0, 3, 1, 2)


def max_pool2d_backward(
    grad_y: Tensor, tap: Tensor, size: list[int], *windows: list[int] | bool
) -> Tensor:
    grad_y, tap = nhwc(grad_y), nhwc(tap)
    grad_x = grad_y.new_empty(len(grad_y), *size, grad_y.shape[3])
    torch.ops.fdda._max_pool2d_gradient(grad_y, tap, grad_x, *windows)
    return grad_x.permute(0, 3, 1, 2)

"""Max pooling that tells each maximum by its place in the window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def max_pool2d(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    y, index = F.max_pool2d(
        x, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
    )
    row, column = index // x.shape[3], index % x.shape[3]
    top, left = _corners(y, stride, padding)
    tap = (row - top) // dilation[0] * kernel_size[1] + (column - left) // dilation[1]
    y, tap = (t.contiguous(memory_format=torch.channels_last) for t in (y, tap.to(torch.uint8)))
    return y, tap


def max_pool2d_backward(
    grad_y: Tensor,
    tap: Tensor,
    size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> Tensor:
    top, left = _corners(grad_y, stride, padding)
    row = top + tap.long() // kernel_size[1] * dilation[0]
    column = left + tap.long() % kernel_size[1] * dilation[1]
    grad_x = grad_y.new_zeros(*grad_y.shape[:2], size[0] * size[1], dtype=torch.float32)
    grad_x.scatter_add_(2, (row * size[1] + column).flatten(2), grad_y.float().flatten(2))
    grad_x = grad_x.unflatten(2, size).to(grad_y.dtype)
    return grad_x.contiguous(memory_format=torch.channels_last)


def _corners(y: Tensor, stride: list[int], padding: list[int]) -> tuple[Tensor, Tensor]:
    """Top [OH, 1] and left [OW] of the windows."""
    rows, columns = (torch.arange(n, device=y.device) for n in y.shape[2:])
    return (rows * stride[0] - padding[0])[:, None], columns * stride[1] - padding[1]

"""Convolutions for which the library's kernels do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv3x3_few_outputs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`fdda::conv3x3_few_outputs`; see `fdda_fast.ops.conv3x3_few_outputs`."""
    y = F.conv2d(_channels_last(x), _weight(weight, x), bias.to(x.dtype), padding=1)
    return _channels_last(y)


def conv3x3_few_outputs_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`fdda::conv3x3_few_outputs_backward`: gradients of x, weight and bias."""
    one = [1, 1]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        _channels_last(grad_y), _channels_last(x), _weight(weight, x), None, one, one, one, False,
        [0, 0], 1, [True, True, False],
    )  # fmt: skip
    grad_bias = grad_y.sum((0, 2, 3), dtype=torch.float32)
    return _channels_last(grad_x), grad_weight.float().contiguous(), grad_bias


def _weight(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(x.dtype, memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)

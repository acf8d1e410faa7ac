"""CPU implementation of linear_to_maps: memory for the compiled passes."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops._layout import nhwc


def linear_to_maps(
    z: Tensor, weight: Tensor, bias: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    channels = len(weight) // (size[0] * size[1])
    y = z.new_empty(len(z), *size, channels, dtype=dtype)
    torch.ops.fdda._linear_maps(z.contiguous(), weight.contiguous(), bias.contiguous(), y)
    return y.permute(0, 3, 1, 2)


def linear_to_maps_backward(grad_y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    grad_bias = z.new_empty(grad_y.shape[1:].numel())
    grad_weight = z.new_empty(len(grad_bias), z.shape[1])
    torch.ops.fdda._linear_maps_gradient(nhwc(grad_y), z.contiguous(), grad_weight, grad_bias)
    return grad_weight, grad_bias

"""A linear layer whose outputs are feature maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_to_maps(
    z: Tensor, weight: Tensor, bias: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    y = F.linear(z, weight, bias).unflatten(1, (len(weight) // (size[0] * size[1]), *size))
    return y.to(dtype).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def linear_to_maps_backward(grad_y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad_y.float().flatten(1)
    return grad.t() @ z, grad.sum(0)

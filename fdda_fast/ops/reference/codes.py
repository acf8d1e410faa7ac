"""Out of codes."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_pool_codes(x: Tensor) -> Tensor:
    return x.sum(dim=(1, 2), dtype=torch.int32)


def dequantize_codes(x: Tensor, scale: float, zero_point: int) -> Tensor:
    # GPUs divide by a number in multiplying by its inverse; by a tensor they do divide.
    divisor = torch.full((), scale, dtype=torch.float32, device=x.device)
    return ((x.float() - zero_point) / divisor).contiguous()


def dequantize_sums(x: Tensor, count: int, scale: float, zero_point: int) -> Tensor:
    divisor = torch.full((), scale * count, dtype=torch.float64, device=x.device)
    return ((x.double() - zero_point * count) / divisor).float().contiguous()

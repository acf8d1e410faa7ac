"""Out of codes, and codes two to a byte."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops.reference.packed import requantize_codes

PACKED_CHANNELS = 32  # that share 16 bytes


def sum_pool_codes(x: Tensor) -> Tensor:
    return x.sum(dim=(1, 2), dtype=torch.int32)


def pack_codes(x: Tensor) -> Tensor:
    low, high = x.unflatten(-1, (-1, 2, PACKED_CHANNELS // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack_codes(packed: Tensor) -> Tensor:
    packed = packed.unflatten(-1, (-1, PACKED_CHANNELS // 2))
    return torch.stack([packed & 15, packed >> 4], -2).flatten(-3)


def requantize_codes_packed(
    x: Tensor, x_scale: float, x_zero_point: int, scale: float, zero_point: float, bits: int
) -> Tensor:
    return pack_codes(requantize_codes(x, x_scale, x_zero_point, scale, zero_point, bits))


def dequantize_codes(x: Tensor, scale: float, zero_point: int) -> Tensor:
    # GPUs divide by a number in multiplying by its inverse; by a tensor they do divide.
    divisor = torch.full((), scale, dtype=torch.float32, device=x.device)
    return ((x.float() - zero_point) / divisor).contiguous()


def dequantize_sums(x: Tensor, count: int, scale: float, zero_point: int) -> Tensor:
    divisor = torch.full((), scale * count, dtype=torch.float64, device=x.device)
    return ((x.double() - zero_point * count) / divisor).float().contiguous()

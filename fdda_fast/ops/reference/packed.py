"""Integer operators on packed weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL_ROWS = 16
BLOCK_DEPTH = 4


def pack_weight(q: Tensor, bits: int) -> Tensor:
    rows, cols = q.shape
    panels, blocks = -(-rows // PANEL_ROWS), -(-cols // BLOCK_DEPTH)
    codes = q.to(torch.int64)
    codes = F.pad(codes, (0, blocks * BLOCK_DEPTH - cols, 0, panels * PANEL_ROWS - rows))
    codes = codes.reshape(panels, PANEL_ROWS, blocks, BLOCK_DEPTH).transpose(1, 2)
    codes = codes.reshape(panels, blocks, 1, 8, 8)
    plane = torch.arange(bits, device=q.device).reshape(bits, 1, 1)
    bit = torch.arange(8, device=q.device)
    return ((codes >> plane & 1) << bit).sum(-1).to(torch.uint8)


def unpack_weight(packed: Tensor, bits: int, num_rows: int, num_cols: int) -> Tensor:
    panels, blocks = -(-num_rows // PANEL_ROWS), -(-num_cols // BLOCK_DEPTH)
    planes = packed.reshape(panels, blocks, bits, 8, 1).to(torch.int64)
    ones = planes >> torch.arange(8, device=packed.device) & 1
    weights = 1 << torch.arange(bits, device=packed.device)
    weights[-1] = -weights[-1]
    codes = (ones.flatten(3) * weights.reshape(bits, 1)).sum(2)
    codes = codes.reshape(panels, blocks, PANEL_ROWS, BLOCK_DEPTH).transpose(1, 2)
    codes = codes.reshape(panels * PANEL_ROWS, blocks * BLOCK_DEPTH)
    return codes[:num_rows, :num_cols].to(torch.int8).contiguous()


def _epilogue(
    acc: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    residual_scale: float,
    output_range: list[int] | None,
) -> Tensor:
    v = acc.double().float() * multiplier + bias
    if residual is not None:
        v = v + residual.float() * _float32(residual_scale, acc)
    if output_range is None:
        return v.contiguous()
    low, high = output_range
    return torch.round(v.nan_to_num(low)).clamp(low, high).to(torch.uint8).contiguous()


def packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bits: int,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    x_zero_point: int,
    weight_offset: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    residual_scale: float = 0.0,
    output_range: list[int] | None = None,
) -> Tensor:
    batch, height, width, channels = x.shape
    depth, taps = channels // groups, kernel_size[0] * kernel_size[1]
    out_height, out_width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(
            (height, width), padding, dilation, kernel_size, stride, strict=True
        )
    )
    # Zero padding of x - x_zero_point; columns come in the order (channel, tap).
    values = (x.double() - x_zero_point).permute(0, 3, 1, 2)
    columns = F.unfold(values, kernel_size, dilation, padding, stride)
    columns = columns.reshape(batch, groups, depth * taps, out_height * out_width)
    q = unpack_weight(weight, bits, out_channels, taps * depth).double()
    q = q.reshape(groups, out_channels // groups, taps, depth).transpose(2, 3).flatten(2)
    products = torch.matmul(q, columns).long().flatten(1, 2)
    inputs = columns.sum(2).long().repeat_interleave(out_channels // groups, 1)
    acc = products + weight_offset.unsqueeze(1) * inputs
    acc = acc.transpose(1, 2).reshape(batch, out_height, out_width, out_channels)
    return _epilogue(acc, multiplier, bias, residual, residual_scale, output_range)


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bits: int,
    out_features: int,
    x_zero_point: int,
    weight_offset: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    residual_scale: float = 0.0,
    output_range: list[int] | None = None,
) -> Tensor:
    q = unpack_weight(weight, bits, out_features, x.shape[1]).double()
    values = x.double() - x_zero_point
    products = torch.zeros(x.shape[0], out_features, dtype=torch.int64, device=x.device)
    step = 8192  # 2^13 products below 2^33 * 2^7
    for start in range(0, x.shape[1], step):
        piece = slice(start, start + step)
        products += torch.matmul(values[:, piece], q[:, piece].T).long()
    acc = products + weight_offset * values.long().sum(1, keepdim=True)
    return _epilogue(acc, multiplier, bias, residual, residual_scale, output_range)


def quantize(x: Tensor, scale: float, zero_point: float, bits: int) -> Tensor:
    codes = _codes(x, scale, zero_point, bits)
    return (codes.permute(0, 2, 3, 1) if x.dim() == 4 else codes).contiguous()


def requantize_codes(
    x: Tensor, x_scale: float, x_zero_point: int, scale: float, zero_point: float, bits: int
) -> Tensor:
    values = (x.float() - x_zero_point) / _float32(x_scale, x)
    return _codes(values, scale, zero_point, bits).contiguous()


def _float32(value: float, like: Tensor) -> Tensor:
    """Filled on the device: a copy to it could not be captured in a CUDA graph."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _codes(x: Tensor, scale: float, zero_point: float, bits: int) -> Tensor:
    half = 2.0 ** (bits - 1)
    q = _float32(scale, x) * x - _float32(zero_point, x)
    return (torch.round(q).clamp(-half, half - 1) + half).to(torch.uint8)


def max_pool2d_codes(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> Tensor:
    values = x.permute(0, 3, 1, 2).float()
    y = F.max_pool2d(values, kernel_size, stride, padding, dilation, ceil_mode)
    return y.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

"""Every operator in plain PyTorch: the definition the kernels are tested against.

Signatures are those of the `fdda::` schemas. Integer results are exact: sums run in float64 where
they stay below 2^53, else in int64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL_ROWS = 16
BLOCK_DEPTH = 4


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """`values` shaped to broadcast against x along `axis`."""
    if axis is None:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y with dtype and strides of empty_like(x)."""
    return torch.empty_like(x).copy_(y)


def _affine(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    return x.float() / _along(scale, x, axis) + _along(zero_point, x, axis)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    clipped: bool = False,
) -> Tensor:
    q = torch.round(_affine(x, scale, zero_point, axis)).clamp(quant_min, quant_max)
    q = q + 0.0  # a code has no sign of zero
    return _like((q - _along(zero_point, x, axis)) * _along(scale, x, axis), x)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    q = torch.round(_affine(x, scale, zero_point, axis))
    inside = (q >= quant_min) & (q <= quant_max)
    return _like(torch.where(inside, grad, 0.0), x)


def fake_quantize_range(
    x: Tensor, x_min: Tensor, x_max: Tensor, bits: int, axis: int | None = None
) -> Tensor:
    half = 2.0 ** (bits - 1)
    # number / tensor would multiply by the reciprocal, which rounds twice.
    scale = torch.full_like(x_min, 2.0**bits - 1) / torch.clamp(x_max - x_min, min=1e-8)
    zero_point = _along(torch.round(scale * x_min) + half, x, axis)
    scale = _along(scale, x, axis)
    q = torch.round(scale * x.float() - zero_point).clamp(-half, half - 1)
    return _like((q + zero_point) / scale, x)


def fake_quantize_minmax(x: Tensor, bits: int, axis: int | None = None) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    dims = [d for d in range(x.dim()) if d != axis]
    if dims:
        x_min, x_max = x.float().amin(dims), x.float().amax(dims)
    else:
        x_min = x_max = x.float()
    return fake_quantize_range(x, x_min, x_max, bits, axis)


def class_moments(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_labels(labels, num_classes)
    x = x.double().flatten(2) if x.dim() == 4 else x.double().unsqueeze(2)
    count = torch.zeros(num_classes, dtype=torch.int64, device=x.device)
    count.index_add_(0, labels, torch.ones_like(labels))
    size = (count * x.shape[2]).clamp(min=1).double().unsqueeze(1)
    zeros = x.new_zeros(num_classes, x.shape[1])
    mean = zeros.index_add(0, labels, x.sum(2)) / size
    deviation = x - mean[labels].unsqueeze(2)
    var = zeros.index_add(0, labels, deviation.square().sum(2)) / size
    return mean.float(), var.float(), count


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels: expected 0 to {num_classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )


def class_moments_backward(
    grad_mean: Tensor, grad_var: Tensor, x: Tensor, labels: Tensor, mean: Tensor, count: Tensor
) -> Tensor:
    pixels = x.shape[2] * x.shape[3] if x.dim() == 4 else 1
    size = (count * pixels).clamp(min=1).double().unsqueeze(1)
    shape = (*x.shape[:2], 1, 1) if x.dim() == 4 else x.shape
    shift = (grad_mean.double() / size)[labels].reshape(shape)
    slope = (2 * grad_var.double() / size)[labels].reshape(shape)
    return _like(shift + (x.double() - mean.double()[labels].reshape(shape)) * slope, x)


def bn_relu_class_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    labels: Tensor,
    num_classes: int,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = _folded_norm(x, weight, bias, running_mean, running_var, eps)[0].clamp(low, high)
    return _like(y, x), *class_moments(x, labels, num_classes)


def bn_relu_class_moments_backward(
    grad_y: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    labels: Tensor,
    mean: Tensor,
    count: Tensor,
    low: float,
    high: float,
) -> Tensor:
    y, scale = _folded_norm(x, weight, bias, running_mean, running_var, eps)
    through = torch.where((y > low) & (y < high), grad_y.float() * scale, 0.0)
    moments = class_moments_backward(grad_mean, grad_var, x.float(), labels, mean, count)
    return _like(through + moments, x)


def _folded_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Eval-mode batch norm on float32, and its scale, broadcast over x."""
    shape = (1, -1, 1, 1) if x.dim() == 4 else (1, -1)
    # In double, since PyTorch's float32 square root is not always the nearest number.
    exact = weight.double() / (running_var.double() + eps).sqrt()
    shift = (bias - running_mean * exact).float().view(shape)
    scale = exact.float().view(shape)
    return x.float() * scale + shift, scale


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
        scale = torch.tensor(residual_scale, dtype=torch.float32, device=acc.device)
        v = v + residual.float() * scale
    if output_range is None:
        return v.contiguous()
    return torch.round(v).clamp(*output_range).to(torch.uint8).contiguous()


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
    values = (x.float() - x_zero_point) / torch.tensor(
        x_scale, dtype=torch.float32, device=x.device
    )
    return _codes(values, scale, zero_point, bits).contiguous()


def _codes(x: Tensor, scale: float, zero_point: float, bits: int) -> Tensor:
    half = 2.0 ** (bits - 1)
    fp32 = {"dtype": torch.float32, "device": x.device}
    q = torch.tensor(scale, **fp32) * x - torch.tensor(zero_point, **fp32)
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

"""CPU implementation of conditional_bn_lrelu_conv3x3 and of its likes on given statistics.

Forward: the statistics, then every strip is normalised just before its matrix product; the
normalised tensor lives in strips. Backward:
the gradient of the normalised tensor is a matrix product of 9 * Cout terms, cheaper to compute
twice than to store: once for the sums that batch norm needs of it, once for the gradient of x.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fdda_fast.ops import _few_outputs
from fdda_fast.ops._few_outputs import StripMemory, backward_strips, taps_of
from fdda_fast.ops._layout import nhwc
from fdda_fast.ops._products import PixelProduct, multiply, prefers_own
from fdda_fast.ops._strips import Strip

_FEW_CHANNELS = 16  # fill no vector: then a row counts as a pixel of as many channels as it has


def conditional_bn_lrelu_conv3x3(
    x: Tensor,
    labels: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    groups: list[int],
    eps: float,
    negative_slope: float,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = labels, norm_weight, norm_bias
    if x.dtype == torch.float16:
        y, *moments = conditional_bn_lrelu_conv3x3(
            x.float(), *norm, groups, eps, negative_slope, weight, bias
        )
        return y.half(), *moments
    group = _group_of(groups)
    mean, var, _ = torch.ops.fdda.class_moments(x, group, len(groups))
    tables = _tables(group, *norm, mean, var, eps)
    return fixed_bn_lrelu_conv3x3(x, tables, negative_slope, weight, bias), mean, var


def fixed_bn_lrelu_conv3x3(
    x: Tensor, tables: Tensor, negative_slope: float, weight: Tensor, bias: Tensor
) -> Tensor:
    if x.dtype == torch.float16:
        return fixed_bn_lrelu_conv3x3(x.float(), tables, negative_slope, weight, bias).half()
    x, tables = nhwc(x), tables.contiguous()
    memory = StripMemory(x)

    def normalized(strip: Strip) -> Tensor:
        values = memory.pixels(strip)
        torch.ops.fdda._norm_strip(x, tables, negative_slope, values, *strip.place())
        return values

    return _few_outputs.forward(x, weight, bias, normalized)


def fixed_bn_lrelu(x: Tensor, tables: Tensor, negative_slope: float) -> Tensor:
    if x.dtype == torch.float16:
        return fixed_bn_lrelu(x.float(), tables, negative_slope).half()
    x = nhwc(x)
    y = torch.empty_like(x)
    if x.numel():
        batch, height, width, channels = x.shape
        if channels < _FEW_CHANNELS:
            x, tables = x.view(batch, height, 1, -1), tables.repeat(1, 1, width)
        whole = Strip(0, batch, 0, height)
        torch.ops.fdda._norm_strip(x, tables.contiguous(), negative_slope, y, *whole.place())
    return y.permute(0, 3, 1, 2)


@torch.no_grad()
def conditional_bn_lrelu_conv3x3_backward(
    grad_y: Tensor,
    x: Tensor,
    labels: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    groups: list[int],
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    norm = labels, norm_weight, norm_bias
    if x.dtype == torch.float16:
        grad_x, *rest = conditional_bn_lrelu_conv3x3_backward(
            grad_y.float(), x.float(), *norm, mean, var, weight, groups, eps, negative_slope
        )
        return torch.empty_like(x).copy_(grad_x), *rest
    grad_result = torch.empty_like(x)
    x, grad_y, grad_x = nhwc(x), nhwc(grad_y), nhwc(grad_result)
    group = _group_of(groups)
    tables = _tables(group, *norm, mean, var, eps)
    taps = taps_of(weight, x.dtype).contiguous()
    passes = _Passes if prefers_own(x) else _StripPasses
    given = passes(x, tables, negative_slope, grad_y, taps)
    sums, grad_taps = given.sums()

    # Batch norm's statistics take from the gradient of x, per group: shift + (x - mean) * slope.
    inverse_std = (var.double() + eps).rsqrt()
    per_group = inverse_std.new_zeros(2, *inverse_std.shape)
    per_group.index_add_(1, group, sums * norm_weight[labels])
    powers = torch.stack([inverse_std, inverse_std**3])
    pixels = torch.tensor(groups, dtype=torch.float64).clamp(min=1) * x.shape[1] * x.shape[2]
    corrections = (per_group * powers / pixels[:, None])[:, group].float()
    per_class = inverse_std.new_zeros(2, *norm_weight.shape)
    sums[1] *= inverse_std[group]
    grad_norm_bias, grad_norm_weight = per_class.index_add_(1, labels, sums).float()

    given.gradient(corrections, grad_x)
    if grad_x.data_ptr() != grad_result.data_ptr():
        grad_result.copy_(grad_x.permute(0, 3, 1, 2))
    grads = _few_outputs.weight_gradients(grad_taps, grad_y, weight)
    return grad_result, grad_norm_weight, grad_norm_bias, *grads


class _Passes(NamedTuple):
    """What the backward needs twice over all pixels, strip by strip in compiled code."""

    x: Tensor
    tables: Tensor
    negative_slope: float
    grad_y: Tensor
    taps: Tensor

    def sums(self) -> tuple[Tensor, Tensor]:
        """Per sample and channel float64 [2, N, Cin], see NormStripSums; the taps' gradient."""
        x = self.x
        sums = x.new_zeros(2, len(x), x.shape[3], dtype=torch.float64)
        grad_taps = torch.zeros_like(self.taps, dtype=torch.float32)
        torch.ops.fdda._norm_few_outputs_sums(*self, sums, grad_taps)
        return sums, grad_taps

    def gradient(self, corrections: Tensor, grad_x: Tensor) -> None:
        torch.ops.fdda._norm_few_outputs_gradient(*self, corrections, grad_x)


class _StripPasses(_Passes):
    """The same with the framework's matrix products."""

    def sums(self) -> tuple[Tensor, Tensor]:
        x, tables, negative_slope, *_ = self
        sums = x.new_zeros(2, len(x), x.shape[3], dtype=torch.float64)
        product, memory = PixelProduct(x, *self.taps.shape), StripMemory(x)
        for strip, grad, planes in self._gradients():
            values = memory.pixels(strip)
            torch.ops.fdda._norm_strip_sums(
                x, tables, negative_slope, grad, values, sums, *strip.place()
            )
            product.add(planes.t(), values)
        return sums, product.total

    def gradient(self, corrections: Tensor, grad_x: Tensor) -> None:
        x, tables, negative_slope, *_ = self
        for strip, grad, _ in self._gradients():
            torch.ops.fdda._norm_strip_gradient(
                x, tables, negative_slope, grad, corrections, grad_x, *strip.place()
            )

    def _gradients(self) -> Iterator[tuple[Strip, Tensor, Tensor]]:
        """Strips with the gradient of the normalised tensor, and the planes it is made of."""
        memory = StripMemory(self.x)
        for strip, planes in backward_strips(self.grad_y, self.x, len(self.taps) // 9):
            grad = memory.pixels(strip)
            multiply(planes.t(), self.taps, grad)
            yield strip, grad, planes


def _group_of(groups: list[int]) -> Tensor:
    sizes = torch.tensor(groups, dtype=torch.int64)
    return torch.arange(len(groups)).repeat_interleave(sizes)


def _tables(
    group: Tensor,
    labels: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    """Mean, scale and bias of every sample: float32 [3, N, C]."""
    scale = norm_weight[labels] * (var.double() + eps).rsqrt().float()[group]
    return torch.stack([mean[group], scale, norm_bias[labels]])

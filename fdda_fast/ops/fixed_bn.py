"""Batch norm on given statistics with an affine per sample, LeakyReLU: a generator at work."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fdda_fast.ops._checks import FLOAT_DTYPES, check, check_tensor
from fdda_fast.ops._layout import empty_channels_last
from fdda_fast.ops._library import define
from fdda_fast.ops.convolutions import check_convolution


def fixed_bn_lrelu(x: Tensor, tables: Tensor, negative_slope: float) -> Tensor:
    """`leaky_relu((x - mean) * scale + bias)` with values per sample and channel, in one pass.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16; channels_last is the fast layout.
        tables: float32 [3, N, C]: mean, scale and bias.
        negative_slope: of LeakyReLU; 1.0: no activation.

    Returns:
        [N, C, H, W] of the dtype of x, channels_last, without gradient.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes do not fit.
    """
    _check(x, tables, negative_slope)
    return torch.ops.fdda.fixed_bn_lrelu(x, tables, negative_slope)


def fixed_bn_lrelu_conv3x3(
    x: Tensor, tables: Tensor, negative_slope: float, weight: Tensor, bias: Tensor
) -> Tensor:
    """`conv3x3_few_outputs(fixed_bn_lrelu(x, tables, negative_slope), weight, bias)`.

    On the CPU the tensor in between is made strip by strip, where it stays in cache, and never
    stored. Elsewhere the two operators run.

    Args:
        x, tables, negative_slope: see `fixed_bn_lrelu`.
        weight, bias: float32 [Cout, C, 3, 3] and [Cout].

    Returns:
        [N, Cout, H, W] of the dtype of x, channels_last, without gradient.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes do not fit.
    """
    _check(x, tables, negative_slope)
    check_convolution(x, weight, bias)
    return torch.ops.fdda.fixed_bn_lrelu_conv3x3(x, tables, negative_slope, weight, bias)


def upsample_fixed_bn_lrelu(
    x: Tensor, weight: Tensor, bias: Tensor, tables: Tensor, negative_slope: float
) -> Tensor:
    """`fixed_bn_lrelu(upsample_conv3x3(x, weight, bias), tables, negative_slope)`.

    On the CPU, where Winograd's algorithm pays, strip by strip: the tensor in between stays in
    cache.

    Args:
        x, weight, bias: see `upsample_conv3x3`.
        tables, negative_slope: see `fixed_bn_lrelu`; of the convolution's outputs.

    Returns:
        [N, Cout, 2H, 2W] of the dtype of x, channels_last, without gradient.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes do not fit.
    """
    _check_upsampled(x, weight, bias, tables, negative_slope)
    return torch.ops.fdda.upsample_fixed_bn_lrelu(x, weight, bias, tables, negative_slope)


def upsample_fixed_bn_lrelu_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tables: Tensor,
    negative_slope: float,
    out_weight: Tensor,
    out_bias: Tensor,
) -> Tensor:
    """`conv3x3_few_outputs` of `upsample_fixed_bn_lrelu`; neither tensor in between is stored.

    Args:
        x, weight, bias, tables, negative_slope: see `upsample_fixed_bn_lrelu`.
        out_weight, out_bias: float32 [Cimage, Cout, 3, 3] and [Cimage].

    Returns:
        [N, Cimage, 2H, 2W] of the dtype of x, channels_last, without gradient.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes do not fit.
    """
    _check_upsampled(x, weight, bias, tables, negative_slope)
    check_tensor(out_weight, "out_weight", (torch.float32,), (None, len(weight), 3, 3))
    check(out_weight.numel() > 0, "out_weight", "channels", list(out_weight.shape))
    check_tensor(out_bias, "out_bias", (torch.float32,), (len(out_weight),))
    return torch.ops.fdda.upsample_fixed_bn_lrelu_conv3x3(
        x, weight, bias, tables, negative_slope, out_weight, out_bias
    )


def _check(x: Tensor, tables: Tensor, negative_slope: float) -> None:
    check_tensor(x, "x", FLOAT_DTYPES, (None,) * 4)
    _check_norm(tables, negative_slope, *x.shape[:2])


def _check_upsampled(
    x: Tensor, weight: Tensor, bias: Tensor, tables: Tensor, negative_slope: float
) -> None:
    check_convolution(x, weight, bias)
    _check_norm(tables, negative_slope, len(x), len(weight))


def _check_norm(tables: Tensor, negative_slope: float, samples: int, channels: int) -> None:
    check_tensor(tables, "tables", (torch.float32,), (3, samples, channels))
    check(math.isfinite(negative_slope), "negative_slope", "a finite number", negative_slope)


def _plain(x: Tensor, tables: Tensor, negative_slope: float) -> Tensor:
    mean, scale, bias = tables[:, :, :, None, None]
    y = F.leaky_relu((x.float() - mean) * scale + bias, negative_slope)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _composed(x, tables, negative_slope, weight, bias):
    y = torch.ops.fdda.fixed_bn_lrelu(x, tables, negative_slope)
    return torch.ops.fdda.conv3x3_few_outputs(y, weight, bias)


def _upsampled(x, weight, bias, tables, negative_slope):
    y = torch.ops.fdda.upsample_conv3x3(x, weight, bias)
    return torch.ops.fdda.fixed_bn_lrelu(y, tables, negative_slope)


def _upsampled_composed(x, weight, bias, tables, negative_slope, out_weight, out_bias):
    y = torch.ops.fdda.upsample_conv3x3(x, weight, bias)
    return torch.ops.fdda.fixed_bn_lrelu_conv3x3(y, tables, negative_slope, out_weight, out_bias)


define(
    "fixed_bn_lrelu(Tensor x, Tensor tables, float negative_slope) -> Tensor",
    _plain,
    lambda x, tables, negative_slope: empty_channels_last(x, x.shape[1]),
)
define(
    "fixed_bn_lrelu_conv3x3(Tensor x, Tensor tables, float negative_slope, Tensor weight, "
    "Tensor bias) -> Tensor",
    _composed,
    lambda x, tables, negative_slope, weight, bias: empty_channels_last(x, len(weight)),
)
_UPSAMPLED = "Tensor x, Tensor weight, Tensor bias, Tensor tables, float negative_slope"
define(
    f"upsample_fixed_bn_lrelu({_UPSAMPLED}) -> Tensor",
    _upsampled,
    lambda x, weight, *_: empty_channels_last(x, len(weight), 2),
)
define(
    f"upsample_fixed_bn_lrelu_conv3x3({_UPSAMPLED}, Tensor out_weight, Tensor out_bias) -> Tensor",
    _upsampled_composed,
    lambda x, weight, bias, tables, slope, out_weight, _: empty_channels_last(
        x, len(out_weight), 2
    ),
)

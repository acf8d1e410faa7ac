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


def upsample_twice_conv3x3(
    x: Tensor,
    tables: Tensor,
    first: tuple[Tensor, Tensor, Tensor],
    last: tuple[Tensor, Tensor, Tensor],
    negative_slope: float,
    out_weight: Tensor,
    out_bias: Tensor,
) -> Tensor:
    """Two up-sampling convolutions with norms around them, and one to few channels.

    `fixed_bn_lrelu(x, tables, 1.0)`, twice `fixed_bn_lrelu(upsample_conv3x3(...), ...)`, and
    `conv3x3_few_outputs`. On the CPU, where Winograd's algorithm pays, what is in between stays in
    the caches, whatever the number of images.

    Args:
        x: see `upsample_conv3x3`.
        tables: see `fixed_bn_lrelu`; of x.
        first, last: weight and bias of an up-sampling convolution, and the tables of the norm of
            its outputs, before LeakyReLU.
        negative_slope: of LeakyReLU.
        out_weight, out_bias: float32 [Cimage, C, 3, 3] and [Cimage].

    Returns:
        [N, Cimage, 4H, 4W] of the dtype of x, channels_last, without gradient.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes do not fit.
    """
    _check(x, tables, negative_slope)
    channels = x.shape[1]
    for name, (weight, bias, after) in (("first", first), ("last", last)):
        check_tensor(weight, f"{name} weight", (torch.float32,), (None, channels, 3, 3))
        channels = len(weight)
        check(weight.numel() > 0, f"{name} weight", "channels", list(weight.shape))
        check_tensor(bias, f"{name} bias", (torch.float32,), (channels,))
        check_tensor(after, f"{name} tables", (torch.float32,), (3, len(x), channels))
    check_tensor(out_weight, "out_weight", (torch.float32,), (None, channels, 3, 3))
    check(out_weight.numel() > 0, "out_weight", "channels", list(out_weight.shape))
    check_tensor(out_bias, "out_bias", (torch.float32,), (len(out_weight),))
    return torch.ops.fdda.upsample_twice_conv3x3(
        x, tables, *first, *last, negative_slope, out_weight, out_bias
    )


def _check(x: Tensor, tables: Tensor, negative_slope: float) -> None:
    check_tensor(x, "x", FLOAT_DTYPES, (None,) * 4)
    _check_norm(tables, negative_slope, *x.shape[:2])


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


def _upsampled_twice(
    x,
    tables,
    weight,
    bias,
    middle_tables,
    last_weight,
    last_bias,
    last_tables,
    negative_slope,
    *out,
):
    y = torch.ops.fdda.fixed_bn_lrelu(x, tables, 1.0)
    y = torch.ops.fdda.upsample_conv3x3(y, weight, bias)
    y = torch.ops.fdda.fixed_bn_lrelu(y, middle_tables, negative_slope)
    y = torch.ops.fdda.upsample_conv3x3(y, last_weight, last_bias)
    return torch.ops.fdda.fixed_bn_lrelu_conv3x3(y, last_tables, negative_slope, *out)


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
define(
    "upsample_twice_conv3x3(Tensor x, Tensor tables, Tensor weight, Tensor bias, "
    "Tensor middle_tables, Tensor last_weight, Tensor last_bias, Tensor last_tables, "
    "float negative_slope, Tensor out_weight, Tensor out_bias) -> Tensor",
    _upsampled_twice,
    lambda x, *rest: empty_channels_last(x, len(rest[-1]), 4),
)

"""Packed layers whose weights are in the order of the CUDA kernels.

`pack_weight` makes the order of files and of the CPU; `reorder_weight` makes this one of it, once a
model. Every device has the operators, but only the CUDA kernels gain from them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdda_fast.ops import reference
from fdda_fast.ops._checks import check, check_int, check_tensor
from fdda_fast.ops._library import define
from fdda_fast.ops.packed import (
    EPILOGUE_SCHEMA,
    check_epilogue,
    check_geometry,
    check_packed,
    fake_conv2d,
)


def reorder_weight(
    packed: Tensor, bits: int, num_rows: int, num_cols: int, depthwise: bool = False
) -> Tensor:
    """Weights in the order in which the CUDA kernels read them.

    One buffer of bytes. Depthwise: int8 codes [K, ceil(N / 16) * 16]. Else tiles, and behind them
    the int32 sums of every channel's codes, [ceil(N / 16) * 16]. A tile has 16 channels x 64 k in
    the order of the tensor cores' registers, tiles are [ceil(N / 16), ceil(K / 64)]. With lane
    l = 4 g + t, word w and byte j of a tile's 16-byte vectors, channel 8 (w // 2) + g of the panel,

        5 to 8 bits, [2 vectors, 32 lanes, 4 words, 4 bytes]:
            vector v, byte j is the code of k = 32 v + 16 (w % 2) + 4 t + j
        2 to 4 bits, [32 lanes, 4 words, 4 bytes]:
            byte j has the code of k = 32 (w % 2) + 4 t + j in its low half, k + 16 in its high one

    Padding codes are 0.

    Args:
        packed: `pack_weight` of [N, K].
        bits: 2 to 8.
        num_rows: N.
        num_cols: K.
        depthwise: for a convolution of one group a channel.

    Returns:
        uint8 [bytes].

    Raises:
        TypeError: packed has another dtype.
        ValueError: shapes or bits do not fit.
    """
    check_int(num_rows, "num_rows", 0, 2**31 - 1)
    check_int(num_cols, "num_cols", 0, 2**31 - 1)
    check_packed(packed, "packed", bits, num_rows, num_cols)
    return torch.ops.fdda.reorder_weight(packed, bits, num_rows, num_cols, depthwise)


def reordered_conv2d(
    x: Tensor,
    weight: Tensor,
    bits: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    x_zero_point: int,
    weight_offset: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    residual_scale: float = 0.0,
    output_range: tuple[int, int] | None = None,
    x_bits: int = 8,
    x_packed: bool = False,
    out_packed: bool = False,
) -> Tensor:
    """`packed_conv2d` on reordered weights, and on packed codes.

    Args:
        weight: `reorder_weight` of what `packed_conv2d` takes; depthwise if groups > 1.
        groups: 1, or as many as there are channels of x and of the output.
        x_bits: 1 to 8; codes of x are below 2^x_bits, which is not checked. Up to 4 bits of inputs
            and weights are multiplied as such by processors that can (sm_80 to sm_89).
        x_packed: x is `pack_codes` of the codes, uint8 [N, H, W, C / 2]. With one group, weights of
            at most 4 bits and an x_zero_point below 16 only.
        out_packed: so is the result, uint8 [N, OH, OW, O / 2]. With one group, O a multiple of 32
            and an output_range up to 15 only.

    The other arguments, the result and the errors are those of `packed_conv2d`.
    """
    check_int(bits, "bits", 2, 4 if x_packed else 8)
    check_tensor(x, "x", (torch.uint8,), (None, None, None, None))
    channels = x.shape[3] * (2 if x_packed else 1)
    kernel_size, stride, padding, dilation, depth, out_shape = check_geometry(
        x, out_channels, kernel_size, stride, padding, dilation, groups, x_zero_point, channels
    )
    if x_packed or out_packed:
        check(groups == 1, "groups", "1 with packed codes", groups)
    depthwise = groups == channels == out_channels
    check(groups == 1 or depthwise, "groups", "1, or one of each channel", groups)
    unit = reference.PACKED_CHANNELS
    if x_packed:
        check(channels % unit == 0, "x", f"packed channels, a multiple of {unit}", channels)
        check_int(x_zero_point, "x_zero_point", 0, 15)
    if out_packed:
        check(out_channels % unit == 0, "out_channels", f"a multiple of {unit}", out_channels)
        codes = output_range is not None and output_range[1] < 16
        check(codes, "output_range", "up to 15", output_range)
    check_int(x_bits, "x_bits", 1, 8)
    size = _reordered_bytes(bits, out_channels, depth, groups > 1)
    check_tensor(weight, "weight", (torch.uint8,), (size,))
    check_epilogue(weight_offset, multiplier, bias, residual, output_range, out_shape)
    return torch.ops.fdda.reordered_conv2d(
        x,
        weight,
        bits,
        out_channels,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        x_zero_point,
        weight_offset,
        multiplier,
        bias,
        residual,
        residual_scale,
        output_range,
        x_bits,
        x_packed,
        out_packed,
    )


def reordered_linear(
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
    output_range: tuple[int, int] | None = None,
    x_bits: int = 8,
) -> Tensor:
    """`packed_linear` of uint8 x on reordered weights, see `reordered_conv2d`."""
    check_tensor(x, "x", (torch.uint8,), (None, None))
    if residual is not None:
        residual = residual[:, None, None]
    y = reordered_conv2d(
        x[:, None, None],
        weight,
        bits,
        out_features,
        *(1, 1, 0, 1, 1),
        x_zero_point,
        weight_offset,
        multiplier,
        bias,
        residual,
        residual_scale,
        output_range,
        x_bits,
    )
    return y[:, 0, 0]


def _reordered_bytes(bits: int, num_rows: int, num_cols: int, depthwise: bool) -> int:
    panels, steps = -(-num_rows // 16), -(-num_cols // 64)
    if depthwise:
        return panels * 16 * num_cols
    return panels * (steps * (1024 if bits > 4 else 512) + 64)


def _fake_reorder(packed, bits, num_rows, num_cols, depthwise) -> Tensor:
    return packed.new_empty(_reordered_bytes(bits, num_rows, num_cols, depthwise))


def _fake_reordered_conv2d(*arguments) -> Tensor:
    y = fake_conv2d(*arguments[:16])
    out_packed = len(arguments) > 18 and arguments[18]
    return y.new_empty((*y.shape[:3], y.shape[3] // 2)) if out_packed else y


define(
    "reorder_weight(Tensor packed, int bits, int num_rows, int num_cols, bool depthwise) -> Tensor",
    reference.reorder_weight,
    _fake_reorder,
)
define(
    "reordered_conv2d(Tensor x, Tensor weight, int bits, int out_channels, int[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int groups, int x_zero_point, "
    f"{EPILOGUE_SCHEMA}, int x_bits=8, bool x_packed=False, bool out_packed=False) -> Tensor",
    reference.reordered_conv2d,
    _fake_reordered_conv2d,
)

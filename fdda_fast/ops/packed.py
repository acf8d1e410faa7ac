"""Integer inference: packed low-bit weights, and layers on uint8 codes in NHWC order."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fdda_fast.ops import reference
from fdda_fast.ops._checks import check, check_int, check_tensor, pair
from fdda_fast.ops._library import define
from fdda_fast.ops._windows import output_size, pool_windows

# Largest sum of |x - zero_point| * |q|: the accumulators are int32.
_MAX_DEPTH = (2**31 - 1) // (255 * 128)


def pack_weight(q: Tensor, bits: int) -> Tensor:
    """Pack integer weights, exactly `bits` bits each.

    Bit planes of panels of 16 output channels x 4 consecutive k: code j = n * 4 + k of a panel's
    block has bit b in plane b, byte j // 8, bit j % 8. Two's complement; padding codes are 0.

    Args:
        q: [N, K] int8, int16 or int32, values in [-2^(bits-1), 2^(bits-1) - 1]. A convolution's K
            runs over (kernel row, kernel column, input channel of the group).
        bits: 2 to 8.

    Returns:
        uint8 [ceil(N / 16), ceil(K / 4), bits, 8].

    Raises:
        TypeError: q has another dtype.
        ValueError: q has another shape or values outside the range.
    """
    check_tensor(q, "q", (torch.int8, torch.int16, torch.int32), (None, None))
    check_int(bits, "bits", 2, 8)
    if q.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(q))
        half = 2 ** (bits - 1)
        check(-half <= low and high < half, "q", f"{-half} to {half - 1}", f"{low} to {high}")
    return torch.ops.fdda.pack_weight(q, bits)


def unpack_weight(packed: Tensor, bits: int, num_rows: int, num_cols: int) -> Tensor:
    """The inverse of `pack_weight`.

    Args:
        packed: uint8 [ceil(num_rows / 16), ceil(num_cols / 4), bits, 8].
        bits: 2 to 8.
        num_rows: N.
        num_cols: K.

    Returns:
        int8 [N, K].

    Raises:
        TypeError: packed has another dtype.
        ValueError: shapes or bits do not fit.
    """
    check_int(num_rows, "num_rows", 0, 2**31 - 1)
    check_int(num_cols, "num_cols", 0, 2**31 - 1)
    check_packed(packed, "packed", bits, num_rows, num_cols)
    return torch.ops.fdda.unpack_weight(packed, bits, num_rows, num_cols)


def packed_conv2d(
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
) -> Tensor:
    """Integer convolution with fused rescaling, residual and requantisation.

    `acc[o] = sum (x - x_zero_point) * (q[o] + weight_offset[o])`, exactly; padding contributes 0.
    Then in float32, every operation rounded: `v = float32(float64(acc)) * multiplier[o]`,
    `v = v + bias[o]`, `v = v + float32(residual) * float32(residual_scale)`. The output is v, or
    with `output_range` the code `clamp(round(v), lo, hi)`, rounding half to even; of NaN it is lo.
    Every backend gives the same bits.

    Args:
        x: uint8 [N, H, W, C].
        weight: `pack_weight` of [O, KH * KW * C / groups].
        bits: of the weights, 2 to 8.
        out_channels: O.
        kernel_size: (KH, KW) or one number for both.
        stride: (rows, columns) or one number for both.
        padding: (rows, columns) or one number for both.
        dilation: (rows, columns) or one number for both.
        groups: divides C and O.
        x_zero_point: the code that stands for 0.0, 0 to 255.
        weight_offset: int64 [O]. With |offset| * 255 * K below 2^62 (not checked on GPUs).
        multiplier: float32 [O].
        bias: float32 [O].
        residual: uint8 or float32 [N, OH, OW, O].
        residual_scale: factor of the residual.
        output_range: (lo, hi), 0 <= lo <= hi <= 255: requantise to uint8. None: float32.

    Returns:
        uint8 or float32 [N, OH, OW, O].

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or ranges do not fit, or K is so large that int32 sums could overflow.
    """
    kernel_size, stride, padding, dilation, depth, out_shape = check_geometry(
        x, out_channels, kernel_size, stride, padding, dilation, groups, x_zero_point
    )
    check_packed(weight, "weight", bits, out_channels, depth)
    check_epilogue(weight_offset, multiplier, bias, residual, output_range, out_shape)
    return torch.ops.fdda.packed_conv2d(
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
    )


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
    output_range: tuple[int, int] | None = None,
) -> Tensor:
    """Integer linear layer; arithmetic and epilogue of `packed_conv2d`.

    Args:
        x: uint8 [M, K], or int32 [M, K] such as sums of codes from a global pool.
        weight: `pack_weight` of [out_features, K].
        bits: of the weights, 2 to 8.
        out_features: O.
        x_zero_point: the value of x that stands for 0.0; 0 to 255 for uint8.
        weight_offset: int64 [O]. For int32 x the products' sums must stay within int64.
        multiplier: float32 [O].
        bias: float32 [O].
        residual: uint8 or float32 [M, O].
        residual_scale: factor of the residual.
        output_range: (lo, hi), 0 <= lo <= hi <= 255: requantise to uint8. None: float32.

    Returns:
        uint8 or float32 [M, O].

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or ranges do not fit, or K is so large that int32 sums could overflow.
    """
    check_tensor(x, "x", (torch.uint8, torch.int32), (None, None))
    check_int(out_features, "out_features", 1, 2**31 - 1)
    if x.dtype == torch.uint8:
        check_int(x_zero_point, "x_zero_point", 0, 255)
        check_depth(x.shape[1])
    else:
        check_int(x_zero_point, "x_zero_point", -(2**31), 2**31 - 1)
    check_packed(weight, "weight", bits, out_features, x.shape[1])
    out_shape = (x.shape[0], out_features)
    check_epilogue(weight_offset, multiplier, bias, residual, output_range, out_shape)
    return torch.ops.fdda.packed_linear(
        x,
        weight,
        bits,
        out_features,
        x_zero_point,
        weight_offset,
        multiplier,
        bias,
        residual,
        residual_scale,
        output_range,
    )


def quantize(x: Tensor, scale: float, zero_point: float, bits: int) -> Tensor:
    """Float images or features to unsigned codes, NHWC.

    `u = clamp(round(scale * x - zero_point), -2^(bits-1), 2^(bits-1) - 1) + 2^(bits-1)` in
    float32: the codes of `fake_quantize_range`, shifted to start at 0.

    Args:
        x: float32 [N, C, H, W] or [N, C], any strides.
        scale: codes per unit, a float32 value.
        zero_point: the paper's zero point, a float32 value.
        bits: 2 to 8.

    Returns:
        uint8 [N, H, W, C] or [N, C].

    Raises:
        TypeError: x has another dtype.
        ValueError: shape or bits do not fit.
    """
    check_tensor(x, "x", (torch.float32,))
    check(x.dim() in (2, 4), "x", "[N, C] or [N, C, H, W]", list(x.shape))
    check_int(bits, "bits", 2, 8)
    return torch.ops.fdda.quantize(x, float(scale), float(zero_point), bits)


def requantize_codes(
    x: Tensor, x_scale: float, x_zero_point: int, scale: float, zero_point: float, bits: int
) -> Tensor:
    """Codes to codes of another width or scale: `quantize` of the values they stand for.

    Args:
        x: uint8 of any shape; code u stands for `(u - x_zero_point) / x_scale` in float32.
        x_scale: codes per unit, a float32 value above 0.
        x_zero_point: the code of 0, in 0..255.
        scale, zero_point, bits: as in `quantize`.

    Returns:
        uint8 of x's shape, contiguous.

    Raises:
        TypeError: x has another dtype.
        ValueError: x_scale, x_zero_point or bits out of range.
    """
    check_tensor(x, "x", (torch.uint8,))
    check_requantization(x_scale, x_zero_point, bits, 8)
    return torch.ops.fdda.requantize_codes(
        x, float(x_scale), x_zero_point, float(scale), float(zero_point), bits
    )


def check_requantization(x_scale: float, x_zero_point: int, bits: int, most_bits: int) -> None:
    check(x_scale > 0, "x_scale", "> 0", x_scale)
    check_int(x_zero_point, "x_zero_point", 0, 255)
    check_int(bits, "bits", 2, most_bits)


def max_pool2d_codes(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """Max pooling on codes; arguments as in `torch.nn.functional.max_pool2d`.

    Args:
        x: uint8 [N, H, W, C].
        kernel_size: (rows, columns) or one number for both.
        stride: (rows, columns) or one number for both.
        padding: (rows, columns) or one number for both, at most half the kernel; never the maximum.
        dilation: (rows, columns) or one number for both.
        ceil_mode: whether a last, partial window counts.

    Returns:
        uint8 [N, OH, OW, C].

    Raises:
        TypeError: x has another dtype.
        ValueError: shapes do not fit.
    """
    check_tensor(x, "x", (torch.uint8,), (None, None, None, None))
    windows = pool_windows(kernel_size, stride, padding, dilation)
    output_size(x.shape[1:3], *windows, ceil_mode)
    return torch.ops.fdda.max_pool2d_codes(x, *windows, ceil_mode)


def check_packed(packed: Tensor, argument: str, bits: int, rows: int, cols: int) -> None:
    check_int(bits, "bits", 2, 8)
    check_tensor(packed, argument, (torch.uint8,), (-(-rows // 16), -(-cols // 4), bits, 8))


Pair = tuple[int, int]


def check_geometry(
    x: Tensor,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    x_zero_point: int,
    channels: int | None = None,
) -> tuple[Pair, Pair, Pair, Pair, int, tuple[int, int, int, int]]:
    """What does not depend on how weights are stored. channels: where x is not as wide.

    Returns:
        kernel_size, stride, padding and dilation, each (rows, columns); the products of a sum; the
        output's shape [N, OH, OW, O].
    """
    check_tensor(x, "x", (torch.uint8,), (None, None, None, None))
    geometry = (
        x.shape if channels is None else (*x.shape[:3], channels),
        *(out_channels, kernel_size, stride, padding, dilation, groups, x_zero_point),
    )
    if torch.compiler.is_compiling():
        return _check_sizes(*geometry)
    try:
        return _checked_sizes(*geometry)
    except TypeError:  # lists have no hash
        return _check_sizes(*geometry)


def _check_sizes(
    shape: Sequence[int],
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    x_zero_point: int,
) -> tuple[Pair, Pair, Pair, Pair, int, tuple[int, int, int, int]]:
    kernel_size = pair(kernel_size, "kernel_size", 1)
    stride = pair(stride, "stride", 1)
    padding = pair(padding, "padding", 0)
    dilation = pair(dilation, "dilation", 1)
    check_int(out_channels, "out_channels", 1, 2**31 - 1)
    check_int(groups, "groups", 1, 2**31 - 1)
    batch, *size, channels = shape
    fits = channels % groups == 0 and out_channels % groups == 0
    check(fits, "groups", f"a divisor of {channels} and {out_channels}", groups)
    check_int(x_zero_point, "x_zero_point", 0, 255)
    depth = kernel_size[0] * kernel_size[1] * channels // groups
    check_depth(depth)
    height, width = output_size(size, kernel_size, stride, padding, dilation)
    out_shape = (batch, height, width, out_channels)
    return kernel_size, stride, padding, dilation, depth, out_shape


# The sizes of a layer come again and again, and its kernel may take no longer than these checks.
_checked_sizes = functools.lru_cache(maxsize=256, typed=True)(_check_sizes)


def check_depth(depth: int) -> None:
    check(depth <= _MAX_DEPTH, "weight", f"at most {_MAX_DEPTH} inputs per output", depth)


def check_epilogue(
    weight_offset: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    output_range: tuple[int, int] | None,
    out_shape: tuple[int, ...],
) -> None:
    check_tensor(weight_offset, "weight_offset", (torch.int64,), out_shape[-1:])
    check_tensor(multiplier, "multiplier", (torch.float32,), out_shape[-1:])
    check_tensor(bias, "bias", (torch.float32,), out_shape[-1:])
    if residual is not None:
        check_tensor(residual, "residual", (torch.uint8, torch.float32), out_shape)
    if output_range is not None:
        lo, hi = output_range
        check(0 <= lo <= hi <= 255, "output_range", "0 <= lo <= hi <= 255", output_range)


def _fake_pack(q: Tensor, bits: int) -> Tensor:
    shape = (-(-q.shape[0] // 16), -(-q.shape[1] // 4), bits, 8)
    return q.new_empty(shape, dtype=torch.uint8)


def _fake_unpack(packed: Tensor, bits: int, num_rows: int, num_cols: int) -> Tensor:
    return packed.new_empty((num_rows, num_cols), dtype=torch.int8)


def _out_dtype(output_range: Sequence[int] | None) -> torch.dtype:
    return torch.float32 if output_range is None else torch.uint8


def fake_conv2d(
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
    residual=None,
    residual_scale=0.0,
    output_range=None,
) -> Tensor:
    height, width = output_size(x.shape[1:3], kernel_size, stride, padding, dilation)
    shape = (x.shape[0], height, width, out_channels)
    return x.new_empty(shape, dtype=_out_dtype(output_range))


def _fake_linear(
    x,
    weight,
    bits,
    out_features,
    x_zero_point,
    weight_offset,
    multiplier,
    bias,
    residual=None,
    residual_scale=0.0,
    output_range=None,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features), dtype=_out_dtype(output_range))


def _fake_quantize(x: Tensor, scale: float, zero_point: float, bits: int) -> Tensor:
    shape = (x.shape[0], x.shape[2], x.shape[3], x.shape[1]) if x.dim() == 4 else x.shape
    return x.new_empty(shape, dtype=torch.uint8)


def _fake_max_pool(x, kernel_size, stride, padding, dilation, ceil_mode) -> Tensor:
    height, width = output_size(x.shape[1:3], kernel_size, stride, padding, dilation, ceil_mode)
    return x.new_empty((x.shape[0], height, width, x.shape[3]))


EPILOGUE_SCHEMA = (
    "Tensor weight_offset, Tensor multiplier, Tensor bias, Tensor? residual=None, "
    "float residual_scale=0.0, int[]? output_range=None"
)

define("pack_weight(Tensor q, int bits) -> Tensor", reference.pack_weight, _fake_pack)
define(
    "unpack_weight(Tensor packed, int bits, int num_rows, int num_cols) -> Tensor",
    reference.unpack_weight,
    _fake_unpack,
)
define(
    "packed_conv2d(Tensor x, Tensor weight, int bits, int out_channels, int[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int groups, int x_zero_point, "
    f"{EPILOGUE_SCHEMA}) -> Tensor",
    reference.packed_conv2d,
    fake_conv2d,
)
define(
    "packed_linear(Tensor x, Tensor weight, int bits, int out_features, int x_zero_point, "
    f"{EPILOGUE_SCHEMA}) -> Tensor",
    reference.packed_linear,
    _fake_linear,
)
define(
    "quantize(Tensor x, float scale, float zero_point, int bits) -> Tensor",
    reference.quantize,
    _fake_quantize,
)
define(
    "requantize_codes(Tensor x, float x_scale, int x_zero_point, float scale, float zero_point, "
    "int bits) -> Tensor",
    reference.requantize_codes,
    lambda x, *_: x.new_empty(x.shape),
)
define(
    "max_pool2d_codes(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "bool ceil_mode) -> Tensor",
    reference.max_pool2d_codes,
    _fake_max_pool,
)

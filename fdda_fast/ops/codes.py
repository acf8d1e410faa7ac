"""On the codes of a packed network: sums over images, real numbers, and two codes to a byte."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops import reference
from fdda_fast.ops._checks import check, check_int, check_tensor
from fdda_fast.ops._library import define
from fdda_fast.ops.packed import check_requantization

_MAX_PIXELS = (2**31 - 1) // 255


def pack_codes(x: Tensor) -> Tensor:
    """Codes below 16, two to a byte: half the memory to write and to read.

    Of 32 adjacent channels, byte j has channel j in its low half, channel j + 16 in its high one:
    so the tensor cores' registers want inputs and weights (`reorder_weight`) alike.

    Args:
        x: uint8 [..., C], C a multiple of 32; below 16, which is not checked.

    Returns:
        uint8 [..., C / 2].

    Raises:
        TypeError: x has another dtype.
        ValueError: C is no multiple of 32.
    """
    _check_channels(x, "x", reference.PACKED_CHANNELS)
    return torch.ops.fdda.pack_codes(x)


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_codes`.

    Args:
        packed: uint8 [..., C / 2].

    Returns:
        uint8 [..., C].

    Raises:
        TypeError: packed has another dtype.
        ValueError: C is no multiple of 32.
    """
    _check_channels(packed, "packed", reference.PACKED_CHANNELS // 2)
    return torch.ops.fdda.unpack_codes(packed)


def requantize_codes_packed(
    x: Tensor, x_scale: float, x_zero_point: int, scale: float, zero_point: float, bits: int
) -> Tensor:
    """`pack_codes` of what `requantize_codes` gives.

    Args:
        x: uint8 [..., C], C a multiple of 32.
        x_scale, x_zero_point, scale, zero_point: as of `requantize_codes`.
        bits: 2 to 4.

    Returns:
        uint8 [..., C / 2].

    Raises:
        TypeError: x has another dtype.
        ValueError: x_scale, x_zero_point, bits or C out of range.
    """
    _check_channels(x, "x", reference.PACKED_CHANNELS)
    check_requantization(x_scale, x_zero_point, bits, 4)
    return torch.ops.fdda.requantize_codes_packed(
        x, float(x_scale), x_zero_point, float(scale), float(zero_point), bits
    )


def sum_pool_codes(x: Tensor) -> Tensor:
    """Global pooling without the division.

    Args:
        x: uint8 [N, H, W, C].

    Returns:
        int32 [N, C], codes summed over the image.

    Raises:
        TypeError: x has another dtype.
        ValueError: x has another shape, or so many pixels that sums could overflow.
    """
    check_tensor(x, "x", (torch.uint8,), (None, None, None, None))
    pixels = x.shape[1] * x.shape[2]
    check(pixels <= _MAX_PIXELS, "x", f"at most {_MAX_PIXELS} pixels an image", pixels)
    return torch.ops.fdda.sum_pool_codes(x)


def dequantize_codes(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """The values that codes stand for: `(x - zero_point) / scale` in float32.

    Args:
        x: uint8 of any shape.
        scale: codes per unit, a float32 value other than 0.
        zero_point: the code of 0, in 0..255.

    Returns:
        float32 of x's shape, contiguous.

    Raises:
        TypeError: x has another dtype.
        ValueError: scale or zero_point out of range.
    """
    check_tensor(x, "x", (torch.uint8,))
    check(scale != 0, "scale", "a number other than 0", scale)
    check_int(zero_point, "zero_point", 0, 255)
    return torch.ops.fdda.dequantize_codes(x, float(scale), zero_point)


def dequantize_sums(x: Tensor, count: int, scale: float, zero_point: int) -> Tensor:
    """The means of `count` values each, of which the codes' sums are given.

    `(x - zero_point * count) / (scale * count)` in float64, rounded to float32 once.

    Args:
        x: int32 of any shape.
        count: of the codes in a sum, > 0.
        scale: codes per unit, other than 0.
        zero_point: the code of 0, in 0..255.

    Returns:
        float32 of x's shape, contiguous.

    Raises:
        TypeError: x has another dtype.
        ValueError: count, scale or zero_point out of range.
    """
    check_tensor(x, "x", (torch.int32,))
    check_int(count, "count", 1, 2**31 - 1)
    check(scale != 0, "scale", "a number other than 0", scale)
    check_int(zero_point, "zero_point", 0, 255)
    return torch.ops.fdda.dequantize_sums(x, count, float(scale), zero_point)


def _check_channels(x: Tensor, argument: str, unit: int) -> None:
    check_tensor(x, argument, (torch.uint8,))
    fits = x.dim() > 0 and x.shape[-1] % unit == 0
    check(fits, argument, f"a multiple of {unit} in the last dimension", list(x.shape))


def _fake_packed(x: Tensor, *_) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _fake_floats(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


define(
    "sum_pool_codes(Tensor x) -> Tensor",
    reference.sum_pool_codes,
    lambda x: x.new_empty((x.shape[0], x.shape[3]), dtype=torch.int32),
)
define(
    "dequantize_codes(Tensor x, float scale, int zero_point) -> Tensor",
    reference.dequantize_codes,
    _fake_floats,
)
define(
    "dequantize_sums(Tensor x, int count, float scale, int zero_point) -> Tensor",
    reference.dequantize_sums,
    _fake_floats,
)
define("pack_codes(Tensor x) -> Tensor", reference.pack_codes, _fake_packed)
define(
    "unpack_codes(Tensor packed) -> Tensor",
    reference.unpack_codes,
    lambda packed: packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2)),
)
define(
    "requantize_codes_packed(Tensor x, float x_scale, int x_zero_point, float scale, "
    "float zero_point, int bits) -> Tensor",
    reference.requantize_codes_packed,
    _fake_packed,
)

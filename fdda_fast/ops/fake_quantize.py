"""Fake quantisation: float in, the nearest representable float out."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops import reference
from fdda_fast.ops._checks import FLOAT_DTYPES, check, check_int, check_tensor
from fdda_fast.ops._library import define, register_autograd

_MAX_CODE = 2**21  # codes and their rounding are exact in float32


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    ste: str = "identity",
) -> Tensor:
    """Quantise and dequantise in torch's convention.

    `q = clamp(round(x / scale + zero_point), quant_min, quant_max)`,
    `y = (q - zero_point) * scale`, rounding half to even. Differentiable in x only.

    Args:
        x: float32, bfloat16 or float16, any shape; computed in float32, rounded once.
        scale: float32, one element, or [x.shape[axis]]; positive.
        zero_point: float32, the shape of `scale`.
        quant_min: smallest code.
        quant_max: largest code.
        axis: the dimension with parameters of its own; None: one pair for the whole tensor.
        ste: straight-through gradient: "identity" passes it everywhere, "clipped" only where the
            code needed no clamping.

    Returns:
        Dtype, shape and strides of x.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or ranges do not fit.
    """
    check_tensor(x, "x", FLOAT_DTYPES)
    axis = _check_axis(x, axis)
    _check_parameter(scale, "scale", x, axis)
    _check_parameter(zero_point, "zero_point", x, axis)
    check_int(quant_min, "quant_min", -_MAX_CODE, _MAX_CODE)
    check_int(quant_max, "quant_max", quant_min, _MAX_CODE)
    check(ste in ("identity", "clipped"), "ste", "'identity' or 'clipped'", repr(ste))
    return torch.ops.fdda.fake_quantize(
        x, scale, zero_point, quant_min, quant_max, axis, ste == "clipped"
    )


def fake_quantize_range(
    x: Tensor, x_min: Tensor, x_max: Tensor, bits: int, axis: int | None = None
) -> Tensor:
    """Quantise and dequantise asymmetrically to a given range.

    `scale = (2^bits - 1) / max(x_max - x_min, 1e-8)`, `zp = round(scale * x_min) + 2^(bits-1)`,
    `q = clamp(round(scale * x - zp), -2^(bits-1), 2^(bits-1) - 1)`, `y = (q + zp) / scale`,
    rounding half to even, in float32 in this order: every backend gives the same bits. The
    gradient passes straight through everywhere, also where q was clamped. FDDA (Zhong et al., ECCV
    2022), the quantiser of its released code.

    Args:
        x: float32, bfloat16 or float16, any shape; computed in float32, rounded once.
        x_min: float32, one element, or [x.shape[axis]].
        x_max: float32, the shape of `x_min`.
        bits: 1 to 16.
        axis: the dimension with ranges of its own; None: one range for the whole tensor.

    Returns:
        Dtype, shape and strides of x.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or bits do not fit.
    """
    check_tensor(x, "x", FLOAT_DTYPES)
    axis = _check_axis(x, axis)
    _check_parameter(x_min, "x_min", x, axis)
    _check_parameter(x_max, "x_max", x, axis)
    check_int(bits, "bits", 1, 16)
    return torch.ops.fdda.fake_quantize_range(x, x_min, x_max, bits, axis)


def fake_quantize_minmax(x: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """`fake_quantize_range` to the minimum and maximum of x, or of each slice along `axis`.

    Args:
        x: float32, bfloat16 or float16, any shape.
        bits: 1 to 16.
        axis: the dimension with ranges of its own; None: one range for the whole tensor.

    Returns:
        Dtype, shape and strides of x. A NaN or infinity makes its slice NaN.

    Raises:
        TypeError: x has another dtype.
        ValueError: bits or axis do not fit.
    """
    check_tensor(x, "x", FLOAT_DTYPES)
    axis = _check_axis(x, axis)
    check_int(bits, "bits", 1, 16)
    return torch.ops.fdda.fake_quantize_minmax(x, bits, axis)


def _check_axis(x: Tensor, axis: int | None) -> int | None:
    if axis is None:
        return None
    check_int(axis, "axis", -x.dim(), x.dim() - 1)
    return axis % x.dim()


def _check_parameter(value: Tensor, argument: str, x: Tensor, axis: int | None) -> None:
    check_tensor(value, argument, (torch.float32,))
    if axis is None:
        check(value.numel() == 1, argument, "one element", list(value.shape))
    else:
        check_tensor(value, argument, (torch.float32,), (x.shape[axis],))


def _fake(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(grad: Tensor, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return torch.empty_like(x)


def _setup_clipped(ctx, inputs: tuple, output: Tensor) -> None:
    x, scale, zero_point, ctx.quant_min, ctx.quant_max, ctx.axis, ctx.clipped = inputs
    ctx.save_for_backward(*((x, scale, zero_point) if ctx.clipped else ()))


def _backward_clipped(ctx, grad: Tensor) -> tuple:
    if ctx.clipped:
        x, scale, zero_point = ctx.saved_tensors
        grad = torch.ops.fdda.fake_quantize_backward(
            grad, x, scale, zero_point, ctx.quant_min, ctx.quant_max, ctx.axis
        )
    return grad, None, None, None, None, None, None


def _setup_identity(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.num_inputs = len(inputs)


def _backward_identity(ctx, grad: Tensor) -> tuple:
    return (grad,) + (None,) * (ctx.num_inputs - 1)


define(
    "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
    "int? axis=None, bool clipped=False) -> Tensor",
    reference.fake_quantize,
    _fake,
)
register_autograd("fake_quantize", _backward_clipped, _setup_clipped)

define(
    "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int quant_min, "
    "int quant_max, int? axis=None) -> Tensor",
    reference.fake_quantize_backward,
    _fake_backward,
)

define(
    "fake_quantize_range(Tensor x, Tensor x_min, Tensor x_max, int bits, int? axis=None) -> Tensor",
    reference.fake_quantize_range,
    _fake,
)
register_autograd("fake_quantize_range", _backward_identity, _setup_identity)

define(
    "fake_quantize_minmax(Tensor x, int bits, int? axis=None) -> Tensor",
    reference.fake_quantize_minmax,
    _fake,
)
register_autograd("fake_quantize_minmax", _backward_identity, _setup_identity)

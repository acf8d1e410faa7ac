"""Fake quantisation: float in, the nearest representable float out."""

from __future__ import annotations

from collections.abc import Callable

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
    `y = (q - zero_point) * scale`, rounding half to even. Where scale or zero_point require a
    gradient: `dy/dscale = q - zero_point - x / scale`, `dy/dzero_point = 0`, and where q was
    clamped `q - zero_point` and `-scale` (LSQ, Esser et al., ICLR 2020, with a zero point as in
    LSQ+, Bhalgat et al., CVPR workshops 2020).

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
    check_ste(ste)
    return torch.ops.fdda.fake_quantize(
        x, scale, zero_point, quant_min, quant_max, axis, ste == "clipped"
    )


def fake_quantize_range(
    x: Tensor,
    x_min: Tensor,
    x_max: Tensor,
    bits: int,
    axis: int | None = None,
    ste: str = "identity",
) -> Tensor:
    """Quantise and dequantise asymmetrically to a given range.

    `scale = (2^bits - 1) / max(x_max - x_min, 1e-8)`, `zp = round(scale * x_min) + 2^(bits-1)`,
    `q = clamp(round(scale * x - zp), -2^(bits-1), 2^(bits-1) - 1)`, `y = (q + zp) / scale`,
    rounding half to even, in float32 in this order: every backend gives the same bits. FDDA (Zhong
    et al., ECCV 2022), the quantiser of its released code. Where x_min or x_max require a gradient
    (after LSQ, Esser et al., ICLR 2020): an x below x_min or above x_max gives its own to that end;
    every other one its rounding error y - x over the range's width, to x_max, and to x_min with the
    opposite sign.

    Args:
        x: float32, bfloat16 or float16, any shape; computed in float32, rounded once.
        x_min: float32, one element, or [x.shape[axis]].
        x_max: float32, the shape of `x_min`.
        bits: 1 to 16.
        axis: the dimension with ranges of its own; None: one range for the whole tensor.
        ste: straight-through gradient: "identity" passes it everywhere, "clipped" only where
            x_min <= x <= x_max.

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
    check_ste(ste)
    return torch.ops.fdda.fake_quantize_range(x, x_min, x_max, bits, axis, ste == "clipped")


def observe_range(
    x: Tensor, x_min: Tensor, x_max: Tensor, keep: float, include_zero: bool
) -> tuple[Tensor, Tensor]:
    """Exponential moving average of the minimum and maximum, x read once; no gradient.

    Args:
        x: float32, bfloat16 or float16, any shape, not empty.
        x_min: float32, one element: the average so far.
        x_max: float32, one element: the average so far.
        keep: 0..1, what stays of the average: `x_min * keep + min(x) * (1 - keep)`.
        include_zero: the minimum counts as at most 0, the maximum as at least 0.

    Returns:
        The new x_min and x_max. A NaN or infinity in x makes both NaN.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or keep do not fit.
    """
    check_tensor(x, "x", FLOAT_DTYPES)
    check(x.numel() > 0, "x", "at least one element", list(x.shape))
    _check_parameter(x_min, "x_min", x, None)
    _check_parameter(x_max, "x_max", x, None)
    check(0 <= keep <= 1, "keep", "0 to 1", keep)
    x, x_min, x_max = x.detach(), x_min.detach(), x_max.detach()
    return torch.ops.fdda.observe_range(x, x_min, x_max, float(keep), include_zero)


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


def check_ste(ste: str) -> None:
    check(ste in ("identity", "clipped"), "ste", "'identity' or 'clipped'", repr(ste))


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


def _fake_gradients(grad, x, first, second, *rest) -> tuple[Tensor, Tensor, Tensor]:
    clipped, parameters = rest[-2:]
    return (
        torch.empty_like(x) if clipped else x.new_empty(0),
        torch.empty_like(first) if parameters else first.new_empty(0),
        torch.empty_like(second) if parameters else second.new_empty(0),
    )


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.clipped = inputs[:3] + inputs[-1:]
    ctx.settings = inputs[3:-1]
    ctx.parameters = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(*(tensors if ctx.clipped or ctx.parameters else ()))


def _gradients(ctx, grad: Tensor, backward: Callable) -> tuple:
    """Of x, of the two parameters, and None for all other arguments."""
    grad_x, parameters = grad, (None, None)
    if ctx.saved_tensors:
        made, *found = backward(
            grad, *ctx.saved_tensors, *ctx.settings, ctx.clipped, ctx.parameters
        )
        grad_x = made if ctx.clipped else grad
        parameters = found if ctx.parameters else parameters
    return grad_x, *parameters, *[None] * (len(ctx.settings) + 1)


def _backward(ctx, grad: Tensor) -> tuple:
    return _gradients(ctx, grad, torch.ops.fdda.fake_quantize_backward)


def _range_backward(ctx, grad: Tensor) -> tuple:
    return _gradients(ctx, grad, torch.ops.fdda.fake_quantize_range_backward)


def _setup_identity(ctx, inputs: tuple, output: Tensor) -> None:
    pass


def _backward_identity(ctx, grad: Tensor) -> tuple:
    return grad, None, None


define(
    "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
    "int? axis=None, bool clipped=False) -> Tensor",
    reference.fake_quantize,
    _fake,
)
register_autograd("fake_quantize", _backward, _setup)

define(
    "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int quant_min, "
    "int quant_max, int? axis, bool clipped, bool parameters) -> (Tensor, Tensor, Tensor)",
    reference.fake_quantize_backward,
    _fake_gradients,
)

define(
    "fake_quantize_range(Tensor x, Tensor x_min, Tensor x_max, int bits, int? axis=None, "
    "bool clipped=False) -> Tensor",
    reference.fake_quantize_range,
    _fake,
)
register_autograd("fake_quantize_range", _range_backward, _setup)

define(
    "fake_quantize_range_backward(Tensor grad, Tensor x, Tensor x_min, Tensor x_max, int bits, "
    "int? axis, bool clipped, bool ends) -> (Tensor, Tensor, Tensor)",
    reference.fake_quantize_range_backward,
    _fake_gradients,
)

define(
    "observe_range(Tensor x, Tensor x_min, Tensor x_max, float keep, bool include_zero) "
    "-> (Tensor, Tensor)",
    reference.observe_range,
    lambda x, x_min, x_max, *_: (torch.empty_like(x_min), torch.empty_like(x_max)),
)

define(
    "fake_quantize_minmax(Tensor x, int bits, int? axis=None) -> Tensor",
    reference.fake_quantize_minmax,
    _fake,
)
register_autograd("fake_quantize_minmax", _backward_identity, _setup_identity)

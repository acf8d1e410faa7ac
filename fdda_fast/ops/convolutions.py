"""3x3 convolutions with padding 1: the generator's, and the networks' plain one."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops import _winograd_bfloat16, reference
from fdda_fast.ops._checks import FLOAT_DTYPES, check, check_tensor
from fdda_fast.ops._layout import empty_channels_last
from fdda_fast.ops._library import define, define_pass, register_autograd
from fdda_fast.ops._winograd import winograd_pays


def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest x2 up-sampling, then a 3x3 convolution with padding 1.

    On the CPU by 9 instead of 36 products per pixel of x and pair of channels, exactly the same
    algebra, gradients included: the sums of taps that meet the same pixel of x are taken from the
    weights, x enters with its differences. In bfloat16 the products' sums run in float32 but each
    of the four products that make an output is rounded before they are added.

    By Winograd's algorithm, where the sizes make that faster: in float32 by 81 products per 16
    pixels, in bfloat16, on the processors that `conv3x3` names, by 25 per 4. Errors are as
    `conv3x3` has them, but in bfloat16 less than those of 9 products: root mean square 0.3 % of
    the result's, up to twice the direct convolution's. An infinity or NaN in x spreads to the
    8 x 8 outputs of its tiles, 4 x 4 in bfloat16.

    Args:
        x: [N, Cin, H, W], float32, bfloat16 or float16; channels_last is the fast layout.
        weight: float32 [Cout, Cin, 3, 3].
        bias: float32 [Cout].

    Returns:
        [N, Cout, 2H, 2W] of the dtype of x, channels_last.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes do not fit.
    """
    check_convolution(x, weight, bias)
    return torch.ops.fdda.upsample_conv3x3(x, weight, bias)


def conv3x3_few_outputs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution with padding 1, for a handful of output channels: those of an image.

    On the CPU by matrix products with the 9 * Cout narrow side alone gathered, never the 9 * Cin.

    Args:
        x: [N, Cin, H, W], float32, bfloat16 or float16; channels_last is the fast layout.
        weight: float32 [Cout, Cin, 3, 3].
        bias: float32 [Cout].

    Returns:
        [N, Cout, H, W] of the dtype of x, channels_last.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes do not fit.
    """
    check_convolution(x, weight, bias)
    return torch.ops.fdda.conv3x3_few_outputs(x, weight, bias)


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """A 3x3 convolution with stride 1 and padding 1.

    On the CPU by Winograd's algorithm, where the sizes make that faster; gradients included.

    In float32 by 36 instead of 144 products per 16 outputs and pair of channels. Root mean square
    of the error: about 1e-6 of the result's, up to 10 times the direct convolution's.

    In bfloat16 by 16 instead of 36 per 4 outputs, on x86 processors that multiply bfloat16 but have
    no matrix tiles (AVX512-BF16 without AMX), with multiples of 32 channels. What x and the weights
    are transformed to is rounded to bfloat16, sums run in float32. Root mean square of the error:
    about 0.4 % of the result's, up to 2.5 times the direct convolution's, for random numbers; the
    gradients' alike.

    An infinity or NaN in x spreads to the 4 x 4 outputs of its tiles, 2 x 2 in bfloat16.

    Args:
        x: float32 or bfloat16 [N, Cin, H, W]; channels_last is the fast layout.
        weight: [Cout, Cin, 3, 3], float32 or of the dtype of x; channels_last is the fast layout.

    Returns:
        [N, Cout, H, W] of the dtype of x, channels_last.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes do not fit.
    """
    check_tensor(x, "x", (torch.float32, torch.bfloat16), (None,) * 4)
    _check_weight(weight, x, tuple(dict.fromkeys((torch.float32, x.dtype))))
    if not _winograd_pays(x, weight):
        return reference.conv3x3(x, weight)
    return torch.ops.fdda.conv3x3(x, weight)


def check_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raises what the operators document."""
    check_tensor(x, "x", FLOAT_DTYPES)
    check(x.dim() == 4, "x", "[N, Cin, H, W]", list(x.shape))
    _check_weight(weight, x)
    check_tensor(bias, "bias", (torch.float32,), (len(weight),))


def _winograd_pays(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu":
        return False
    if x.dtype == torch.bfloat16:
        return _winograd_bfloat16.pays(x, weight)
    return winograd_pays(x, weight, channels=64, pixels=784)  # measured


def _check_weight(
    weight: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> None:
    check_tensor(weight, "weight", dtypes, (None, x.shape[1], 3, 3))
    check(weight.numel() > 0, "weight", "channels", list(weight.shape))


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _fake_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = weight.new_empty(len(weight))
    return empty_channels_last(x, x.shape[1]), weight.new_empty(weight.shape), grad_bias


def _define(name: str, scale: int) -> None:
    define(
        f"{name}(Tensor x, Tensor weight, Tensor bias) -> Tensor",
        getattr(reference, name),
        lambda x, weight, bias: empty_channels_last(x, len(weight), scale),
    )
    define(
        f"{name}_backward(Tensor grad_y, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)",
        getattr(reference, f"{name}_backward"),
        _fake_backward,
    )
    backward = getattr(torch.ops.fdda, f"{name}_backward")
    register_autograd(name, lambda ctx, grad: backward(grad, *ctx.saved_tensors), _setup)


_define("upsample_conv3x3", 2)
_define("conv3x3_few_outputs", 1)


def _setup_conv3x3(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight = inputs
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
    ctx.weight_dtype = weight.dtype


def _backward_conv3x3(ctx, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = None
    if weight is not None:
        grad_x = torch.ops.fdda.conv3x3_input_gradient(grad_y, weight)
    if x is not None:
        grad_weight = torch.ops.fdda.conv3x3_weight_gradient(grad_y, x).to(ctx.weight_dtype)
    return grad_x, grad_weight


define(
    "conv3x3(Tensor x, Tensor weight) -> Tensor",
    reference.conv3x3,
    lambda x, weight: empty_channels_last(x, len(weight)),
)
define(
    "conv3x3_input_gradient(Tensor grad_y, Tensor weight) -> Tensor",
    reference.conv3x3_input_gradient,
    lambda grad_y, weight: empty_channels_last(grad_y, weight.shape[1]),
)
define(
    "conv3x3_weight_gradient(Tensor grad_y, Tensor x) -> Tensor",
    reference.conv3x3_weight_gradient,
    lambda grad_y, x: x.new_empty(grad_y.shape[1], 3, 3, x.shape[1], dtype=torch.float32).permute(
        0, 3, 1, 2
    ),
)
register_autograd("conv3x3", _backward_conv3x3, _setup_conv3x3)

define_pass("_winograd_input(Tensor x, Tensor(a!) positions, int tile) -> ()")
define_pass("_winograd_gradient(Tensor grad_y, Tensor(a!) positions, int tile) -> ()")
define_pass("_winograd_output(Tensor positions, Tensor(a!) y, int tile) -> ()")
define_pass("_winograd_weights(Tensor weight, Tensor(a!) positions, bool rotated) -> ()")
define_pass("_winograd_weight_gradient(Tensor positions, Tensor(a!) grad_weight) -> ()")

define_pass("_winograd_bfloat16(Tensor x, Tensor weight, bool rotated, Tensor(a!) y) -> ()")
define_pass("_winograd_bfloat16_gradient(Tensor grad_y, Tensor x, Tensor(a!) grad_weight) -> ()")
define_pass("_winograd_upsample_bfloat16(Tensor x, Tensor weight, Tensor bias, Tensor(a!) y) -> ()")
define_pass(
    "_winograd_upsample_bfloat16_gradient(Tensor grad_y, Tensor x, Tensor weight, "
    "Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor(c!) grad_bias) -> ()"
)

define_pass("_winograd_upsample_input(Tensor x, Tensor(a!) positions, int tile) -> ()")
define_pass(
    "_winograd_upsample_input_gradient(Tensor positions, Tensor(a!) grad_x, int tile) -> ()"
)
define_pass(
    "_winograd_upsample_gradient(Tensor grad_y, Tensor(a!) products, Tensor(b!) sums, int tile) "
    "-> ()"
)
define_pass("_winograd_upsample_output(Tensor products, Tensor(a!) y, int tile) -> ()")
define_pass(
    "_winograd_upsample_norm_output(Tensor products, Tensor tables, float negative_slope, "
    "Tensor(a!) y, int tile) -> ()"
)
define_pass("_winograd_upsample_weights(Tensor weight, Tensor(a!) products) -> ()")
define_pass("_winograd_upsample_weight_gradient(Tensor products, Tensor(a!) grad_weight) -> ()")

_UPSAMPLE_NORM = "Tensor x, Tensor panels, Tensor tables, float negative_slope"
define_pass("_winograd_upsample_panels(Tensor weight, Tensor(a!) panels) -> ()")
define_pass(f"_upsample_norm({_UPSAMPLE_NORM}, Tensor(a!) y) -> ()")
define_pass(f"_upsample_norm_taps({_UPSAMPLE_NORM}, Tensor taps, Tensor bias, Tensor(a!) y) -> ()")

_STRIP = "int image, int images, int row, int row_end"
_MAPS = "Tensor row_map, Tensor column_map, Tensor mixed_map"
_OUT_MAPS = "Tensor(b!) row_map, Tensor(c!) column_map, Tensor(d!) mixed_map"
define_pass(f"_upsample_differences(Tensor x, {_OUT_MAPS}, {_STRIP}) -> ()")
define_pass(f"_upsample_sum(Tensor x, {_MAPS}, Tensor bias, Tensor(a!) y, {_STRIP}) -> ()")
define_pass(
    f"_upsample_reduce(Tensor grad_y, Tensor(a!) x, {_OUT_MAPS}, Tensor(e!) sum, {_STRIP}) -> ()"
)
define_pass(f"_upsample_adjoint(Tensor x, {_MAPS}, Tensor(a!) grad_x, {_STRIP}) -> ()")
define_pass(f"_gather_taps(Tensor grad_y, Tensor(a!) planes, {_STRIP}) -> ()")
define_pass(f"_sum_taps(Tensor planes, Tensor bias, Tensor(a!) y, {_STRIP}) -> ()")
define_pass("_add_parts(Tensor parts, Tensor(a!) total) -> ()")
_NORM = "Tensor x, Tensor tables, float negative_slope"
define_pass(f"_norm_strip({_NORM}, Tensor(a!) y, {_STRIP}) -> ()")
define_pass(
    f"_norm_strip_sums({_NORM}, Tensor grad_y, Tensor(a!) y, Tensor(b!) sums, {_STRIP}) -> ()"
)
define_pass(
    f"_norm_strip_gradient({_NORM}, Tensor grad_y, Tensor corrections, Tensor(a!) grad_x, {_STRIP})"
    " -> ()"
)
_CONVOLVED = f"{_NORM}, Tensor grad_y, Tensor taps"
define_pass(f"_norm_few_outputs_sums({_CONVOLVED}, Tensor(a!) sums, Tensor(b!) grad_taps) -> ()")
define_pass(
    f"_norm_few_outputs_gradient({_CONVOLVED}, Tensor corrections, Tensor(a!) grad_x) -> ()"
)

"""The generator's 3x3 convolutions: behind up-sampling, and with few output channels."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops import reference
from fdda_fast.ops._checks import FLOAT_DTYPES, check, check_tensor
from fdda_fast.ops._layout import empty_channels_last
from fdda_fast.ops._library import define, define_pass, register_autograd


def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest x2 up-sampling, then a 3x3 convolution with padding 1.

    On the CPU by 9 instead of 36 products per pixel of x and pair of channels, exactly the same
    algebra, gradients included: the sums of taps that meet the same pixel of x are taken from the
    weights, x enters with its differences. In bfloat16 the products' sums run in float32 but each
    of the four products that make an output is rounded before they are added.

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


def check_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raises what the operators document."""
    check_tensor(x, "x", FLOAT_DTYPES)
    check(x.dim() == 4, "x", "[N, Cin, H, W]", list(x.shape))
    check_tensor(weight, "weight", (torch.float32,), (None, x.shape[1], 3, 3))
    check(weight.numel() > 0, "weight", "channels", list(weight.shape))
    check_tensor(bias, "bias", (torch.float32,), (len(weight),))


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

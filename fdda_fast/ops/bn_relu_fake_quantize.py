"""Eval-mode batch norm, residual addition, ReLU and fake quantisation in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops import reference
from fdda_fast.ops._checks import FLOAT_DTYPES, check, check_int, check_tensor
from fdda_fast.ops._library import define, register_autograd
from fdda_fast.ops.bn_relu_class_moments import clip_limits
from fdda_fast.ops.fake_quantize import check_ste


def bn_relu_fake_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    x_min: Tensor,
    x_max: Tensor,
    bits: int,
    relu: bool | float = True,
    residual: Tensor | None = None,
    ste: str = "identity",
) -> Tensor:
    """What a quantised network does between two convolutions: memory is read and written once.

    `y = fake_quantize_range(clip(batch_norm(x) + residual), x_min, x_max, bits)`, batch norm as
    `x * scale + shift`, all in float32 and rounded once. Differentiable in x, weight, bias,
    residual, x_min and x_max, one pass backward, too. Clipping passes no gradient where it clips;
    that of the quantiser is as in `fake_quantize_range`.

    Args:
        x: [N, C, H, W] or [N, C], float32, bfloat16 or float16; fast where channels_last.
        weight, bias, running_mean, running_var: float32 [C].
        eps: added to running_var.
        x_min, x_max: float32, one element: the quantiser's range.
        bits: 1 to 16.
        relu: True: ReLU; a number: clipped to 0 .. that number (ReLU6: 6.0); False: not clipped.
        residual: dtype and shape of x; None: nothing is added.
        ste: straight-through gradient of the quantiser: "identity" or "clipped".

    Returns:
        Dtype, shape and strides of x.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes do not fit, or running_mean or running_var require a gradient.
    """
    check_tensor(x, "x", FLOAT_DTYPES)
    check(x.dim() in (2, 4), "x", "[N, C] or [N, C, H, W]", list(x.shape))
    norm = {"weight": weight, "bias": bias}
    running = {"running_mean": running_mean, "running_var": running_var}
    for name, tensor in (norm | running).items():
        check_tensor(tensor, name, (torch.float32,), (x.shape[1],))
    for name, tensor in running.items():
        check(not tensor.requires_grad, name, "a tensor without gradient", "requires_grad=True")
    for name, tensor in {"x_min": x_min, "x_max": x_max}.items():
        check_tensor(tensor, name, (torch.float32,))
        check(tensor.numel() == 1, name, "one element", list(tensor.shape))
    check_int(bits, "bits", 1, 16)
    if residual is not None:
        check_tensor(residual, "residual", (x.dtype,), x.shape)
    check_ste(ste)
    low, high = clip_limits(relu)
    return torch.ops.fdda.bn_relu_fake_quantize(
        x, weight, bias, running_mean, running_var, eps, x_min, x_max, bits, low, high, residual,
        ste == "clipped",
    )  # fmt: skip


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    *read, ctx.eps, x_min, x_max, ctx.bits, ctx.low, ctx.high, residual, ctx.clipped = inputs
    ctx.save_for_backward(*read, x_min, x_max, residual)


def _backward(ctx, grad: Tensor) -> tuple:
    *read, x_min, x_max, residual = ctx.saved_tensors
    range_gradient = ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
    grad_x, grad_residual, grad_weight, grad_bias, *grad_range = (
        torch.ops.fdda.bn_relu_fake_quantize_backward(
            grad, *read, ctx.eps, x_min, x_max, ctx.bits, ctx.low, ctx.high, residual, ctx.clipped,
            range_gradient,
        )
    )  # fmt: skip
    return (
        *(grad_x, grad_weight, grad_bias, None, None, None),
        *(grad_range if range_gradient else (None, None)),
        *(None, None, None, None if residual is None else grad_residual, None),
    )


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(grad, x, weight, bias, mean, var, eps, x_min, x_max, *rest) -> tuple:
    residual, _, range_gradient = rest[-3:]
    return (
        torch.empty_like(x),
        x.new_empty(0) if residual is None else torch.empty_like(x),
        torch.empty_like(weight),
        torch.empty_like(bias),
        torch.empty_like(x_min) if range_gradient else x_min.new_empty(0),
        torch.empty_like(x_max) if range_gradient else x_max.new_empty(0),
    )


_INPUTS = (
    "Tensor x, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var, float eps, "
    "Tensor x_min, Tensor x_max, int bits, float low, float high"
)

define(
    f"bn_relu_fake_quantize({_INPUTS}, Tensor? residual=None, bool clipped=False) -> Tensor",
    reference.bn_relu_fake_quantize,
    _fake,
)
register_autograd("bn_relu_fake_quantize", _backward, _setup)

define(
    f"bn_relu_fake_quantize_backward(Tensor grad, {_INPUTS}, Tensor? residual, bool clipped, "
    "bool range_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.bn_relu_fake_quantize_backward,
    _fake_backward,
)

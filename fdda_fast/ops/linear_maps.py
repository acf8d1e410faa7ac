"""A linear layer whose outputs are feature maps: how a generator begins."""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops import reference
from fdda_fast.ops._checks import FLOAT_DTYPES, check, check_tensor, pair
from fdda_fast.ops._library import define, define_pass, register_autograd
from fdda_fast.ops._products import CHUNK


def linear_to_maps(
    z: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """`linear(z, weight, bias).view(N, C, *size).to(dtype)` in channels_last, differentiable.

    The CPU kernel reads the weight once and writes its gradient once, which is all that such a
    layer costs where images are few and maps are large; nothing is stored between product and maps.

    Args:
        z: float32 [N, K].
        weight, bias: float32 [C * H * W, K] and [C * H * W].
        size: (H, W).
        dtype: float32, bfloat16 or float16, that of the result.

    Returns:
        [N, C, H, W] of `dtype`, channels_last.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes do not fit.
    """
    check_tensor(z, "z", (torch.float32,), (None, None))
    check_tensor(weight, "weight", (torch.float32,), (None, z.shape[1]))
    check_tensor(bias, "bias", (torch.float32,), (len(weight),))
    height, width = pair(size, "size", 1)
    maps = height * width
    check(len(weight) % maps == 0, "weight", f"a multiple of {maps} rows", len(weight))
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected one of {FLOAT_DTYPES}, got {dtype}")
    return torch.ops.fdda.linear_to_maps(z, weight, bias, [height, width], dtype)


def _fake(z: Tensor, weight: Tensor, bias: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    channels = len(weight) // (size[0] * size[1])
    return z.new_empty(len(z), *size, channels, dtype=dtype).permute(0, 3, 1, 2)


def _fake_backward(grad_y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    outputs = grad_y.shape[1:].numel()
    return z.new_empty(outputs, z.shape[1]), z.new_empty(outputs)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    z, weight, *_ = inputs
    ctx.save_for_backward(z, weight)


def _long_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, whose sums, one term for every output of the layer, are made chunk by chunk: libraries
    cut a long one by the number of threads."""
    count = len(b) // CHUNK
    whole = count * CHUNK
    chunks = a[:, :whole].unflatten(1, (count, CHUNK)), b[:whole].unflatten(0, (count, CHUNK))
    return torch.bmm(chunks[0].transpose(0, 1), chunks[1]).sum(0) + a[:, whole:] @ b[whole:]


def _backward(ctx, grad_y: Tensor) -> tuple:
    z, weight = ctx.saved_tensors
    grad_z = _long_product(grad_y.float().flatten(1), weight) if ctx.needs_input_grad[0] else None
    return grad_z, *torch.ops.fdda.linear_to_maps_backward(grad_y, z), None, None


define(
    "linear_to_maps(Tensor z, Tensor weight, Tensor bias, int[] size, ScalarType dtype) -> Tensor",
    reference.linear_to_maps,
    _fake,
)
define(
    "linear_to_maps_backward(Tensor grad_y, Tensor z) -> (Tensor, Tensor)",
    reference.linear_to_maps_backward,
    _fake_backward,
)
register_autograd("linear_to_maps", _backward, _setup)
define_pass("_linear_maps(Tensor z, Tensor weight, Tensor bias, Tensor(a!) y) -> ()")
define_pass(
    "_linear_maps_gradient(Tensor grad_y, Tensor z, Tensor(a!) grad_weight, Tensor(b!) grad_bias) "
    "-> ()"
)

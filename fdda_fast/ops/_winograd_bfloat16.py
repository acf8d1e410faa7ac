"""CPU implementations in bfloat16 by Winograd's algorithms on 2 x 2 pixels of x.

conv3x3: F(2x2, 3x3), 16 products where 36 would do. upsample_conv3x3: 25 where 36 would do by
_nine_products.py, 144 without any algebra. Unlike float32 (_winograd.py, _winograd_upsample.py),
bfloat16 does not stand the factors of larger tiles. One pass, csrc/cpu/winograd_bfloat16.h,
transforms, multiplies and transforms back, some tiles at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops import reference
from fdda_fast.ops._layout import nhwc
from fdda_fast.ops._library import prefers_own_bfloat16_products

_MULTIPLE = 32  # that both channels must be of
_PIXELS = 784  # of x, with fewer of them the transforms of the weights show


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    if not _fits(*weight.shape[:2]):
        return reference.conv3x3(x, weight)
    return _convolution(x, weight, len(weight), rotated=False)


def conv3x3_input_gradient(grad_y: Tensor, weight: Tensor) -> Tensor:
    if not _fits(*weight.shape[:2]):
        return reference.conv3x3_input_gradient(grad_y, weight)
    return _convolution(grad_y, weight, weight.shape[1], rotated=True)


def conv3x3_weight_gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    outputs, inputs = grad_y.shape[1], x.shape[1]
    if not _fits(outputs, inputs):
        return reference.conv3x3_weight_gradient(grad_y, x)
    grad_weight = x.new_empty(outputs, 3, 3, inputs, dtype=torch.float32)
    torch.ops.fdda._winograd_bfloat16_gradient(nhwc(grad_y), nhwc(x), grad_weight)
    return grad_weight.permute(0, 3, 1, 2)


def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Where `pays` holds."""
    x = nhwc(x)
    batch, height, width, _ = x.shape
    y = x.new_empty(batch, 2 * height, 2 * width, len(weight))
    torch.ops.fdda._winograd_upsample_bfloat16(x, nhwc(weight), bias, y)
    return y.permute(0, 3, 1, 2)


@torch.no_grad()
def upsample_conv3x3_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where `pays` holds."""
    x, grad_y, filters = nhwc(x), nhwc(grad_y), nhwc(weight)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(filters)
    grad_bias = weight.new_zeros(len(weight), dtype=torch.float64)
    torch.ops.fdda._winograd_upsample_bfloat16_gradient(
        grad_y, x, filters, grad_x, grad_weight, grad_bias
    )
    grad_weight = grad_weight.permute(0, 3, 1, 2).contiguous()
    return grad_x.permute(0, 3, 1, 2), grad_weight, grad_bias.float()


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether x [N, C, H, W] is bfloat16 and these passes are fast."""
    batch, _, height, width = x.shape
    computed = 4 * batch * -(-height // 2) * -(-width // 2)  # what lies beyond the image, too
    enough = batch * height * width >= max(_PIXELS, computed / 2)
    fits = x.dtype == torch.bfloat16 and enough and _fits(*weight.shape[:2])
    return fits and prefers_own_bfloat16_products()


def _fits(outputs: int, inputs: int) -> bool:
    return outputs % _MULTIPLE == inputs % _MULTIPLE == 0


@torch.no_grad()
def _convolution(x: Tensor, weight: Tensor, outputs: int, rotated: bool) -> Tensor:
    x = nhwc(x)
    y = x.new_empty(*x.shape[:3], outputs)
    torch.ops.fdda._winograd_bfloat16(x, nhwc(weight), rotated, y)
    return y.permute(0, 3, 1, 2)

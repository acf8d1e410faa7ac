"""CPU implementation of conv3x3 in bfloat16: Winograd's F(2x2, 3x3), 16 products where 36 would do.

Unlike float32 (_winograd.py), bfloat16 does not stand the larger factors of F(4x4, 3x3). One pass,
csrc/cpu/winograd_bfloat16.cpp, transforms, multiplies and transforms back, some tiles at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops import reference
from fdda_fast.ops._layout import nhwc

_MULTIPLE = 32  # that both channels must be of


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    if not fits(weight.shape[0], weight.shape[1]):
        return reference.conv3x3(x, weight)
    return _convolution(x, weight, len(weight), rotated=False)


def conv3x3_input_gradient(grad_y: Tensor, weight: Tensor) -> Tensor:
    if not fits(weight.shape[0], weight.shape[1]):
        return reference.conv3x3_input_gradient(grad_y, weight)
    return _convolution(grad_y, weight, weight.shape[1], rotated=True)


def conv3x3_weight_gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    outputs, inputs = grad_y.shape[1], x.shape[1]
    if not fits(outputs, inputs):
        return reference.conv3x3_weight_gradient(grad_y, x)
    grad_weight = x.new_empty(outputs, 3, 3, inputs, dtype=torch.float32)
    torch.ops.fdda._winograd_bfloat16_gradient(nhwc(grad_y), nhwc(x), grad_weight)
    return grad_weight.permute(0, 3, 1, 2)


def fits(outputs: int, inputs: int) -> bool:
    return outputs % _MULTIPLE == inputs % _MULTIPLE == 0


@torch.no_grad()
def _convolution(x: Tensor, weight: Tensor, outputs: int, rotated: bool) -> Tensor:
    x = nhwc(x)
    y = x.new_empty(*x.shape[:3], outputs)
    torch.ops.fdda._winograd_bfloat16(x, nhwc(weight), rotated, y)
    return y.permute(0, 3, 1, 2)

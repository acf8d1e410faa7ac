"""3x3 convolutions: the generator's on float64; the plain one is the framework's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    y = F.conv2d(x, weight.to(x.dtype), padding=1)
    return y.contiguous(memory_format=torch.channels_last)


def conv3x3_input_gradient(grad_y: Tensor, weight: Tensor) -> Tensor:
    shape = (len(grad_y), weight.shape[1], *grad_y.shape[2:])
    grad_x = conv2d_input(shape, weight.to(grad_y.dtype), grad_y, padding=1)
    return grad_x.contiguous(memory_format=torch.channels_last)


def conv3x3_weight_gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    shape = (grad_y.shape[1], x.shape[1], 3, 3)
    grad_weight = conv2d_weight(x.float(), shape, grad_y.float(), padding=1)
    return grad_weight.contiguous(memory_format=torch.channels_last)


def conv3x3_few_outputs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _channels_last(F.conv2d(x.double(), weight.double(), bias.double(), padding=1), x)


def conv3x3_few_outputs_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, *rest = _gradients(grad_y, x.double(), weight)
    return _channels_last(grad_x, x), *rest


def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv2d(_upsampled(x), weight.double(), bias.double(), padding=1)
    return _channels_last(y, x)


def upsample_conv3x3_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, *rest = _gradients(grad_y, _upsampled(x), weight)
    grad_x = grad.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).sum((3, 5))
    return _channels_last(grad_x, x), *rest


def _upsampled(x: Tensor) -> Tensor:
    return x.double().repeat_interleave(2, 2).repeat_interleave(2, 3)


def _gradients(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x in float64, of weight and bias in float32."""
    one = [1, 1]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_y.double(), x, weight.double(), [len(weight)], one, one, one, False, [0, 0], 1,
        [True] * 3,
    )  # fmt: skip
    return grad_x, grad_weight.float().contiguous(), grad_bias.float()


def _channels_last(y: Tensor, x: Tensor) -> Tensor:
    """y with the dtype of x."""
    out = torch.empty(y.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return out.copy_(y)

"""CPU implementation of conv3x3_few_outputs: only its narrow side, 9 * Cout wide, is gathered.

Forward: the products of every pixel with all taps, then nine of them make an output. Backward: the
nine neighbours in grad_y of every pixel; one matrix product with the weights is the gradient of x,
another one with x that of the weights. Strip by strip, so that the planes stay in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops._layout import nhwc
from fdda_fast.ops._strips import PixelProduct, Strip, strips


def conv3x3_few_outputs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.dtype == torch.float16:
        return conv3x3_few_outputs(x.float(), weight, bias).half()
    x = nhwc(x)
    outputs = len(weight)
    y = x.new_empty(*x.shape[:3], outputs)
    if y.numel() == 0:
        return y.permute(0, 3, 1, 2)
    taps = _taps(weight, x.dtype)
    memory = x.new_empty(0)
    for strip in _strips(x, outputs):
        # The rows above and below take part; their products come twice.
        row, row_end = max(0, strip.row - 1), min(x.shape[1], strip.row_end + 1)
        values = _pixels(x, Strip(strip.image, strip.images, row, row_end))
        memory = _at_least(memory, len(taps) * len(values))
        planes = memory[: len(taps) * len(values)].view(len(taps), -1)
        torch.mm(taps, values.t(), out=planes)
        torch.ops.fdda._sum_taps(planes, bias, y, *strip.place())
    return y.permute(0, 3, 1, 2)


@torch.no_grad()
def conv3x3_few_outputs_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float16:
        grad_x, *rest = conv3x3_few_outputs_backward(grad_y.float(), x.float(), weight)
        return grad_x.half(), *rest
    x, grad_y = nhwc(x), nhwc(grad_y)
    grad_x = torch.empty_like(x)
    outputs, inputs = weight.shape[:2]
    taps = _taps(weight, x.dtype)
    grad_taps = PixelProduct(x, *taps.shape)
    memory = x.new_empty(0)
    for strip in _strips(x, outputs) if grad_y.numel() else []:
        values = _pixels(x, strip)
        memory = _at_least(memory, len(taps) * len(values))
        planes = memory[: len(taps) * len(values)].view(len(taps), -1)
        torch.ops.fdda._gather_taps(grad_y, planes, *strip.place())
        torch.mm(planes.t(), taps, out=_pixels(grad_x, strip))
        grad_taps.add(planes.t(), values)
    grad_weight = grad_taps.total.view(3, 3, outputs, inputs).permute(2, 3, 0, 1).contiguous()
    grad_bias = grad_y.sum((0, 1, 2), dtype=torch.float32)
    return grad_x.permute(0, 3, 1, 2), grad_weight, grad_bias


def _taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[9 * Cout, Cin]"""
    return weight.permute(2, 3, 0, 1).flatten(0, 2).to(dtype)


def _strips(x: Tensor, outputs: int) -> list[Strip]:
    batch, height, width, inputs = x.shape
    return strips(batch, height, x.element_size() * width * (2 * inputs + 9 * outputs))


def _pixels(x: Tensor, strip: Strip) -> Tensor:
    """[pixels, channels], a view."""
    rows = x[strip.image : strip.image + strip.images, strip.row : strip.row_end]
    return rows.view(-1, x.shape[3])


def _at_least(memory: Tensor, size: int) -> Tensor:
    """Memory that strips share: fresh pages would cost more than the passes."""
    return memory if memory.numel() >= size else memory.new_empty(size)

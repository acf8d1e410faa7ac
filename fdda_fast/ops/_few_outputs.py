"""CPU implementation of conv3x3_few_outputs: only its narrow side, 9 * Cout wide, is gathered.

Forward: the products of every pixel with all taps, then nine of them make an output. Backward: the
nine neighbours in grad_y of every pixel; one matrix product with the weights is the gradient of x,
another one with x that of the weights. Strip by strip, so that the planes stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fdda_fast.ops._layout import nhwc
from fdda_fast.ops._products import PixelProduct, multiply
from fdda_fast.ops._strips import Strip, strips


def conv3x3_few_outputs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.dtype == torch.float16:
        return conv3x3_few_outputs(x.float(), weight, bias).half()
    x = nhwc(x)
    return forward(x, weight, bias, lambda strip: _pixels(x, strip))


@torch.no_grad()
def conv3x3_few_outputs_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float16:
        grad_x, *rest = conv3x3_few_outputs_backward(grad_y.float(), x.float(), weight)
        return grad_x.half(), *rest
    x, grad_y = nhwc(x), nhwc(grad_y)
    grad_x = torch.empty_like(x)
    taps = taps_of(weight, x.dtype)
    grad_taps = PixelProduct(x, *taps.shape)
    for strip, planes in backward_strips(grad_y, x, len(weight)):
        multiply(planes.t(), taps, _pixels(grad_x, strip))
        grad_taps.add(planes.t(), _pixels(x, strip))
    return grad_x.permute(0, 3, 1, 2), *weight_gradients(grad_taps.total, grad_y, weight)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, values_of: Callable[[Strip], Tensor]
) -> Tensor:
    """The convolution of values_of(strip), [pixels, Cin], for strips of x [N, H, W, Cin]."""
    y = x.new_empty(*x.shape[:3], len(weight))
    taps, memory = taps_of(weight, x.dtype), StripMemory(x)
    for strip in _strips(x, len(weight)):
        # The rows above and below take part; their products come twice.
        row, row_end = max(0, strip.row - 1), min(x.shape[1], strip.row_end + 1)
        values = values_of(Strip(strip.image, strip.images, row, row_end))
        planes = memory.matrix(len(taps), len(values))
        multiply(taps, values.t(), planes)
        torch.ops.fdda._sum_taps(planes, bias, y, *strip.place())
    return y.permute(0, 3, 1, 2)


def backward_strips(grad_y: Tensor, x: Tensor, outputs: int) -> Iterator[tuple[Strip, Tensor]]:
    """Strips, and what of grad_y meets each of their pixels: planes [9 * Cout, pixels]."""
    memory = StripMemory(x)
    for strip in _strips(x, outputs):
        pixels = strip.images * (strip.row_end - strip.row) * x.shape[2]
        planes = memory.matrix(9 * outputs, pixels)
        torch.ops.fdda._gather_taps(grad_y, planes, *strip.place())
        yield strip, planes


def weight_gradients(grad_taps: Tensor, grad_y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Those of weight and bias, from the sum of all strips' planes times values."""
    outputs, inputs = weight.shape[:2]
    grad_weight = grad_taps.view(3, 3, outputs, inputs).permute(2, 3, 0, 1).contiguous()
    return grad_weight, grad_y.sum((0, 1, 2), dtype=torch.float32)


def taps_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[9 * Cout, Cin]"""
    return weight.permute(2, 3, 0, 1).flatten(0, 2).to(dtype)


class StripMemory:
    """Memory that the strips of x [N, H, W, C] share: fresh pages would cost more than a pass."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.memory = x.shape, x.new_empty(0)

    def matrix(self, rows: int, columns: int) -> Tensor:
        if self.memory.numel() < rows * columns:
            self.memory = self.memory.new_empty(rows * columns)
        return self.memory[: rows * columns].view(rows, columns)

    def pixels(self, strip: Strip) -> Tensor:
        """[pixels, C]"""
        _, _, width, channels = self.shape
        return self.matrix(strip.images * (strip.row_end - strip.row) * width, channels)


def _strips(x: Tensor, outputs: int) -> list[Strip]:
    batch, height, width, inputs = x.shape
    if x.numel() == 0:
        return []
    return strips(batch, height, x.element_size() * width * (2 * inputs + 9 * outputs))


def _pixels(x: Tensor, strip: Strip) -> Tensor:
    """[pixels, channels], a view."""
    rows = x[strip.image : strip.image + strip.images, strip.row : strip.row_end]
    return rows.view(-1, x.shape[3])

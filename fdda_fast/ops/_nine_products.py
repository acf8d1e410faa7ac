"""CPU implementation of upsample_conv3x3: 9 matrix products where 36 would do.

Nearest x2 up-sampling followed by a filter (a, b, c) is, with s = a + b + c and the differences
D[i] = x[i] - x[i-1] (x is zero outside), y[2i] = s*x[i] - a*D[i] and y[2i+1] = s*x[i] + c*D[i+1].
In two dimensions four maps, x and its row, column and mixed differences, meet 1, 2, 2 and 4
weights; four terms make an output. The products run in the library's GEMM, strip by strip, so that
maps and products stay in cache; csrc/cpu/upsample_conv.cpp makes the maps and adds the terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdda_fast.ops._layout import nhwc
from fdda_fast.ops._products import PixelProduct, multiply
from fdda_fast.ops._strips import Strip, strips

# Weights of x and of its row, column and mixed differences.
_MAPS = (1, 2, 2, 4)


def _pixels(strip: Strip, width: int) -> list[int]:
    """Pixels of the four maps that the strip's sums read.

    Row i of the row and mixed differences belongs to the strip of row i - 1, row 0 to the first.
    """
    rows = strip.row_end - strip.row
    sizes = (rows, width), (rows + 1, width), (rows, width + 1), (rows + 1, width + 1)
    return [strip.images * r * w for r, w in sizes]


def _kept(strip: Strip, width: int) -> list[int]:
    """How many of them come first and are the last ones of the strip before."""
    return [0, width, 0, width + 1] if strip.row else [0] * 4


class _Buffers:
    """Four matrices of pixels x channels, reused by every strip: fresh memory would page-fault."""

    def __init__(
        self, like: Tensor, strips: list[Strip], width: int, channels: Sequence[int]
    ) -> None:
        most = [max(counts) for counts in zip(*(_pixels(s, width) for s in strips), strict=True)]
        self.memory = [like.new_empty(p, c) for p, c in zip(most, channels, strict=True)]
        self.used = [0] * 4
        self.width = width

    def own(self, strip: Strip) -> list[Tensor]:
        """Room for the pixels that belong to the strip."""
        sizes = zip(self.memory, *self._sizes(strip), strict=True)
        return [memory[: pixels - kept] for memory, pixels, kept in sizes]

    def chained(self, strip: Strip) -> tuple[list[Tensor], list[Tensor]]:
        """All that the strip's sums read, and the part of it to be written: its own pixels.

        For one strip after the other, since the rest is what the last one wrote.
        """
        whole, own = [], []
        for m, (pixels, kept) in enumerate(zip(*self._sizes(strip), strict=True)):
            memory, used = self.memory[m], self.used[m]
            if kept:
                memory[:kept] = memory[used - kept : used]
            self.used[m] = pixels
            whole.append(memory[:pixels])
            own.append(memory[kept:pixels])
        return whole, own

    def _sizes(self, strip: Strip) -> tuple[list[int], list[int]]:
        return _pixels(strip, self.width), _kept(strip, self.width)


def _signs(like: Tensor) -> Tensor:
    """[9, 3, 3]: what the 9 products' weights take from the 9 taps."""
    one_dimension = like.new_tensor([[1, 1, 1], [-1, 0, 0], [0, 0, 1]])
    both = torch.einsum("as,bt->abst", one_dimension, one_dimension)
    parts = (both[:1, 0], both[1:, 0], both[0, 1:], both[1:, 1:].flatten(0, 1))
    return torch.cat(parts)


def _product_weights(weight: Tensor) -> list[Tensor]:
    """Per map [Cin, weights * Cout] from [Cout, Cin, 3, 3], float32."""
    products = torch.einsum("kst,oist->iko", _signs(weight), weight)
    return [part.flatten(1) for part in products.split(_MAPS, 1)]


class _Plan:
    """The strips of an NHWC tensor x, and buffers for its maps and for their products."""

    def __init__(self, x: Tensor, outputs: int) -> None:
        batch, height, self.width, inputs = x.shape
        self.x = x
        row_bytes = x.element_size() * self.width * (4 * inputs + sum(_MAPS) * outputs)
        self.strips = strips(batch, height, row_bytes)
        self.map_channels = [inputs] * 4
        self.product_channels = [outputs * count for count in _MAPS]

    def buffers(self, channels: Sequence[int]) -> _Buffers:
        return _Buffers(self.x, self.strips, self.width, channels)


def _write_maps(x: Tensor, strip: Strip, memory: _Buffers) -> list[Tensor]:
    """The strip's part of x and of its differences, [pixels, Cin] each."""
    values = x[strip.image : strip.image + strip.images, strip.row : strip.row_end]
    differences = memory.own(strip)[1:]
    torch.ops.fdda._upsample_differences(x, *differences, *strip.place())
    return [values.reshape(-1, x.shape[3]), *differences]


def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.dtype == torch.float16:
        return upsample_conv3x3(x.float(), weight, bias).half()
    x = nhwc(x)
    batch, height, width, _ = x.shape
    y = x.new_empty(batch, 2 * height, 2 * width, len(weight))
    if y.numel():
        plan = _Plan(x, len(weight))
        weights = [w.to(x.dtype) for w in _product_weights(weight)]
        maps = plan.buffers(plan.map_channels)
        products = plan.buffers(plan.product_channels)
        for strip in plan.strips:
            terms, own_terms = products.chained(strip)
            for values, w, out in zip(_write_maps(x, strip, maps), weights, own_terms, strict=True):
                multiply(values, w, out)
            torch.ops.fdda._upsample_sum(*terms, bias, y, *strip.place())
    return y.permute(0, 3, 1, 2)


@torch.no_grad()
def upsample_conv3x3_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float16:
        grad_x, *rest = upsample_conv3x3_backward(grad_y.float(), x.float(), weight)
        return grad_x.half(), *rest
    x, grad_y = nhwc(x), nhwc(grad_y)
    grad_x = torch.empty_like(x)
    outputs, inputs = weight.shape[:2]
    grad_bias = weight.new_zeros(outputs, dtype=torch.float64)
    if grad_y.numel() == 0:
        return grad_x.permute(0, 3, 1, 2), torch.zeros_like(weight), grad_bias.float()
    plan = _Plan(x, outputs)
    transposed = [w.t().to(x.dtype).contiguous() for w in _product_weights(weight)]
    grad_weights = [PixelProduct(x, inputs, columns) for columns in plan.product_channels]
    maps, map_grads = (plan.buffers(plan.map_channels) for _ in range(2))
    product_grads = plan.buffers(plan.product_channels)
    for strip in plan.strips:
        grads = product_grads.own(strip)
        sums = weight.new_empty(strip.images * (strip.row_end - strip.row), outputs)
        torch.ops.fdda._upsample_reduce(grad_y, *grads, sums, *strip.place())
        grad_bias += sums.sum(0, dtype=torch.float64)
        terms, own_terms = map_grads.chained(strip)
        for values, grad, w, out, grad_weight in zip(
            _write_maps(x, strip, maps), grads, transposed, own_terms, grad_weights, strict=True
        ):
            multiply(grad, w, out)
            grad_weight.add(values, grad)
        torch.ops.fdda._upsample_adjoint(*terms, grad_x, *strip.place())
    products = torch.cat([g.total.unflatten(1, (-1, outputs)) for g in grad_weights], 1)
    grad_weight = torch.einsum("kst,iko->oist", _signs(weight), products).contiguous()
    return grad_x.permute(0, 3, 1, 2), grad_weight, grad_bias.float()

"""Matrix products of the convolutions.

PyTorch's run in MKL and oneDNN. MKL keeps its AVX-512 kernels to Intel's processors: on AMD's Zen 5
it was measured at 45 billion multiply-adds a second where this library's kernel reaches twice that.
oneDNN's bfloat16 products of few columns or rows share lines of memory among threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdda_fast.ops._library import (
    define_pass,
    prefers_own_bfloat16_products,
    prefers_own_products,
)

define_pass("_products(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()")

CHUNK = 512  # terms that a matrix product sums; libraries were seen to split longer sums


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, of [M, K] and [K, N] or, in float32, of as many matrices; out is dense."""
    if prefers_own(a):
        torch.ops.fdda._products(a, b, out, False)
    else:
        torch.matmul(a, b, out=out)


def add_products(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b, of float32 [P, M, K] and [P, K, N]; out is dense."""
    if prefers_own(a):
        torch.ops.fdda._products(a, b, out, True)
    else:
        out.baddbmm_(a, b)


class PixelProduct:
    """Sum of a^T b over matrices [pixels, A] and [pixels, B], strip by strip, in float32.

    The framework's chunk by chunk: the library may cut a long sum by the number of threads, and
    bfloat16 would round it once at the end.
    """

    def __init__(self, like: Tensor, a_channels: int, b_channels: int) -> None:
        self.total = like.new_zeros(a_channels, b_channels, dtype=torch.float32)
        self.memory = like.new_empty(0, a_channels, b_channels)

    def add(self, a: Tensor, b: Tensor) -> None:
        if prefers_own(a):
            return torch.ops.fdda._products(a.t(), b, self.total, True)
        count = len(a) // CHUNK
        whole = count * CHUNK
        if len(self.memory) < count + 1:
            self.memory = self.memory.new_empty(count + 1, *self.total.shape)
        parts = self.memory[: count + (whole < len(a))]
        if count:
            chunks = [m[:whole].unflatten(0, (count, CHUNK)) for m in (a, b)]
            torch.bmm(chunks[0].transpose(1, 2), chunks[1], out=parts[:count])
        if whole < len(a):
            torch.mm(a[whole:].t(), b[whole:], out=parts[count])
        if parts.dtype == torch.float32:
            self.total += parts.sum(0)
        else:
            torch.ops.fdda._add_parts(parts, self.total)


def prefers_own(a: Tensor) -> bool:
    """Whether products of tensors like this one are the library's own."""
    if a.dtype == torch.bfloat16:
        return prefers_own_bfloat16_products()
    return a.dtype == torch.float32 and prefers_own_products()

"""Strips of a batch of images: how the convolutions' matrix products stay in cache."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 512  # pixels that a matrix product sums; libraries were seen to split longer sums

STRIP_BYTES = 8 << 20  # of what a strip reads and writes; measured: 4 to 24 MB differ little


@dataclass(frozen=True)
class Strip:
    """Rows [row, row_end) of images [image, image + images)."""

    image: int
    images: int
    row: int
    row_end: int

    def place(self) -> tuple[int, int, int, int]:
        return self.image, self.images, self.row, self.row_end


def strips(batch: int, height: int, row_bytes: int) -> list[Strip]:
    """Whole images as long as they fit, else equal shares of one image's rows."""
    rows = max(1, STRIP_BYTES // row_bytes)
    if rows >= height:
        step = rows // height
        return [Strip(n, min(step, batch - n), 0, height) for n in range(0, batch, step)]
    count = -(-height // rows)
    edges = [height * k // count for k in range(count + 1)]
    return [Strip(n, 1, *edge) for n in range(batch) for edge in itertools.pairwise(edges)]


class PixelProduct:
    """Sum of a^T b over matrices [pixels, A] and [pixels, B], strip by strip, in float32.

    Chunk by chunk: the library may cut a long sum by the number of threads, and bfloat16 would
    round it once at the end.
    """

    def __init__(self, like: Tensor, a_channels: int, b_channels: int) -> None:
        self.total = like.new_zeros(a_channels, b_channels, dtype=torch.float32)
        self.memory = like.new_empty(0, a_channels, b_channels)

    def add(self, a: Tensor, b: Tensor) -> None:
        count = len(a) // _CHUNK
        whole = count * _CHUNK
        if len(self.memory) < count + 1:
            self.memory = self.memory.new_empty(count + 1, *self.total.shape)
        parts = self.memory[: count + (whole < len(a))]
        if count:
            chunks = [m[:whole].unflatten(0, (count, _CHUNK)) for m in (a, b)]
            torch.bmm(chunks[0].transpose(1, 2), chunks[1], out=parts[:count])
        if whole < len(a):
            torch.mm(a[whole:].t(), b[whole:], out=parts[count])
        if parts.dtype == torch.float32:
            self.total += parts.sum(0)
        else:
            torch.ops.fdda._add_parts(parts, self.total)

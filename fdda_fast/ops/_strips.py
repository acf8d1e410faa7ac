"""Strips of a batch of images: how the convolutions' matrix products stay in cache."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

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
    """Strips of so many bytes, or of one row."""
    return strips_of(batch, height, STRIP_BYTES // row_bytes)


def strips_of(batch: int, height: int, rows: int) -> list[Strip]:
    """Whole images as long as they have no more rows, else equal shares of one image's rows."""
    rows = max(1, rows)
    if rows >= height:
        step = rows // height
        return [Strip(n, min(step, batch - n), 0, height) for n in range(0, batch, step)]
    count = -(-height // rows)
    edges = [height * k // count for k in range(count + 1)]
    return [Strip(n, 1, *edge) for n in range(batch) for edge in itertools.pairwise(edges)]

"""Geometry of convolutions and pooling: arguments checked, sizes of results."""

from __future__ import annotations

from collections.abc import Sequence

from fdda_fast.ops._checks import check, pair

Pair = int | Sequence[int]


def pool_windows(
    kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[list[int], list[int], list[int], list[int]]:
    """The arguments as pairs; ValueError where max pooling has no such windows."""
    kernel_size = pair(kernel_size, "kernel_size", 1)
    padding = pair(padding, "padding", 0)
    fits = all(2 * p <= k for p, k in zip(padding, kernel_size, strict=True))
    check(fits, "padding", f"at most half of {kernel_size}", padding)
    return kernel_size, pair(stride, "stride", 1), padding, pair(dilation, "dilation", 1)


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> list[int]:
    """Rows and columns made of `size`; ValueError where a kernel does not fit."""
    out = []
    for i in range(2):
        room = size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1
        check(room >= 0, "kernel_size", "a kernel within the padded input", list(kernel_size))
        extent = room // stride[i] + 1
        # The last window starts inside the input or its left padding.
        if ceil_mode and room % stride[i] and extent * stride[i] < size[i] + padding[i]:
            extent += 1
        out.append(extent)
    return out

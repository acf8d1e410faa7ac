"""How kernels walk a tensor: as tiles of (pixels, channels), in either memory order.

A dense tensor with a channel axis is [outer, pixels, channels] (LAST: channels are contiguous) or
[outer, channels, pixels]. The contiguous length arrives divided by ALIGN, the largest power of two
up to 16 that divides it: so the compiler knows which rows start on a multiple of 16 bytes, and
takes 128 bits at a time, also where that length is no multiple of 16.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that a reduction is split into at most: four on each of 132 processors. A constant, so
# that results do not depend on the device.
PROGRAMS = 528

# A tile of 1024 elements is 8 a thread: 128 bits of half precision.
THREADS = 128
WARP = 64 if torch.version.hip else 32

# Alignment is told by ALIGN; specialising on the value would only compile more often.
kernel = triton.jit(
    do_not_specialize=[
        *("pixel_units", "channel_units", "pixels", "splits", "tiles", "chunk", "rows", "groups"),
        *("height", "width", "in_channels", "out_channels"),
        *("out_height", "out_width", "depth_units", "filter_units", "filters", "columns"),
        *("row_stride", "depth", "depth_stride", "kernel_width", "taps", "stride_h", "stride_w"),
        *("pad_h", "pad_w", "dilation_h", "dilation_w", "x_zero_point"),
    ]
)


@triton.jit
def place(
    pixel_units,
    channel_units,
    splits,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sizes of the tensor (pixels, channels); sample, channels and split of this program."""
    pixels = pixel_units.to(tl.int64) * (1 if LAST else ALIGN)
    channels = channel_units * (ALIGN if LAST else 1)
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    split = program % splits
    program = program // splits
    channel = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return pixels, channels, (program // blocks).to(tl.int64), channel, split.to(tl.int64)


@triton.jit
def tile(sample, number, channel, pixels, channels, BLOCK_P: tl.constexpr, LAST: tl.constexpr):
    """Offsets and mask of the [BLOCK_P, BLOCK_C] tile of this number."""
    pixel = number * BLOCK_P + tl.arange(0, BLOCK_P)
    start = sample * pixels * channels
    if LAST:
        offset = start + pixel[:, None] * channels + channel[None, :]
    else:
        offset = start + channel.to(tl.int64)[None, :] * pixels + pixel[:, None]
    return offset, (pixel[:, None] < pixels) & (channel[None, :] < channels)


@triton.jit
def store_partial(partials, stat: tl.constexpr, value, sample, split, splits, channel, channels):
    """partials[stat, row of this program, channel] = value."""
    per_row = tl.cdiv(channels, value.shape[0])
    rows = (tl.num_programs(0) // per_row).to(tl.int64)
    row = stat * rows + sample * splits + split
    tl.store(partials + row * channels + channel, value, mask=channel < channels)


@triton.jit
def round_code(x):
    """Half to even, exact for |x| < 2^22: any code."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_float(x):
    """Half to even, any float32; NaN stays."""
    size = tl.abs(x)
    rounded = (size + 8388608.0) - 8388608.0
    return tl.where(size < 8388608.0, tl.where(x < 0, -rounded, rounded), x)


@triton.jit
def clip(x, low, high):
    """Like torch.clamp: NaN passes."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@kernel
def sum_kernel(
    partials,
    ids,
    labels,
    weight,
    out,
    rows,
    splits,
    channel_units,
    groups,
    GROUPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Second stage of every sum: out[s, g] = sum over the rows r of group g of partials[s, r].

    Row r belongs to sample r // splits, and that to group ids[sample]; WEIGHTED multiplies by
    weight[labels[sample]]. float64, always in the same order.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(1).to(tl.int64)
    stat = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float64)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        member = row < rows
        sample = row // splits
        if GROUPED:
            member = member & (tl.load(ids + sample, mask=member, other=-1) == group)
        mask = member[:, None] & (channel[None, :] < channel_units)
        offset = (stat * rows + row[:, None]) * channel_units + channel[None, :]
        value = tl.load(partials + offset, mask=mask, other=0.0).to(tl.float64)
        if WEIGHTED:
            label = tl.load(labels + sample, mask=member, other=0)
            factor = weight + label[:, None] * channel_units + channel[None, :]
            value *= tl.load(factor, mask=mask, other=0.0)
        total += value
    offset = (stat * groups + group) * channel_units + channel
    tl.store(out + offset, tl.sum(total, 0).to(tl.float32), mask=channel < channel_units)


class View(NamedTuple):
    """A dense tensor as [outer, channels, pixels], or [outer, pixels, channels] where `last`."""

    outer: int
    channels: int
    pixels: int
    last: bool

    @classmethod
    def along(cls, x: Tensor, axis: int | None) -> View:
        """`x` as `gapless` gives it."""
        if axis is None or x.shape[axis] == 1 or x.numel() == 0:
            return cls(1, 1, x.numel(), False)
        channels, pixels = x.shape[axis], x.stride(axis)
        outer = x.numel() // (channels * pixels)
        return cls(1, channels, outer, True) if pixels == 1 else cls(outer, channels, pixels, False)

    @classmethod
    def samples(cls, x: Tensor) -> View:
        """`x` [N, C] or [N, C, H, W], as `by_sample` gives it; outer = N."""
        pixels = x.shape[2] * x.shape[3] if x.dim() == 4 else 1
        last = not (x.dim() == 4 and x.is_contiguous()) or pixels == 1
        return cls(x.shape[0], x.shape[1], pixels, last)

    @classmethod
    def channelwise(cls, x: Tensor) -> View:
        """`x` as `by_sample` gives it, for kernels to which samples are alike."""
        view = cls.samples(x)
        return cls(1, view.channels, view.outer * view.pixels, True) if view.last else view

    @property
    def align(self) -> int:
        """ALIGN of the contiguous length."""
        return math.gcd(self.channels if self.last else self.pixels, 16)

    @property
    def blocks(self) -> tuple[int, int]:
        """BLOCK_P, BLOCK_C: 1024 elements that waste little at the borders.

        Half of that where rows are not aligned: every element then has an address and a mask of its
        own, and registers (AMD's scalar ones above all) would spill.
        """
        half = 2 if self.align <= 2 else 1
        if self.last:
            if self.pixels == 1:
                return 1, 1024 // half
            return (64 // half, 16) if self.channels <= 16 else (16 // half, 64)
        if self.channels == 1 or self.pixels > 256:
            return 1024 // half, 1
        return (256 // half, 4) if self.pixels > 64 else (64 // half, 16)

    @property
    def size(self) -> int:
        return self.outer * self.channels * self.pixels

    def grid(self, programs: int | None = None) -> Grid:
        """One program a tile; or loops over tiles, some `programs` in all."""
        block_p, block_c = self.blocks
        across = self.outer * triton.cdiv(self.channels, block_c)
        along = triton.cdiv(self.pixels, block_p)
        tiles = 1
        if programs is not None:
            tiles = max(1, triton.cdiv(along, max(1, programs // max(1, across))))
        return Grid(self, across, triton.cdiv(along, tiles), tiles)


class Grid(NamedTuple):
    """Programs for a view: `splits` of its pixels, each of `tiles` tiles."""

    view: View
    across: int
    splits: int
    tiles: int

    @property
    def programs(self) -> tuple[int]:
        return (self.across * self.splits,)

    @property
    def rows(self) -> int:
        """Rows of partial results, [rows, channels]."""
        return self.view.outer * self.splits

    def partials(self, stats: int, x: Tensor) -> Tensor:
        shape = (stats, self.rows, self.view.channels)
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    @property
    def sizes(self) -> dict[str, int]:
        """pixel_units, channel_units, splits, the layout, the blocks and the number of warps."""
        view = self.view
        align = view.align
        block_p, block_c = view.blocks
        return {
            "pixel_units": view.pixels // (1 if view.last else align),
            "channel_units": view.channels // (align if view.last else 1),
            "splits": self.splits,
            "ALIGN": align,
            "LAST": view.last,
            "BLOCK_P": block_p,
            "BLOCK_C": block_c,
            "num_warps": THREADS // WARP,
        }


def total(
    partials: Tensor,
    splits: int = 1,
    ids: Tensor | None = None,
    groups: int = 1,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """float32 [stats, groups, channels]; see `sum_kernel`."""
    stats, rows, channels = partials.shape
    out = torch.empty(stats, groups, channels, dtype=torch.float32, device=partials.device)
    block_r, block_c = (1024, 1) if channels == 1 else (32, 32)
    if out.numel():
        sum_kernel[(triton.cdiv(channels, block_c), groups, stats)](
            partials,
            partials if ids is None else ids,
            partials if labels is None else labels,
            partials if weight is None else weight,
            out,
            rows,
            splits,
            channels,
            groups,
            GROUPED=ids is not None,
            WEIGHTED=weight is not None,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
        )
    return out


def gapless(x: Tensor) -> Tensor:
    """x with the strides of empty_like(x), which has neither gaps nor overlaps."""
    return like(x, x)


def by_sample(x: Tensor) -> Tensor:
    """x, contiguous or channels_last."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last else x.contiguous()


def matching(grad: Tensor, x: Tensor) -> Tensor:
    """grad with the strides of x, which has no gaps."""
    return (
        grad if grad.stride() == x.stride() else torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    )


def like(y: Tensor, x: Tensor) -> Tensor:
    """y with the strides of empty_like(x)."""
    strides = torch.empty_like(x, device="meta").stride()
    return y if y.stride() == strides else torch.empty_like(x).copy_(y)

"""Nearest x2 up-sampling and a 3x3 convolution as four 2x2 convolutions of the small image.

In one dimension, y[2i] = w0 x[i-1] + (w1 + w2) x[i] and y[2i+1] = (w0 + w1) x[i] + w2 x[i+1]: four
phases of 2x2 taps in two dimensions, 16 products for 36. Its adjoint reads four rows of the
gradient: dx[i] = w2 g[2i-1] + (w1 + w2) g[2i] + (w0 + w1) g[2i+1] + w0 g[2i+2]. Both are one
implicit matrix product, pixels by input channels by output channels, of channels_last tensors:
nothing is gathered in memory. Sums run in float32. Channels are filled up to a multiple of 16: the
products of unaligned ones do not fit into registers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fdda_fast.kernels._tiles import PROGRAMS, WARP, kernel, total

# Rows of a phase's two taps, and of the adjoint's four, as sums of the 3 taps of the weight.
PHASES = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
ADJOINT = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])

# Bytes per element: BLOCK_M, BLOCK_N, BLOCK_K of both products, on 256 threads. float32 is
# multiplied in float32, without tensor cores on NVIDIA's: a larger tile would spill.
BLOCKS = {2: (128, 64, 64), 4: (64, 64, 16)}
PRODUCT_THREADS = 256
CHANNELS = 16  # and filters: a multiple of it


@triton.jit
def pixel_of(row, height, width):
    """Image, line and column of a pixel's number."""
    line = row // width
    return (line // height).to(tl.int64), line % height, row % width


@kernel
def gather_conv_kernel(
    x,
    factors,
    bias,
    y,
    pixels,
    height,
    width,
    in_channels,
    out_channels,
    ALIGN: tl.constexpr,
    TAPS: tl.constexpr,
    PHASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A pixel of the small image by TAPS x TAPS pixels and the factors [phase, tap, in, out].

    PHASED: x is the small image and y the large one, of which program_id(2) is the phase; else y is
    the small image and x the large one.
    """
    phase = tl.program_id(2)
    channels = in_channels * ALIGN
    filters = out_channels * ALIGN
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    image, i, j = pixel_of(row, height, width)
    if PHASED:
        top, left = i + phase // 2 - 1, j + phase % 2 - 1
        in_height, in_width = height, width
    else:
        top, left = 2 * i - 1, 2 * j - 1
        in_height, in_width = 2 * height, 2 * width
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(TAPS * TAPS):
        line, place = top + tap // TAPS, left + tap % TAPS
        inside = (row < pixels) & (line >= 0) & (line < in_height) & (place >= 0)
        inside = inside & (place < in_width)
        source = x + ((image * in_height + line) * in_width + place)[:, None] * channels
        factor = factors + (phase * TAPS * TAPS + tap) * channels.to(tl.int64) * filters
        for start in range(0, channels, BLOCK_K):
            depth = start + tl.arange(0, BLOCK_K)
            a = tl.load(
                source + depth[None, :],
                mask=inside[:, None] & (depth[None, :] < channels),
                other=0.0,
            )
            b = tl.load(
                factor + depth[:, None] * filters + column[None, :],
                mask=(depth[:, None] < channels) & (column[None, :] < filters),
                other=0.0,
            )
            sums = tl.dot(a, b, sums, input_precision="ieee")
    if PHASED:
        sums += tl.load(bias + column, mask=column < filters, other=0.0)[None, :]
        out = (image * 2 * height + 2 * i + phase // 2) * 2 * width + 2 * j + phase % 2
    else:
        out = row.to(tl.int64)
    offset = out[:, None] * filters + column[None, :]
    mask = (row[:, None] < pixels) & (column[None, :] < filters)
    tl.store(y + offset, sums.to(y.dtype.element_ty), mask=mask)


@kernel
def weight_gradient_kernel(
    x,
    grad,
    partials,
    pixels,
    chunk,
    height,
    width,
    in_channels,
    out_channels,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partials [split, phase and tap, in, out]: x times grad over a chunk of the small image."""
    blocks = tl.cdiv(out_channels * ALIGN, BLOCK_N)
    split = tl.program_id(0)
    phase, tap = tl.program_id(2) // 4, tl.program_id(2) % 4
    channels = in_channels * ALIGN
    filters = out_channels * ALIGN
    depth = tl.program_id(1) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, pixels), BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        image, i, j = pixel_of(row, height, width)
        line, place = i + phase // 2 - 1 + tap // 2, j + phase % 2 - 1 + tap % 2
        inside = (row < pixels) & (line >= 0) & (line < height) & (place >= 0) & (place < width)
        source = x + ((image * height + line) * width + place)[:, None] * channels
        a = tl.load(
            source + depth[None, :],
            mask=inside[:, None] & (depth[None, :] < channels),
            other=0.0,
        )
        out = (image * 2 * height + 2 * i + phase // 2) * 2 * width + 2 * j + phase % 2
        g = tl.load(
            grad + out[:, None] * filters + column[None, :],
            mask=(row[:, None] < pixels) & (column[None, :] < filters),
            other=0.0,
        )
        sums = tl.dot(tl.trans(a), g, sums, input_precision="ieee")
    base = partials + (split * 16 + tl.program_id(2)) * channels.to(tl.int64) * filters
    offset = depth[:, None] * filters + column[None, :]
    mask = (depth[:, None] < channels) & (column[None, :] < filters)
    tl.store(base + offset, sums, mask=mask)


def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest x2 up-sampling, then a 3x3 convolution with padding 1.

    x [N, Cin, H, W]; weight [Cout, Cin, 3, 3] and bias float32; y [N, Cout, 2H, 2W], channels_last.
    """
    filters = len(weight)
    x, weight, bias = _filled(x, 1), _filled(_filled(weight, 0), 1), _filled(bias, 0)
    batch, _, height, width = x.shape
    y = _channels_last((batch, len(weight), 2 * height, 2 * width), x)
    if y.numel():
        rows = PHASES.to(weight.device)
        taps = torch.einsum("apk,bql,ockl->abpqco", rows, rows, weight)
        _gather_conv(x, taps.to(x.dtype), bias.contiguous(), y, (height, width), phases=4)
    return y[:, :filters].contiguous(memory_format=torch.channels_last)


def upsample_conv3x3_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (channels_last), weight and bias of `upsample_conv3x3`."""
    if not x.numel():
        return _channels_last(x.shape, x), torch.zeros_like(weight), weight.new_zeros(len(weight))
    wanted = weight.shape[:2]
    grad_bias = grad_y.sum((0, 2, 3), dtype=torch.float32)
    x, grad_y, weight = _filled(x, 1), _filled(grad_y, 1), _filled(_filled(weight, 0), 1)
    batch, channels, height, width = x.shape
    grad_x = _channels_last(x.shape, x)
    grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    rows = ADJOINT.to(weight.device)
    taps = torch.einsum("pk,ql,ockl->pqoc", rows, rows, weight).to(x.dtype)
    _gather_conv(grad_y, taps, weight, grad_x, (height, width), phases=1)

    filters, pixels = len(weight), batch * height * width
    block_m, block_n, block_k = BLOCKS[x.element_size()]
    blocks = triton.cdiv(channels, block_m) * triton.cdiv(filters, block_n)
    steps = triton.cdiv(pixels, block_k)
    chunk = triton.cdiv(steps, max(1, PROGRAMS // (16 * blocks))) * block_k
    splits = triton.cdiv(pixels, chunk)
    partials = torch.empty(
        (1, splits, 16 * channels * filters), dtype=torch.float32, device=x.device
    )
    weight_gradient_kernel[(splits, blocks, 16)](
        x.contiguous(memory_format=torch.channels_last),
        grad_y,
        partials,
        pixels,
        chunk,
        height,
        width,
        channels // CHANNELS,
        filters // CHANNELS,
        ALIGN=CHANNELS,
        **_settings(x),
    )
    of_taps = total(partials).reshape(2, 2, 2, 2, channels, filters)
    rows = PHASES.to(weight.device)
    grad_weight = torch.einsum("apk,bql,abpqco->ockl", rows, rows, of_taps)
    grad_weight = grad_weight[: wanted[0], : wanted[1]].contiguous()
    grad_x = grad_x[:, : wanted[1]].contiguous(memory_format=torch.channels_last)
    return grad_x, grad_weight, grad_bias


def _gather_conv(
    x: Tensor, taps: Tensor, bias: Tensor, y: Tensor, size: tuple[int, int], phases: int
) -> None:
    """`gather_conv_kernel` over the pixels of a small image of this size; taps [..., in, out]."""
    channels, filters = taps.shape[-2:]
    pixels = x.shape[0] * size[0] * size[1]
    settings = _settings(x)
    blocks = triton.cdiv(pixels, settings["BLOCK_M"]), triton.cdiv(filters, settings["BLOCK_N"])
    gather_conv_kernel[(*blocks, phases)](
        x.contiguous(memory_format=torch.channels_last),
        taps.contiguous(),
        bias,
        y,
        pixels,
        *size,
        channels // CHANNELS,
        filters // CHANNELS,
        ALIGN=CHANNELS,
        TAPS=2 if phases == 4 else 4,
        PHASED=phases == 4,
        **settings,
    )


def _settings(x: Tensor) -> dict[str, int]:
    sizes = zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), BLOCKS[x.element_size()], strict=True)
    return dict(sizes) | {"num_warps": PRODUCT_THREADS // WARP}


def _channels_last(shape: tuple[int, ...], like: Tensor) -> Tensor:
    settings = {"dtype": like.dtype, "device": like.device}
    return torch.empty(shape, **settings, memory_format=torch.channels_last)


def _filled(x: Tensor, dim: int) -> Tensor:
    """x with zeros up to a multiple of CHANNELS."""
    missing = -x.shape[dim] % CHANNELS
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing]) if missing else x

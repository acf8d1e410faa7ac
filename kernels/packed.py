"""Integer convolution and linear layers on packed weights; the portable form of csrc/cuda/gemm.

Weights are unpacked to int8 [O, K] once a call: a tile of them is used by every tile of pixels, and
unpacking it every time would cost the integer units more than its products cost the tensor cores.
A convolution is then one implicit matrix product of NHWC codes, int8 by int8: codes are multiplied
as x - 128, padding as the zero point, and the multiples of the weights' sums that this leaves out
are added to the int32 sums, which may wrap on the way: the exact ones fit. Sums of the inputs, for
the weights' offsets, are products with ones. The bits do not depend on the tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fdda_fast.kernels._tiles import THREADS, WARP, kernel, round_code
from fdda_fast.kernels.upsample_conv import pixel_of

VECTOR = 16  # inputs of a tap are a multiple of it, or few a group
UNPACK_DEPTH = 64  # of a program, for 16 channels


class Tile(NamedTuple):
    """Pixels x filters of a program, inputs per step, threads."""

    block_m: int
    block_n: int
    block_k: int
    threads: int

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    @property
    def settings(self) -> dict[str, int]:
        return {**self.constants, "num_warps": self.threads // WARP, "enable_fp_fusion": False}


# Larger tiles spill: of registers on sm_80, of scalar ones, which hold masks, on gfx942.
LARGE = Tile(128, 64, 64, 256)
SMALL = Tile(32, 32, 64, 128)  # where few pixels would not occupy a GPU in large tiles
THIN = Tile(64, 16, 32, 128)  # up to 16 filters, and inputs that no vector divides
WIDE_INPUTS = Tile(16, 32, 64, 128)  # of int32: a product per byte
_OCCUPIED = 80  # programs: the multiprocessors of a GPU of middle size
_FOLDED = 32  # inputs of a tap, up to which steps run across taps


@kernel
def unpack_kernel(
    packed,
    q,
    rows,
    columns,
    depth,
    depth_stride,
    row_stride,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q [whole panels, row_stride] of bit planes [panel, block, BITS, 8] with rows x columns codes:
    of a row, `depth` at a time lie every `depth_stride`; between and after them are zeros.
    """
    chunks = tl.cdiv(row_stride, BLOCK_K)
    panel = tl.program_id(0) // chunks
    lane = tl.arange(0, 16)
    place = tl.program_id(0) % chunks * BLOCK_K + tl.arange(0, BLOCK_K)
    row = panel * 16 + lane
    k = place // depth_stride * depth + place % depth_stride
    block = panel.to(tl.int64) * tl.cdiv(columns, 4) + k // 4
    plane = block[None, :] * (BITS * 8) + (lane // 2)[:, None]
    shift = (lane % 2 * 4)[:, None] + (k % 4)[None, :]
    mask = (row < rows)[:, None] & ((k < columns) & (place % depth_stride < depth))[None, :]
    code = tl.zeros((16, BLOCK_K), tl.int32)
    for b in tl.static_range(BITS):
        bits = tl.load(packed + plane + b * 8, mask=mask, other=0).to(tl.int32)
        one = bits >> shift & 1
        code += (-one if b == BITS - 1 else one) << b
    offset = row.to(tl.int64)[:, None] * row_stride + place[None, :]
    tl.store(q + offset, code.to(tl.int8), mask=(place < row_stride)[None, :])


@triton.jit
def store_outputs(
    products,
    inputs,
    first_row,
    rows,
    column,
    known,
    filters,
    weight_offset,
    multiplier,
    bias,
    addend,
    result,
    residual_scale,
    low,
    high,
    RESIDUAL: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """From sums on: the weights' offsets, rescaling, residual and, QUANTIZED, codes.

    products + weight_offset * inputs are int64. `column` counts all filters, `known` are those of
    the program. A clamp to integers may come before the rounding; of NaN it makes `low`.
    """
    place = tl.arange(0, products.shape[0])
    inside = (first_row + place < rows)[:, None] & known[None, :]
    offset = tl.load(weight_offset + column, mask=known, other=0)
    acc = products + offset[None, :] * inputs.to(tl.int64)[:, None]
    factor = tl.load(multiplier + column, mask=known, other=0.0)
    shift = tl.load(bias + column, mask=known, other=0.0)
    v = acc.to(tl.float64).to(tl.float32) * factor[None, :] + shift[None, :]
    start = first_row.to(tl.int64) * filters
    target = place[:, None] * filters + column[None, :]
    if RESIDUAL:
        other = tl.load(addend + start + target, mask=inside, other=0).to(tl.float32)
        v = v + other * residual_scale
    if QUANTIZED:
        v = tl.where(v > low, v, low)
        v = tl.where(v > high, high, v)
        tl.store(result + start + target, round_code(v).to(tl.int32).to(tl.uint8), mask=inside)
    else:
        tl.store(result + start + target, v, mask=inside)


@kernel
def packed_conv_kernel(
    codes,
    q,
    sums,
    weight_offset,
    multiplier,
    bias,
    addend,
    result,
    pixels,
    height,
    width,
    out_height,
    out_width,
    depth_units,
    filter_units,
    groups,
    row_stride,
    kernel_width,
    taps,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    x_zero_point,
    residual_scale,
    low,
    high,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    FOLDED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of output pixels and of a group's filters; `depth_units` times ALIGN inputs a tap.

    FOLDED: a step takes BLOCK_K inputs across taps; else of one tap. Places in the image are int64:
    strides and padding may have 31 bits.
    """
    depth = depth_units * ALIGN
    filters = filter_units * OUT_ALIGN
    blocks = tl.cdiv(filters, BLOCK_N)
    group = tl.program_id(0) // blocks % groups
    first_row = tl.program_id(0) // blocks // groups * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    # Rows past the last repeat it, columns past the last find weights: neither is stored.
    source_row = tl.minimum(row, pixels - 1)
    filter = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    column = group * filters + filter
    image, i, j = pixel_of(source_row, out_height, out_width)
    top = i.to(tl.int64) * stride_h - pad_h
    left = j.to(tl.int64) * stride_w - pad_w
    channels = depth * groups
    down, right = dilation_h.to(tl.int64), dilation_w.to(tl.int64)
    image = image * height
    weights = q + column.to(tl.int64)[None, :] * row_stride + tl.arange(0, BLOCK_K)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    inputs = tl.zeros((BLOCK_M, 16), tl.int32)
    ones = tl.full((BLOCK_K, 16), 1, tl.int8)
    per_tap = tl.cdiv(depth, BLOCK_K)
    steps = tl.cdiv(taps * depth, BLOCK_K) if FOLDED else taps * per_tap
    for step in range(steps):
        if FOLDED:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            known = k < taps * depth
            tap = k // depth
            line = top[:, None] + (tap // kernel_width * down)[None, :]
            place = left[:, None] + (tap % kernel_width * right)[None, :]
            inside = (line >= 0) & (line < height) & (place >= 0) & (place < width)
            offset = ((image[:, None] + line) * width + place) * channels
            channel = k % depth
        else:
            tap = step // per_tap
            channel = step % per_tap * BLOCK_K + tl.arange(0, BLOCK_K)
            known = channel < depth
            line = top + tap // kernel_width * down
            place = left + tap % kernel_width * right
            inside = (line >= 0) & (line < height) & (place >= 0) & (place < width)
            inside = inside[:, None]
            offset = (((image + line) * width + place) * channels)[:, None]
        source = codes + offset + (group * depth + channel)[None, :]
        code = tl.load(source, mask=inside & known[None, :], other=x_zero_point)
        a = (code ^ 128).to(tl.int8, bitcast=True)
        b = tl.load(weights + step * BLOCK_K)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        inputs = tl.dot(a, ones, inputs, out_dtype=tl.int32)
    left_out = 128 - x_zero_point
    known = filter < filters
    acc += left_out * tl.load(sums + column, mask=known, other=0)[None, :]
    store_outputs(
        acc,
        tl.max(inputs, 1) + left_out * BLOCK_K * steps,
        first_row,
        pixels,
        column,
        known,
        filters * groups,
        weight_offset,
        multiplier,
        bias,
        addend,
        result,
        residual_scale,
        low,
        high,
        RESIDUAL,
        QUANTIZED,
    )


@kernel
def packed_linear_s32_kernel(
    integers,
    q,
    weight_offset,
    multiplier,
    bias,
    addend,
    result,
    rows,
    depth_units,
    filters,
    row_stride,
    x_zero_point,
    residual_scale,
    low,
    high,
    ALIGN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """int32 [rows, depth] by q: a product per byte, of which the lower ones are taken less 128."""
    depth = depth_units * ALIGN
    blocks = tl.cdiv(filters, BLOCK_N)
    first_row = tl.program_id(0) // blocks * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    source = integers + row.to(tl.int64)[:, None] * depth
    weights = q + column.to(tl.int64)[None, :] * row_stride + tl.arange(0, BLOCK_K)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int64)
    sums = tl.zeros((BLOCK_N,), tl.int64)
    total = tl.zeros((BLOCK_M,), tl.int64)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < depth
        mask = (row < rows)[:, None] & known[None, :]
        x = tl.load(source + k[None, :], mask=mask, other=0)
        b = tl.load(weights + start)
        total += tl.sum(x.to(tl.int64), 1)
        sums += tl.sum(b.to(tl.int32), 0).to(tl.int64)
        for byte in tl.static_range(4):
            part = x >> 8 * byte
            a = (part if byte == 3 else (part & 255) - 128).to(tl.int8)
            acc += tl.dot(a, b, out_dtype=tl.int32).to(tl.int64) << 8 * byte
    zero_point = x_zero_point.to(tl.int64)
    acc += (128 * 0x010101 - zero_point) * sums[None, :]
    store_outputs(
        acc,
        total - zero_point * depth,
        first_row,
        rows,
        column,
        column < filters,
        filters,
        weight_offset,
        multiplier,
        bias,
        addend,
        result,
        residual_scale,
        low,
        high,
        RESIDUAL,
        QUANTIZED,
    )


def unpack_weight(packed: Tensor, bits: int, num_rows: int, num_cols: int) -> Tensor:
    return _unpacked(packed, bits, num_rows, 1, num_cols, num_cols, num_cols, num_rows)[:num_rows]


def packed_conv2d(
    x: Tensor,
    weight: Tensor,
    bits: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero_point: int,
    weight_offset: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    residual_scale: float = 0.0,
    output_range: Sequence[int] | None = None,
) -> Tensor:
    batch, height, width, channels = x.shape
    windows = zip((height, width), kernel_size, stride, padding, dilation, strict=True)
    size = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in windows)
    out = _output(x, (batch, *size, out_channels), output_range)
    pixels = batch * size[0] * size[1]
    if pixels >= 2**31:
        raise ValueError(f"x: expected fewer than 2^31 output pixels, got {pixels}")
    if not out.numel():
        return out
    depth, filters = channels // groups, out_channels // groups
    taps = kernel_size[0] * kernel_size[1]
    missing = -depth % VECTOR if groups == 1 else 0
    if missing:
        x = F.pad(x, (0, missing), value=x_zero_point)
    align, out_align = math.gcd(depth + missing, VECTOR), math.gcd(filters, VECTOR)
    tile = _tile(pixels, filters, groups, align)
    folded = depth < _FOLDED
    depth_stride = depth + missing if folded else _up(depth, tile.block_k)
    row_stride = _up(taps * depth_stride, tile.block_k)
    num_rows = out_channels - filters + _up(filters, tile.block_n)
    q = _unpacked(weight, bits, out_channels, taps, depth, depth_stride, row_stride, num_rows)
    programs = triton.cdiv(pixels, tile.block_m) * groups * triton.cdiv(filters, tile.block_n)
    packed_conv_kernel[(programs,)](
        x.contiguous(),
        q,
        q.sum(1, dtype=torch.int32),
        *_epilogue(out, weight_offset, multiplier, bias, residual),
        pixels,
        height,
        width,
        *size,
        (depth + missing) // align,
        filters // out_align,
        groups,
        row_stride,
        kernel_size[1],
        taps,
        *stride,
        *padding,
        *dilation,
        x_zero_point,
        residual_scale,
        *_codes_of(output_range),
        ALIGN=align,
        OUT_ALIGN=out_align,
        FOLDED=folded,
        RESIDUAL=residual is not None,
        QUANTIZED=output_range is not None,
        **tile.settings,
    )
    return out


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bits: int,
    out_features: int,
    x_zero_point: int,
    weight_offset: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    residual_scale: float = 0.0,
    output_range: Sequence[int] | None = None,
) -> Tensor:
    rows, depth = x.shape
    if x.dtype == torch.uint8:
        ones = (1, 1)
        return packed_conv2d(
            x.reshape(rows, 1, 1, depth),
            weight,
            bits,
            out_features,
            ones,
            ones,
            (0, 0),
            ones,
            1,
            x_zero_point,
            weight_offset,
            multiplier,
            bias,
            None if residual is None else residual.reshape(rows, 1, 1, out_features),
            residual_scale,
            output_range,
        ).flatten(1)
    out = _output(x, (rows, out_features), output_range)
    if not out.numel():
        return out
    # A multiple of VECTOR inputs; past the last, x is not used: its weights are 0.
    missing = -depth % VECTOR
    row_stride = _up(depth, WIDE_INPUTS.block_k)
    num_rows = _up(out_features, WIDE_INPUTS.block_n)
    q = _unpacked(weight, bits, out_features, 1, depth, row_stride, row_stride, num_rows)
    blocks = triton.cdiv(rows, WIDE_INPUTS.block_m), triton.cdiv(out_features, WIDE_INPUTS.block_n)
    packed_linear_s32_kernel[(blocks[0] * blocks[1],)](
        F.pad(x, (0, missing), value=x_zero_point) if missing else x.contiguous(),
        q,
        *_epilogue(out, weight_offset, multiplier, bias, residual),
        rows,
        (depth + missing) // VECTOR,
        out_features,
        row_stride,
        x_zero_point,
        residual_scale,
        *_codes_of(output_range),
        ALIGN=VECTOR,
        RESIDUAL=residual is not None,
        QUANTIZED=output_range is not None,
        **WIDE_INPUTS.settings,
    )
    return out


def _tile(pixels: int, filters: int, groups: int, align: int) -> Tile:
    if filters <= THIN.block_n or align < VECTOR:
        return THIN
    programs = triton.cdiv(pixels, LARGE.block_m) * triton.cdiv(filters, LARGE.block_n) * groups
    return LARGE if programs >= _OCCUPIED else SMALL


def _output(x: Tensor, shape: tuple[int, ...], output_range: Sequence[int] | None) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32 if output_range is None else torch.uint8)


def _epilogue(
    out: Tensor, weight_offset: Tensor, multiplier: Tensor, bias: Tensor, residual: Tensor | None
) -> tuple[Tensor, ...]:
    """The tensors of `store_outputs`, in the order of the kernels' arguments."""
    addend = out if residual is None else residual.contiguous()
    return weight_offset.contiguous(), multiplier.contiguous(), bias.contiguous(), addend, out


def _codes_of(output_range: Sequence[int] | None) -> tuple[float, float]:
    return (0.0, 0.0) if output_range is None else (float(output_range[0]), float(output_range[1]))


def _up(size: int, block: int) -> int:
    return triton.cdiv(size, block) * block


def _unpacked(
    weight: Tensor,
    bits: int,
    rows: int,
    taps: int,
    depth: int,
    depth_stride: int,
    row_stride: int,
    num_rows: int,
) -> Tensor:
    """int8 [num_rows up to whole panels, row_stride]; see `unpack_kernel`."""
    q = torch.empty(_up(num_rows, 16), row_stride, dtype=torch.int8, device=weight.device)
    if q.numel():
        unpack_kernel[(q.shape[0] // 16 * triton.cdiv(row_stride, UNPACK_DEPTH),)](
            weight.contiguous(),
            q,
            rows,
            taps * depth,
            depth,
            depth_stride,
            row_stride,
            BITS=bits,
            BLOCK_K=UNPACK_DEPTH,
            num_warps=THREADS // WARP,
        )
    return q

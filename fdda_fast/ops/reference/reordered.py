"""Weights in the order of the CUDA kernels, see ops/reordered.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fdda_fast.ops.reference.codes import pack_codes, unpack_codes
from fdda_fast.ops.reference.packed import PANEL_ROWS, pack_weight, packed_conv2d, unpack_weight

STEP = 64  # k to a tile
# Axes of a tile's codes: channel = 8 half + group, k = 32 v + 16 i + 4 thread + j as it is read.
_TILE = (2, 8, 2, 2, 4, 4)


def reorder_weight(
    packed: Tensor, bits: int, num_rows: int, num_cols: int, depthwise: bool
) -> Tensor:
    q = unpack_weight(packed, bits, num_rows, num_cols)
    panels = -(-num_rows // PANEL_ROWS)
    if depthwise:
        q = F.pad(q, (0, 0, 0, panels * PANEL_ROWS - num_rows))
        return q.T.contiguous().view(torch.uint8).flatten()
    steps = -(-num_cols // STEP)
    sums = F.pad(q.sum(1, dtype=torch.int32), (0, panels * PANEL_ROWS - num_rows))
    q = F.pad(q, (0, steps * STEP - num_cols, 0, panels * PANEL_ROWS - num_rows))
    half, group, steps_, v, i, thread, j = 1, 2, 3, 4, 5, 6, 7
    q = q.reshape(panels, *_TILE[:2], steps, *_TILE[2:])
    if bits > 4:
        tiles = q.permute(0, steps_, v, group, thread, half, i, j).contiguous().view(torch.uint8)
    else:
        codes = q.view(torch.uint8).permute(i, 0, steps_, group, thread, half, v, j) & 15
        tiles = codes[0] | codes[1] << 4
    return torch.cat([tiles.flatten(), sums.view(torch.uint8)])


def file_weight(weight: Tensor, bits: int, num_rows: int, num_cols: int, depthwise: bool) -> Tensor:
    """The inverse of `reorder_weight`."""
    panels, steps = -(-num_rows // PANEL_ROWS), -(-num_cols // STEP)
    if depthwise:
        q = weight.view(torch.int8).reshape(num_cols, panels * PANEL_ROWS).T
    else:
        half, group, v, i, thread, j = _TILE
        sums = 4 * panels * PANEL_ROWS
        tiles = weight[: weight.numel() - sums]
        if bits > 4:
            q = tiles.view(torch.int8).reshape(panels, steps, v, group, thread, half, i, j)
            q = q.permute(0, 5, 3, 1, 2, 6, 4, 7)
        else:
            q = (torch.stack([tiles & 15, tiles >> 4]).to(torch.int8) ^ 8) - 8
            q = q.reshape(i, panels, steps, group, thread, half, v, j)
            q = q.permute(1, 5, 3, 2, 6, 0, 4, 7)
        q = q.reshape(panels * PANEL_ROWS, steps * STEP)
    return pack_weight(q[:num_rows, :num_cols], bits)


def reordered_conv2d(
    x: Tensor,
    weight: Tensor,
    bits: int,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    x_zero_point: int,
    weight_offset: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    residual_scale: float = 0.0,
    output_range: list[int] | None = None,
    x_bits: int = 8,
    x_packed: bool = False,
    out_packed: bool = False,
) -> Tensor:
    if x_packed:
        x = unpack_codes(x)
    depth = kernel_size[0] * kernel_size[1] * x.shape[3] // groups
    packed = file_weight(weight, bits, out_channels, depth, groups > 1)
    geometry = (out_channels, kernel_size, stride, padding, dilation, groups, x_zero_point)
    epilogue = (weight_offset, multiplier, bias, residual, residual_scale, output_range)
    y = packed_conv2d(x, packed, bits, *geometry, *epilogue)
    return pack_codes(y) if out_packed else y

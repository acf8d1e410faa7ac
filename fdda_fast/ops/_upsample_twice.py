"""CPU implementation of upsample_twice_conv3x3.

A few images at a time: what lies between the convolutions stays in the outer cache, and what lies
within them, group of tiles by group (csrc/cpu/upsample_norm.cpp), in the inner one. Otherwise these
passes wait for memory, which processes share.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from fdda_fast.ops._few_outputs import taps_of
from fdda_fast.ops._layout import empty_channels_last, nhwc
from fdda_fast.ops._library import active_isa, prefers_own_products
from fdda_fast.ops._norm_few_outputs import fixed_bn_lrelu
from fdda_fast.ops._upsample_norm import (
    upsample_fixed_bn_lrelu,
    upsample_fixed_bn_lrelu_conv3x3,
)
from fdda_fast.ops._winograd_upsample import upsample_pays

PIECE_BYTES = 2 << 20  # between the convolutions, for each thread, of more than one image
_PLAIN_PIECE = 16  # images at a time where other kernels run
_PANEL = 32  # outputs that weights are packed for are a multiple of it
_kept: deque[tuple[str | None, Tensor, Tensor]] = deque(maxlen=2)  # of a generator


def upsample_twice_conv3x3(
    x: Tensor,
    tables: Tensor,
    weight: Tensor,
    bias: Tensor,
    middle_tables: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    last_tables: Tensor,
    negative_slope: float,
    out_weight: Tensor,
    out_bias: Tensor,
) -> Tensor:
    first = weight, bias, middle_tables
    last = last_weight, last_bias, last_tables
    rest = negative_slope, out_weight, out_bias
    run = _in_cache if pays(x, weight, last_weight) else _plain
    return run(x, tables, first, last, *rest)


def pays(x: Tensor, *weights: Tensor) -> bool:
    """Whether Winograd's algorithm and the library's own products do."""
    return prefers_own_products() and all(upsample_pays(x, weight) for weight in weights)


def _in_cache(
    x: Tensor,
    tables: Tensor,
    first: tuple[Tensor, ...],
    last: tuple[Tensor, ...],
    negative_slope: float,
    out_weight: Tensor,
    out_bias: Tensor,
) -> Tensor:
    x = nhwc(x)
    batch, height, width, _ = x.shape
    taps, out_bias = taps_of(out_weight, x.dtype).contiguous(), out_bias.contiguous()
    y = x.new_empty(batch, 4 * height, 4 * width, len(out_weight))
    middle_image = 4 * height * width * len(first[0])
    step = _images_at_a_time(middle_image * x.element_size())
    normed, middle = torch.empty_like(x[:step]), x.new_empty(min(step, batch) * middle_image)
    parameters = [
        (_panels(weight), _with_bias(tables, bias)) for weight, bias, tables in (first, last)
    ]
    for start in range(0, batch, step):
        part = slice(start, start + step)
        count = len(x[part])
        own = [t[:, part].contiguous() for t in (tables, *(t for _, t in parameters))]
        values = middle[: count * middle_image].view(count, 2 * height, 2 * width, -1)
        whole = 0, count, 0, height
        torch.ops.fdda._norm_strip(x[part], own[0], 1.0, normed[:count], *whole)
        torch.ops.fdda._upsample_norm(
            normed[:count], parameters[0][0], own[1], negative_slope, values
        )
        torch.ops.fdda._upsample_norm_taps(
            values, parameters[1][0], own[2], negative_slope, taps, out_bias, y[part]
        )
    return y.permute(0, 3, 1, 2)


def _images_at_a_time(image_bytes: int) -> int:
    return torch.get_num_threads() * max(1, PIECE_BYTES // image_bytes)


def _panels(weight: Tensor) -> Tensor:
    """[Cout, Cin, 3, 3], transformed and in the order in which it is read.

    Of the last weights they are kept: to make them costs a tenth of a batch of small images.
    """
    isa = active_isa()
    for known_isa, known, panels in _kept:
        if known_isa == isa and torch.equal(known, weight):
            return panels
    outputs, inputs = weight.shape[:2]
    panels = weight.new_zeros(81 * inputs * -(-outputs // _PANEL) * _PANEL)
    torch.ops.fdda._winograd_upsample_panels(weight.permute(1, 2, 3, 0).contiguous(), panels)
    _kept.appendleft((isa, weight.detach().clone(), panels))
    return panels


def _with_bias(tables: Tensor, bias: Tensor) -> Tensor:
    """Tables for what a convolution makes before its bias is added."""
    mean, *rest = tables
    return torch.stack([mean - bias, *rest])


def _plain(
    x: Tensor,
    tables: Tensor,
    first: tuple[Tensor, ...],
    last: tuple[Tensor, ...],
    negative_slope: float,
    *out: Tensor,
) -> Tensor:
    weight, bias, middle_tables = first
    last_weight, last_bias, last_tables = last
    images = empty_channels_last(x, len(out[0]), 4)
    for start in range(0, len(x), _PLAIN_PIECE):
        part = slice(start, start + _PLAIN_PIECE)
        y = fixed_bn_lrelu(x[part], tables[:, part], 1.0)
        y = upsample_fixed_bn_lrelu(y, weight, bias, middle_tables[:, part], negative_slope)
        images[part] = upsample_fixed_bn_lrelu_conv3x3(
            y, last_weight, last_bias, last_tables[:, part], negative_slope, *out
        )
    return images

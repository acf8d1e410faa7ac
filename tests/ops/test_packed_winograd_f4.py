"""packed_conv2d by Winograd's F(4x4, 3x3), for weights of up to 4 bits and codes of 4."""

import pytest
import torch
from backends import ISAS, QUICK, draw_residual, generator, with_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packed_winograd import (
    NAMES,
    arguments,
    assert_result,
    draw_codes,
    run,
    weight_codes,
)
from test_packed_winograd import check as check_on

from fdda_fast import ops
from fdda_fast.ops import reference

ISA = "avx512vnni"
pytestmark = pytest.mark.skipif(ISA not in ISAS, reason="this processor has not got it")

LARGEST_CODE, LARGEST_WEIGHT = 15, 14
by_columns_and_by_positions = pytest.mark.parametrize("channels", [128, 160])


def products(height, width):
    """Of F(4x4, 3x3): what lines of tiles multiply at real points and at i."""
    lines = []
    for outputs in (height, width):
        tiles = [min(4, outputs - first) for first in range(0, outputs, 4)]
        real = sum(3 if tile % 2 else 4 for tile in tiles)
        lines.append((real, sum(tile > 2 for tile in tiles)))
    (a, b), (c, d) = lines
    return a * c + 3 * (a * d + b * c) + 6 * b * d


def applies(x, bits, zero_point, offset):
    batch, height, width, channels = x.shape
    half = 2 ** (bits - 1)
    weight = max(half, half - int(offset.min()), half - 1 + int(offset.max()))
    code = max(zero_point, int(x.max()) if x.numel() else 0)
    pairs = (2 * height + height % 2) * (2 * width + width % 2)
    saved = batch * (pairs - products(height, width))
    fits = bits <= 4 and weight <= LARGEST_WEIGHT and code <= LARGEST_CODE
    return fits and channels >= 48 and saved >= 120 and channels * saved >= 16384


def check(args, kernel="winograd_f4"):
    return check_on(ISA, args, kernel)


@st.composite
def convolutions(draw):
    g = generator(draw(st.integers(0, 2**32 - 1)))
    bits = draw(st.sampled_from([3, 4, 4, 4]))
    channels = draw(st.sampled_from([44, 48, 52, 64, 68, 132]))
    out_channels = draw(st.sampled_from([1, 15, 16, 17, 32, 33, 72]))
    batch = draw(st.sampled_from([1, 2, 5, 0]))
    size = [draw(st.sampled_from([1, 4, 6, 7, 9, 12, 13, 14, 15])) for _ in range(2)]
    shape = (batch, *size, channels)
    top = draw(st.sampled_from([1, 7, 15, 15, 15, 16]))
    x = draw_codes(draw, g, shape, top, [15, 16, 128])
    q = weight_codes((out_channels, 9 * channels), bits, g, draw(st.booleans()))
    limit = LARGEST_WEIGHT - 2 ** (bits - 1)
    offset = torch.randint(-limit, limit + 1, (out_channels,), generator=g)
    if draw(st.integers(0, 4)) == 0:
        index = int(torch.randint(out_channels, (1,), generator=g))
        offset[index] = draw(st.sampled_from([-limit - 1, limit + 2, 300]))
    zero_point = draw(st.sampled_from([0, 0, 1, 8, 15, 16]))
    residual = draw_residual(draw, g, (*shape[:3], out_channels), 15)
    output_range = draw(st.sampled_from([None, (0, 255), (0, 15), (3, 3), (1, 9)]))
    args = arguments(x, q, bits, zero_point, offset, g, residual, output_range)
    return args, applies(x, bits, zero_point, offset)


@settings(QUICK, max_examples=300)
@given(drawn=convolutions(), threads=st.sampled_from([1, 2]))
def test_equals_the_reference_and_runs_where_it_is_exact(drawn, threads):
    args, exact = drawn
    actual, kernel = with_threads(threads, run, ISA, args)
    assert (kernel == "winograd_f4") == exact
    expected = reference.packed_conv2d(*args)
    assert_result(actual, expected, args)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("batch", "height", "width", "channels", "out_channels"),
    [
        (1, 56, 56, 64, 64),
        (1, 28, 28, 128, 128),
        (2, 14, 14, 256, 64),
        (8, 7, 7, 512, 64),
        (3, 57, 55, 64, 16),  # blocks of rows; one panel, shared by the threads
        (2, 13, 30, 100, 72),  # three panels, the last one narrow
        (1, 18, 18, 100, 72),  # the same, whose tiles are shared too
    ],
)
def test_layers(threads, batch, height, width, channels, out_channels):
    g = generator(channels)
    x = torch.randint(0, 16, (batch, height, width, channels), generator=g, dtype=torch.uint8)
    q = weight_codes((out_channels, 9 * channels), 4, g)
    offset = torch.randint(-6, 7, (out_channels,), generator=g)
    residual = torch.randint(0, 16, (batch, height, width, out_channels), generator=g)
    args = arguments(x, q, 4, 3, offset, g, residual.to(torch.uint8))
    actual = with_threads(threads, check, args)
    assert actual.unique().numel() > 8


# Rows of V of tiles of four outputs and of two, and of U: at 0, 1, -1, infinity; the two parts at
# i and their sum.
WHOLE = torch.tensor(
    [
        *([2, 0, 0, 0, -2, 0], [0, 1, 1, 1, 1, 0], [0, -1, 1, -1, 1, 0], [0, -2, 0, 0, 0, 2]),
        *([0, 0, -1, 0, 1, 0], [0, -1, 0, 1, 0, 0], [0, -1, -1, 1, 1, 0]),
    ]
)
HALF = torch.tensor([[2, 0, -2, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -2, 0, 2]])
WEIGHT = torch.tensor(
    [[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2], [1, 0, -1], [0, 1, 0], [1, 1, -1]]
)


def extremes(inputs, weights, sign, channels):
    """A tile and taps whose transforms are the largest, over so many channels that a product too
    large for its type shows."""
    x = torch.zeros(1, 18, 18, channels, dtype=torch.uint8)
    height, width = inputs.shape
    x[0, 3 : 3 + height, 3 : 3 + width] = LARGEST_CODE * (sign * inputs > 0)[..., None]
    if height == 4:  # the last tiles of 18 are of two outputs
        x = x.roll(12, 1)
    if width == 4:
        x = x.roll(12, 2)
    taps = weights > 0
    q = torch.where(torch.stack([taps, ~taps]), 7, -8).to(torch.int8)
    q = q.flatten(1).repeat(17, 1)[..., None].expand(-1, -1, channels).flatten(1)
    offset = torch.tensor([6, -6] * 17)
    return arguments(x, q, 4, 0, offset, generator(0), output_range=None)


@by_columns_and_by_positions
@pytest.mark.parametrize("rows", [WHOLE, HALF])
@pytest.mark.parametrize("columns", [WHOLE, HALF])
def test_every_position_at_its_extremes(rows, columns, channels):
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            for sign in (1, -1):
                check(
                    extremes(row[:, None] * column, WEIGHT[r][:, None] * WEIGHT[c], sign, channels)
                )


@by_columns_and_by_positions
@pytest.mark.parametrize("other", [1, -1])  # i and i, i and -i
@pytest.mark.parametrize("part", ["real", "imaginary", "sum"])
def test_complex_positions_at_their_extremes(other, part, channels):
    def value(real, imaginary):
        real_part = torch.outer(real, real) - other * torch.outer(imaginary, imaginary)
        imaginary_part = other * torch.outer(real, imaginary) + torch.outer(imaginary, real)
        parts = {"real": real_part, "imaginary": imaginary_part}
        return parts.get(part, real_part + imaginary_part)

    inputs, weights = value(WHOLE[4], WHOLE[5]), value(WEIGHT[4], WEIGHT[5])
    for sign in (1, -1):
        check(extremes(inputs, weights, sign, channels))


@pytest.mark.parametrize(("row", "column"), [(0, 0), (13, 0), (0, 13), (5, 6), (13, 13)])
@pytest.mark.parametrize("image", [0, 23])
@pytest.mark.parametrize("channel", [0, 67])
def test_one_large_code_is_seen_anywhere(image, row, column, channel):
    """24 images are several blocks of rows; outputs of the earlier ones are computed again."""
    g = generator(0)
    q = weight_codes((17, 9 * 68), 4, g)
    x = torch.randint(0, 16, (24, 14, 14, 68), generator=g, dtype=torch.uint8)
    x[image, row, column, channel] = 16
    check(arguments(x, q, 4, 0, torch.zeros(17, dtype=torch.int64), g), "winograd")


def sample(**changes):
    g = generator(1)
    x = torch.randint(0, 16, (1, 18, 18, 64), generator=g, dtype=torch.uint8)
    offset = torch.ones(32, dtype=torch.int64)
    args = arguments(x, weight_codes((32, 9 * 64), 4, g), 4, 2, offset, g)
    return tuple((dict(zip(NAMES, args, strict=True)) | changes).values())


def packed(channels, bits=4):
    return ops.pack_weight(weight_codes((32, 9 * channels), bits, generator(2)), bits)


def inputs(*shape):
    return torch.ones(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "winograd_f4"),
        ({"x": sample()[0].permute(0, 2, 1, 3)}, "winograd_f4"),  # not contiguous
        ({"multiplier": torch.full((32,), 2.0**-125 * 1.5 + 2.0**-148)}, "winograd_f4"),
        ({"multiplier": torch.full((32,), 1e30)}, "winograd_f4"),  # outputs beyond int32
        ({"stride": [2, 2]}, "direct"),
        ({"padding": [0, 0]}, "direct"),
        ({"padding": [2, 2], "dilation": [2, 2]}, "direct"),
        ({"groups": 2, "weight": packed(32)}, "direct"),
        ({"x": inputs(1, 18, 18, 62), "weight": packed(62)}, "direct"),
        ({"bits": 5, "weight": packed(64, bits=5)}, "direct"),
        ({"bits": 2, "weight": packed(64, bits=2), "offset": torch.full((32,), 2)}, "winograd_f4"),
        ({"offset": torch.full((32,), -6)}, "winograd_f4"),
        ({"offset": torch.full((32,), -7)}, "winograd"),
        ({"zero_point": 15}, "winograd_f4"),
        ({"zero_point": 16}, "winograd"),
        ({"x": inputs(1, 14, 14, 64)}, "winograd"),  # not worth it
        ({"x": inputs(1, 18, 18, 44), "weight": packed(44)}, "winograd"),  # neither
    ],
)
def test_when_it_runs(changes, kernel):
    check(sample(**changes), kernel)

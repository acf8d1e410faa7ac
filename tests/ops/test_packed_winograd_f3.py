"""packed_conv2d by Winograd's F(3x3, 3x3), for weights of 2 bits and codes of up to 3."""

import pytest
import torch
from backends import ISAS, QUICK, draw_residual, generator, with_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packed_winograd import (
    NAMES,
    arguments,
    assert_result,
    check,
    draw_codes,
    run,
    weight_codes,
)

from fdda_fast import ops
from fdda_fast.ops import reference

F3_ISAS = [isa for isa in ("avxvnni", "avx512vnni") if isa in ISAS]
pytestmark = pytest.mark.skipif(not F3_ISAS, reason="no instruction set has it here")
on_every_isa = pytest.mark.parametrize("isa", F3_ISAS)

LARGEST_CODE = 7
INPUT = torch.tensor(
    [[2, -1, -2, 1, 0], [0, -2, -1, 1, 0], [0, 2, -3, 1, 0], [0, -1, 0, 1, 0], [0, 2, -1, -2, 1]]
)
WEIGHT = torch.tensor([[3, 0, 0], [-3, -3, -3], [-1, 1, -1], [1, 2, 4], [0, 0, 6]])


def products(shape, step):
    batch, height, width, _ = shape
    return batch * -(-height // step) * -(-width // step) * (step + 2) ** 2


def applies(x, bits, zero_point, offset):
    code = max(zero_point, int(x.max()) if x.numel() else 0)
    saved = products(x.shape, 2) - products(x.shape, 3)
    fits = bits == 2 and code <= LARGEST_CODE and bool(((offset == 0) | (offset == 1)).all())
    return fits and x.shape[3] >= 48 and saved >= 100


@st.composite
def convolutions(draw):
    g = generator(draw(st.integers(0, 2**32 - 1)))
    bits = draw(st.sampled_from([2, 2, 2, 2, 3]))
    channels = draw(st.sampled_from([44, 48, 52, 64, 68, 132]))
    out_channels = draw(st.sampled_from([1, 15, 16, 17, 32, 33, 72]))
    batch = draw(st.sampled_from([1, 2, 5, 0]))
    size = [draw(st.sampled_from([1, 2, 3, 5, 7, 8, 9, 13])) for _ in range(2)]
    shape = (batch, *size, channels)
    top = draw(st.sampled_from([1, 3, 7, 7, 7, 8]))
    x = draw_codes(draw, g, shape, top, [7, 8, 128])
    q = weight_codes((out_channels, 9 * channels), bits, g, draw(st.booleans()))
    offset = torch.randint(0, 2, (out_channels,), generator=g)
    if draw(st.integers(0, 4)) == 0:
        index = int(torch.randint(out_channels, (1,), generator=g))
        offset[index] = draw(st.sampled_from([-1, 2, 300]))
    zero_point = draw(st.sampled_from([0, 0, 1, 3, 7, 8]))
    residual = draw_residual(draw, g, (*shape[:3], out_channels), 15)
    output_range = draw(st.sampled_from([None, (0, 255), (0, 7), (3, 3), (1, 3)]))
    args = arguments(x, q, bits, zero_point, offset, g, residual, output_range)
    return args, applies(x, bits, zero_point, offset)


@settings(QUICK, max_examples=300)
@given(drawn=convolutions(), threads=st.sampled_from([1, 2]))
def test_equals_the_reference_and_runs_where_it_is_exact(drawn, threads):
    args, exact = drawn
    expected = reference.packed_conv2d(*args)
    kernels = {}
    for isa in ISAS:
        actual, kernel = with_threads(threads, run, isa, args)
        if isa == "amx":  # in tiles where they fit
            assert kernel in ("tiles", kernels["avx512vnni"])
        else:
            assert (kernel == "winograd_f3") == (exact and isa in F3_ISAS), isa
        kernels[isa] = kernel
        assert_result(actual, expected, args)


@on_every_isa
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("batch", "height", "width", "channels", "out_channels"),
    [
        (1, 56, 56, 64, 64),
        (1, 28, 28, 128, 128),
        (1, 14, 14, 256, 256),
        (8, 7, 7, 512, 64),
        (3, 57, 55, 64, 16),  # blocks of rows; one panel, shared by the threads
        (2, 9, 30, 100, 72),  # three panels, the last one narrow
        (1, 11, 11, 100, 72),  # the same, whose tiles are shared too
    ],
)
def test_layers(isa, threads, batch, height, width, channels, out_channels):
    g = generator(channels)
    x = torch.randint(0, 8, (batch, height, width, channels), generator=g, dtype=torch.uint8)
    q = weight_codes((out_channels, 9 * channels), 2, g)
    offset = torch.randint(0, 2, (out_channels,), generator=g)
    residual = torch.randint(0, 8, (batch, height, width, out_channels), generator=g)
    args = arguments(x, q, 2, 3, offset, g, residual.to(torch.uint8), (0, 7))
    actual = with_threads(threads, check, isa, args, "winograd_f3")
    assert actual.unique().numel() == 8


@on_every_isa
@pytest.mark.parametrize("row", range(5))
@pytest.mark.parametrize("column", range(5))
@pytest.mark.parametrize("sign", [1, -1])
def test_every_position_at_its_extremes(isa, row, column, sign):
    """Of the tile in the middle, inputs and weights whose transforms are the largest of that sign,
    over so many channels that a product too large for its type shows."""
    channels = 256
    inputs = sign * INPUT[row][:, None] * INPUT[column] > 0
    x = torch.zeros(1, 11, 11, channels, dtype=torch.uint8)
    x[0, 2:7, 2:7] = LARGEST_CODE * inputs[..., None]
    taps = WEIGHT[row][:, None] * WEIGHT[column] > 0
    q = torch.where(torch.stack([taps, ~taps]), 1, -2).to(torch.int8)
    q = q.flatten(1).repeat(17, 1)[..., None].expand(-1, -1, channels).flatten(1)
    offset = torch.tensor([1, 0] * 17)
    args = arguments(x, q, 2, 0, offset, generator(0), output_range=None)
    check(isa, args, "winograd_f3")


@on_every_isa
@pytest.mark.parametrize(("row", "column"), [(0, 0), (10, 0), (0, 10), (5, 6), (10, 10)])
@pytest.mark.parametrize("image", [0, 23])
@pytest.mark.parametrize("channel", [0, 67])
def test_one_large_code_is_seen_anywhere(isa, image, row, column, channel):
    """24 images are several blocks of rows; outputs of the earlier ones are computed again."""
    g = generator(0)
    q = weight_codes((17, 9 * 68), 2, g)
    x = torch.randint(0, 8, (24, 11, 11, 68), generator=g, dtype=torch.uint8)
    x[image, row, column, channel] = 8
    args = arguments(x, q, 2, 0, torch.zeros(17, dtype=torch.int64), g)
    check(isa, args, "winograd_f4" if isa == "avx512vnni" else "winograd")


def sample(**changes):
    g = generator(1)
    x = torch.randint(0, 8, (1, 11, 11, 64), generator=g, dtype=torch.uint8)
    offset = torch.ones(32, dtype=torch.int64)
    args = arguments(x, weight_codes((32, 9 * 64), 2, g), 2, 2, offset, g)
    return tuple((dict(zip(NAMES, args, strict=True)) | changes).values())


def packed(channels, bits=2):
    return ops.pack_weight(weight_codes((32, 9 * channels), bits, generator(2)), bits)


def inputs(*shape):
    return torch.ones(shape, dtype=torch.uint8)


@on_every_isa
@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "winograd_f3"),
        ({"x": sample()[0].permute(0, 2, 1, 3)}, "winograd_f3"),  # not contiguous
        ({"multiplier": torch.full((32,), 2.0**-125 * 1.5 + 2.0**-148)}, "winograd_f3"),
        ({"multiplier": torch.full((32,), 1e30)}, "winograd_f3"),  # outputs beyond int32
        ({"stride": [2, 2]}, "direct"),
        ({"padding": [0, 0]}, "direct"),
        ({"padding": [2, 2], "dilation": [2, 2]}, "direct"),
        ({"groups": 2, "weight": packed(32)}, "direct"),
        ({"x": inputs(1, 11, 11, 62), "weight": packed(62)}, "direct"),
        ({"bits": 3, "weight": packed(64, bits=3)}, "winograd"),
        ({"offset": torch.full((32,), 2)}, "winograd"),
        ({"offset": torch.full((32,), -1)}, "winograd"),
        ({"zero_point": 7}, "winograd_f3"),
        ({"zero_point": 8}, "winograd"),
        ({"x": inputs(1, 7, 7, 64)}, "winograd"),  # not worth it
        ({"x": inputs(1, 11, 11, 44), "weight": packed(44)}, "winograd"),  # neither
    ],
)
def test_when_it_runs(isa, changes, kernel):
    check(isa, sample(**changes), kernel)

"""packed_conv2d by Winograd in 8-bit integers."""

import pytest
import torch
from backends import (
    ISAS,
    QUICK,
    assert_same_bits,
    draw_residual,
    generator,
    on_isa,
    with_threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import _library, reference

WINOGRAD_ISAS = [isa for isa in ("avx2", "avxvnni", "avx512", "avx512vnni") if isa in ISAS]
# They look at every weight; the others at how large bits and offsets let one be.
LOOKING_ISAS = [isa for isa in WINOGRAD_ISAS if isa.startswith("avx512")]
pytestmark = pytest.mark.skipif(not WINOGRAD_ISAS, reason="no instruction set has it here")
on_every_isa = pytest.mark.parametrize("isa", WINOGRAD_ISAS)

LARGEST_CODE = 63
DOUBLED_G = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]])


def run(isa, args):
    """The result and the kernel it came from."""
    with on_isa(isa):
        return torch.ops.fdda.packed_conv2d(*args), _library._extension.conv_kernel()


def assert_result(actual, expected, args):
    if args[-1] is None:
        assert_same_bits(actual, expected)
    else:
        assert torch.equal(actual, expected)


def check(isa, args, kernel):
    actual, ran = run(isa, args)
    assert ran == kernel
    assert_result(actual, reference.packed_conv2d(*args), args)
    return actual


def draw_codes(draw, g, shape, top, deciding):
    """uint8 up to `top`, perhaps only 0 and `top`; perhaps one code, anywhere, decides."""
    x = torch.randint(0, top + 1, shape, generator=g, dtype=torch.uint8)
    if draw(st.booleans()):
        x = torch.where(x * 2 < top, 0, top).to(torch.uint8)
    if draw(st.integers(0, 4)) == 0 and x.numel():
        index = int(torch.randint(x.numel(), (1,), generator=g))
        x.view(-1)[index] = draw(st.sampled_from(deciding))
    return x


def transformed(q, offset, channels):
    """[4, 4, O, C]: the weights of the 16 products."""
    w = (q.long() + offset[:, None]).reshape(len(q), 3, 3, channels)
    return torch.einsum("py,qx,oyxc->pqoc", DOUBLED_G, DOUBLED_G, w)


def is_exact(isa, x, q, bits, zero_point, offset):
    """Whether transformed inputs and weights fit, by the instruction set's criterion."""
    half = 2 ** (bits - 1)
    low, high = int(offset.min()) - half, int(offset.max()) + half - 1
    code = max(1, zero_point, int(x.max()) if x.numel() else 0)
    if not (low >= -128 and high <= 127 and code <= LARGEST_CODE):
        return False
    if isa in LOOKING_ISAS:
        u, largest = int(transformed(q, offset, x.shape[3]).abs().max()), 126
    else:
        u, largest = 9 * max(half, -low, high), 127
    return u <= largest and (isa.endswith("vnni") or 2 * u * 4 * code < 2**15)


def arguments(x, q, bits, zero_point, offset, g, residual=None, output_range=(0, 15)):
    """Multipliers such that the outputs spread over the output's range."""
    out_channels, depth = q.shape
    weight = (2.0 ** (bits - 1) + offset.abs().max().item()) * 0.6
    deviation = weight * max(x.float().std().item() if x.numel() > 1 else 1.0, 1.0) * depth**0.5
    top = output_range[1] if output_range else 1
    multiplier = torch.randn(out_channels, generator=g) * top / deviation
    bias = torch.randn(out_channels, generator=g) * top / 4 + top / 2
    args = (x, ops.pack_weight(q, bits), bits, out_channels, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    args = (*args, zero_point, offset, multiplier, bias, residual, 0.37)
    return (*args, output_range and list(output_range))


def weight_codes(shape, bits, g, extreme=False):
    half = 2 ** (bits - 1)
    if extreme:
        return torch.where(torch.rand(shape, generator=g) < 0.5, -half, half - 1).to(torch.int8)
    return torch.randint(-half, half, shape, generator=g, dtype=torch.int8)


@st.composite
def convolutions(draw):
    """Arguments, and the instruction sets where Winograd is exact for them."""
    g = generator(draw(st.integers(0, 2**32 - 1)))
    bits = draw(st.integers(2, 4))
    channels = draw(st.sampled_from([16, 20, 36, 64, 68]))
    out_channels = draw(st.sampled_from([1, 15, 16, 17, 32, 33, 40]))
    height, width = draw(st.sampled_from([(1, 17), (17, 1), (2, 9), (5, 9), (6, 8), (7, 7)]))
    batch = draw(st.sampled_from([1, 2, 3, 0]))
    shape = (batch, height, width, channels)
    top = draw(st.sampled_from([1, 15, 15, 42, 63, 255]))
    x = torch.randint(0, top + 1, shape, generator=g, dtype=torch.uint8)
    if draw(st.booleans()):
        x = torch.where(x * 2 < top, 0, top).to(torch.uint8)
    if draw(st.integers(0, 3)) == 0:  # one code, anywhere, decides
        x = x.clamp(max=LARGEST_CODE)
        if x.numel():
            index = int(torch.randint(x.numel(), (1,), generator=g))
            x.view(-1)[index] = draw(st.sampled_from([63, 64, 128]))
    q = weight_codes((out_channels, 9 * channels), bits, g, draw(st.booleans()))
    limit = draw(st.sampled_from([0, 3, 6, 7, 12, 30, 120, 2**31]))
    offset = torch.randint(-limit, limit + 1, (out_channels,), generator=g)
    if draw(st.booleans()):  # few large weights
        q[torch.rand(q.shape, generator=g) < draw(st.sampled_from([0.8, 0.99]))] = 0
        q = (q - offset[:, None]).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
    zero_point = draw(st.sampled_from([0, 1, 8, 15, 63, 64]))
    residual = draw_residual(draw, g, (*shape[:3], out_channels), 255)
    output_range = draw(st.sampled_from([None, (0, 255), (0, 15), (3, 3), (10, 200)]))
    exact = [i for i in WINOGRAD_ISAS if is_exact(i, x, q, bits, zero_point, offset)]
    return arguments(x, q, bits, zero_point, offset, g, residual, output_range), exact


@settings(QUICK, max_examples=500)
@given(drawn=convolutions())
def test_equals_the_reference_and_runs_where_it_is_exact(drawn):
    args, exact = drawn
    large = args[0].numel() > 16 * args[0].shape[3]
    expected = reference.packed_conv2d(*args)
    for isa in WINOGRAD_ISAS:
        actual, kernel = run(isa, args)
        assert_result(actual, expected, args)
        kernel = kernel.removesuffix("_f3").removesuffix("_f4")
        assert kernel == ("winograd" if isa in exact and large else "direct"), isa


@on_every_isa
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("batch", "height", "width", "channels", "out_channels"),
    [
        (1, 56, 56, 64, 64),
        (1, 14, 14, 256, 256),
        (1, 7, 7, 512, 512),
        (3, 57, 55, 64, 16),  # blocks of rows; one panel, shared by the threads
        (2, 9, 30, 100, 72),  # three panels, the last one narrow
        (1, 9, 9, 100, 72),  # the same, whose tiles are shared too
    ],
)
def test_layers(isa, threads, batch, height, width, channels, out_channels):
    g = generator(channels)
    size = (batch, height, width, channels)
    x = torch.randint(0, 17, size, generator=g, dtype=torch.uint8)  # too large for F(4x4, 3x3)
    q = weight_codes((out_channels, 9 * channels), 4, g)
    offset = torch.randint(-6, 7, (out_channels,), generator=g)
    residual = torch.randint(0, 16, (batch, height, width, out_channels), generator=g)
    args = arguments(x, q, 4, 3, offset, g, residual.to(torch.uint8))
    actual, kernel = with_threads(threads, run, isa, args)
    assert kernel == "winograd"
    assert actual.unique().numel() == 16
    assert torch.equal(actual, reference.packed_conv2d(*args))


@pytest.mark.parametrize("isa", LOOKING_ISAS)
@pytest.mark.parametrize("tap", range(9))
@pytest.mark.parametrize(("weight", "more"), [(14, 1), (-14, -1)])
def test_weights_at_the_edge_of_what_fits(isa, tap, weight, more):
    """All taps alike, but for one of the last channel: their sum is position (1, 1)."""
    x = torch.full((1, 5, 5, 16), 63 if isa == "avx512vnni" else 32, dtype=torch.uint8)
    offset = torch.full((33,), weight)
    q = torch.zeros(33, 9, 16, dtype=torch.int8)
    for change, kernel in ((0, "winograd"), (more, "direct")):
        q[32, tap, 15] = change
        args = arguments(x, q.flatten(1), 2, 0, offset, generator(0))
        actual, ran = run(isa, args)
        assert ran == kernel
        assert torch.equal(actual, reference.packed_conv2d(*args))


@pytest.mark.parametrize("isa", [isa for isa in WINOGRAD_ISAS if isa != "avx512vnni"])
@pytest.mark.parametrize(("offset", "more"), [(13, 14), (-12, -13)])
@pytest.mark.parametrize("pattern", ["same", "alternating", "random"])
def test_bounds_of_the_ranges(isa, offset, more, pattern):
    """Weights of +-14, whose transform is at most 126, and the largest code exact with them."""
    code = 32 if isa in ("avx2", "avx512") else LARGEST_CODE
    g = generator(1)
    x = torch.full((1, 6, 7, 36), code, dtype=torch.uint8)
    if pattern == "alternating":
        x[:, :, ::2] = 0
    elif pattern == "random":
        x[torch.rand(x.shape, generator=g) < 0.5] = 0
    q = torch.full((33, 9 * 36), 1 if offset > 0 else -2, dtype=torch.int8)
    one_larger = x.clone()
    one_larger[0, 3, 4, 5] = code + 1
    for x_, offset_, kernel in (
        (x, offset, "winograd"),
        (x, more, "direct"),
        (one_larger, offset, "direct"),
    ):
        args = arguments(x_, q, 2, 0, torch.full((33,), offset_), g)
        actual, ran = run(isa, args)
        assert ran == kernel
        assert torch.equal(actual, reference.packed_conv2d(*args))


@on_every_isa
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_products_at_their_extremes(isa, bits):
    """Position (1, 1) has nothing but its largest products, so that a sum that wraps shows."""
    half = 2 ** (bits - 1)
    for code in (1, 2, 3, 7, 15, 20, 31, 50, 56):
        x = torch.full((1, 5, 6, 132), code, dtype=torch.uint8)
        for weight in (-half, half - 1):
            q = torch.full((33, 9 * 132), weight, dtype=torch.int8)
            args = arguments(x, q, bits, 0, torch.zeros(33, dtype=torch.int64), generator(0))
            actual, kernel = run(isa, args)
            assert kernel == "winograd"
            assert torch.equal(actual, reference.packed_conv2d(*args)), (code, weight)


@on_every_isa
@pytest.mark.parametrize("row", range(5))
@pytest.mark.parametrize("column", range(6))
def test_one_large_code_is_seen_anywhere(isa, row, column):
    largest = 56 if isa in ("avx2", "avx512") else LARGEST_CODE
    g = generator(0)
    q = weight_codes((17, 9 * 68), 4, g)
    q[-1] = -8  # a U of 72
    offset = torch.zeros(17, dtype=torch.int64)
    for channel in (0, 67):
        x = torch.randint(0, largest + 1, (1, 5, 6, 68), generator=g, dtype=torch.uint8)
        x[0, row, column, channel] = largest + 1
        args = arguments(x, q, 4, 0, offset, g)
        actual, kernel = run(isa, args)
        assert kernel == "direct"
        assert torch.equal(actual, reference.packed_conv2d(*args))


NAMES = (
    *("x", "weight", "bits", "out_channels", "kernel", "stride", "padding", "dilation", "groups"),
    *("zero_point", "offset", "multiplier", "bias", "residual", "residual_scale", "output_range"),
)


def sample(**changes):
    g = generator(1)
    x = torch.randint(0, 16, (1, 6, 7, 32), generator=g, dtype=torch.uint8)
    offset = torch.zeros(32, dtype=torch.int64)
    args = arguments(x, weight_codes((32, 9 * 32), 4, g), 4, 2, offset, g)
    return tuple((dict(zip(NAMES, args, strict=True)) | changes).values())


def packed(channels, bits=4, taps=9):
    return ops.pack_weight(weight_codes((32, taps * channels), bits, generator(2)), bits)


@on_every_isa
@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "winograd"),
        ({"x": sample()[0].permute(0, 2, 1, 3)}, "winograd"),  # not contiguous
        ({"multiplier": torch.full((32,), 2.0**-124)}, "winograd"),
        ({"stride": [2, 2]}, "direct"),
        ({"padding": [0, 0]}, "direct"),
        ({"padding": [2, 2], "dilation": [2, 2]}, "direct"),
        ({"groups": 2, "weight": packed(16)}, "direct"),
        ({"kernel": [1, 3], "padding": [0, 1], "weight": packed(32, taps=3)}, "direct"),
        ({"bits": 5, "weight": packed(32, bits=5)}, "direct"),
        ({"x": torch.ones(1, 6, 7, 30, dtype=torch.uint8), "weight": packed(30)}, "direct"),
        ({"x": torch.ones(1, 6, 7, 12, dtype=torch.uint8), "weight": packed(12)}, "direct"),
        ({"x": torch.ones(1, 4, 4, 32, dtype=torch.uint8)}, "direct"),  # not worth it
    ],
)
def test_when_it_runs(isa, changes, kernel):
    args = sample(**changes)
    actual, ran = run(isa, args)
    assert ran == kernel
    assert torch.equal(actual, reference.packed_conv2d(*args))


@on_every_isa
def test_multipliers_without_a_quarter(isa):
    """AVX-512 divides the multipliers by 4, the others the sums."""
    args = sample(multiplier=torch.full((32,), 2.0**-125 * 1.5 + 2.0**-148))
    actual, ran = run(isa, args)
    assert ran == ("direct" if isa in LOOKING_ISAS else "winograd")
    assert torch.equal(actual, reference.packed_conv2d(*args))

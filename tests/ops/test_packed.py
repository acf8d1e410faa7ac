import numpy as np
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

BITS = st.integers(2, 8)
LARGEST = 2**31 - 1  # of a stride or padding
SEED = st.integers(0, 2**32 - 1)


def codes(shape, bits, g, extreme=False):
    half = 2 ** (bits - 1)
    if extreme:
        return torch.where(torch.rand(shape, generator=g) < 0.5, -half, half - 1).to(torch.int8)
    return torch.randint(-half, half, shape, generator=g, dtype=torch.int8)


def numpy_pack(q, bits):
    """The layout, bit by bit."""
    rows, cols = q.shape
    panels, blocks = -(-rows // 16), -(-cols // 4)
    packed = np.zeros((panels, blocks, bits, 8), np.uint8)
    for row in range(rows):
        for col in range(cols):
            j = row % 16 * 4 + col % 4
            for b in range(bits):
                packed[row // 16, col // 4, b, j // 8] |= (int(q[row, col]) >> b & 1) << (j % 8)
    return packed


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_follows_the_layout(isa, bits):
    with on_isa(isa):
        for seed, (rows, cols) in enumerate([(1, 1), (16, 4), (17, 5), (40, 27), (64, 64), (0, 3)]):
            q = codes((rows, cols), bits, generator(seed))
            packed = ops.pack_weight(q, bits)
            np.testing.assert_array_equal(packed.numpy(), numpy_pack(q.numpy(), bits))
            assert packed.numel() * 8 == -(-rows // 16) * 16 * -(-cols // 4) * 4 * bits
            assert torch.equal(ops.unpack_weight(packed, bits, rows, cols), q)
            assert torch.equal(reference.pack_weight(q, bits), packed)
            assert torch.equal(reference.unpack_weight(packed, bits, rows, cols), q)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_packing_of_wider_dtypes_and_strided_input(dtype):
    q = codes((27, 40), 5, generator(0)).to(dtype).T
    assert torch.equal(ops.unpack_weight(ops.pack_weight(q, 5), 5, 40, 27), q.to(torch.int8))


@st.composite
def convolutions(draw, kinds=("one", "some", "depthwise"), largest_kernel=4, largest_size=13):
    g = generator(draw(SEED))
    bits = draw(BITS)
    groups_kind = draw(st.sampled_from(kinds))
    if groups_kind == "depthwise":
        channels = out_channels = groups = draw(st.integers(1, 80))
    else:
        groups = 1 if groups_kind == "one" else draw(st.integers(2, 5))
        channels = groups * draw(st.integers(1, 40))
        out_channels = groups * draw(st.integers(1, 80 if groups == 1 else 24))
    kernel = [draw(st.integers(1, largest_kernel)) for _ in range(2)]
    stride = [draw(st.integers(1, 3)) for _ in range(2)]
    padding = [draw(st.integers(0, 3)) for _ in range(2)]
    dilation = [draw(st.integers(1, 2)) for _ in range(2)]
    size = [
        max(draw(st.integers(1, largest_size)), d * (k - 1) + 1 - 2 * p)
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    batch = draw(st.integers(0, 3))
    shape = (batch, *size, channels)
    x = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    if draw(st.booleans()):
        x = torch.where(x < 128, 0, 255).to(torch.uint8)
    depth = kernel[0] * kernel[1] * channels // groups
    weight = ops.pack_weight(codes((out_channels, depth), bits, g, draw(st.booleans())), bits)
    limit = draw(st.sampled_from([0, 3, 60, 200, 2**15, 2**31, 2**40]))
    offset = torch.randint(-limit, limit + 1, (out_channels,), generator=g)
    zero_point = draw(st.sampled_from([0, 1, 17, 128, 255]))
    scale = 100.0 / (depth * 255 * (2 ** (bits - 1) + limit))
    multiplier = torch.randn(out_channels, generator=g) * scale
    bias = torch.randn(out_channels, generator=g) * 50 + 60
    out_shape = reference_shape(shape, out_channels, kernel, stride, padding, dilation)
    residual = draw_residual(draw, g, out_shape, 255)
    output_range = draw(st.sampled_from([None, (0, 255), (0, 15), (3, 3), (10, 200)]))
    args = (x, weight, bits, out_channels, kernel, stride, padding, dilation, groups, zero_point)
    return (*args, offset, multiplier, bias, residual, draw(st.floats(-1, 1)), output_range)


def reference_shape(shape, out_channels, kernel, stride, padding, dilation):
    size = [
        (shape[1 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return (shape[0], *size, out_channels)


def assert_equals_the_reference_on_every_isa(operator, args):
    expected = getattr(reference, operator)(*args)
    for isa in ISAS:
        with on_isa(isa):
            assert torch.equal(getattr(ops, operator)(*args), expected), isa


@settings(QUICK, max_examples=400)
@given(args=convolutions())
def test_conv2d_equals_the_reference_on_every_isa(args):
    assert_equals_the_reference_on_every_isa("packed_conv2d", args)


@settings(QUICK, max_examples=300)
@given(args=convolutions(["depthwise"], largest_kernel=7, largest_size=17))
def test_depthwise_conv2d_equals_the_reference_on_every_isa(args):
    assert_equals_the_reference_on_every_isa("packed_conv2d", args)


@settings(QUICK, max_examples=100)
@given(args=convolutions(["one"], largest_size=40), factor=st.sampled_from([1, 1e9]))
def test_conv2d_of_long_lines_equals_the_reference_on_every_isa(args, factor):
    """Factor: values beyond int32."""
    args = (*args[:11], args[11] * factor, *args[12:])
    assert_equals_the_reference_on_every_isa("packed_conv2d", args)


@st.composite
def depthwise_3x3(draw):
    g = generator(draw(SEED))
    bits = draw(BITS)
    channels = draw(st.sampled_from([16, 32, 48, 64, 80, 112, 144]))
    stride = [draw(st.sampled_from([1, 2]))] * 2
    padding = [draw(st.sampled_from([0, 1, 1, 3])) for _ in range(2)]
    width = draw(st.sampled_from([*range(3, 12), 33, 64, 65, 66, 67, 129, 131]))
    shape = (draw(st.integers(0, 2)), draw(st.integers(3, 8)), width, channels)
    x = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    weight = ops.pack_weight(codes((channels, 9), bits, g, draw(st.booleans())), bits)
    # Of nine bits, one less and one more.
    low, high = draw(st.sampled_from([(0, 0), (-3, 3), (-127, 128), (-128, 128), (-127, 129)]))
    offset = torch.randint(low, high + 1, (channels,), generator=g)
    offset[0], offset[-1] = low, high
    multiplier = torch.randn(channels, generator=g) * draw(st.sampled_from([1e-3, 1e9]))
    bias = torch.randn(channels, generator=g) * 50 + 60
    zero_point = draw(st.sampled_from([0, 1, 128, 255]))
    geometry = ([3, 3], stride, padding, [1, 1], channels, zero_point)
    output_range = draw(st.sampled_from([(0, 255), (0, 15), (10, 200)]))
    return (x, weight, bits, channels, *geometry, offset, multiplier, bias, None, 0.0, output_range)


@settings(QUICK, max_examples=200)
@given(args=depthwise_3x3())
def test_depthwise_3x3_equals_the_reference_on_every_isa(args):
    assert_equals_the_reference_on_every_isa("packed_conv2d", args)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kernel", [3, 17])
@pytest.mark.parametrize("bits", [2, 8])
def test_extremes_of_depthwise_sums(isa, kernel, bits):
    """Every product at its extreme, offsets next to where weights or sums leave 8, 16, 32 bits."""
    half = 2 ** (bits - 1)
    largest_weights = (64, 128, 2**15 - 1, (2**31 - 1) // (255 * kernel * kernel))
    for most in [w + beyond - half for w in largest_weights for beyond in (0, 1, 2)]:
        offset = torch.tensor([most, -most] * 9)[:17]
        q = torch.where(offset > 0, half - 1, -half).to(torch.int8)
        weight = ops.pack_weight(q[:, None].expand(17, kernel * kernel), bits)
        for code, zero_point in ((255, 0), (0, 255)):
            x = torch.full((1, kernel, kernel + 3, 17), code, dtype=torch.uint8)
            args = (x, weight, bits, 17, [kernel] * 2, [1, 1], [0, 1], [1, 1], 17, zero_point)
            args = (*args, offset, torch.ones(17), torch.zeros(17))
            with on_isa(isa):
                assert torch.equal(ops.packed_conv2d(*args), reference.packed_conv2d(*args)), most


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("batch", "size", "channels", "out_channels", "kernel", "groups"),
    [
        (2, 20, 64, 96, 3, 1),  # many rows, whole panels
        (1, 7, 128, 130, 3, 1),  # few rows
        (9, 7, 128, 130, 3, 1),  # few rows of several images
        (1, 33, 32, 64, 1, 1),  # reads x in place
        (1, 30, 48, 72, 3, 3),  # groups that start inside a panel
        (1, 30, 100, 100, 3, 100),  # depthwise
        (1, 70, 120, 120, 5, 120),  # depthwise, a row in several pieces
    ],
)
def test_conv2d_of_layer_sizes(isa, threads, batch, size, channels, out_channels, kernel, groups):
    g = generator(1)
    x = torch.randint(0, 16, (batch, size, size, channels), generator=g, dtype=torch.uint8)
    q = codes((out_channels, kernel * kernel * channels // groups), 4, g)
    offset = torch.randint(-7, 8, (out_channels,), generator=g)
    multiplier = torch.rand(out_channels, generator=g) * 1e-3
    bias = torch.randn(out_channels, generator=g) + 8
    args = (x, ops.pack_weight(q, 4), 4, out_channels, [kernel] * 2, [1, 1], [kernel // 2] * 2)
    args = (*args, [1, 1], groups, 5, offset, multiplier, bias, None, 0.0, [0, 15])
    with on_isa(isa):
        actual = with_threads(threads, torch.ops.fdda.packed_conv2d, *args)
    assert torch.equal(actual, reference.packed_conv2d(*args))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("channels", [1, 3, 9, 10])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_conv2d_of_short_kernel_rows(isa, threads, channels, batch):
    """Of a stem: up to 64 inputs, and more."""
    g = generator(channels)
    x = torch.randint(0, 256, (batch, 23, 37, channels), generator=g, dtype=torch.uint8)
    for dilation, padding in (([1, 1], [3, 3]), ([2, 1], [0, 0]), ([1, 2], [1, 5])):
        for bits, offset in ((4, -3), (8, 90)):
            weight = ops.pack_weight(codes((40, 49 * channels), bits, g), bits)
            args = (x, weight, bits, 40, [7, 7], [2, 2], padding, dilation, 1, 200)
            multiplier = torch.rand(40, generator=g) * 1e-3
            args = (*args, torch.full((40,), offset), multiplier, torch.randn(40, generator=g))
            args = (*args, None, 0.0, (0, 255))
            with on_isa(isa):
                actual = with_threads(threads, ops.packed_conv2d, *args)
            assert torch.equal(actual, reference.packed_conv2d(*args))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("size", "channels", "kernel", "stride", "padding"),
    [
        ((2, 2), 1, 7, (LARGEST, LARGEST), (LARGEST, LARGEST)),
        ((2, 2), 8, 3, (2**29, 2**29), (LARGEST, LARGEST)),
        ((2, 2), 16, 3, (2**29, 2**29), (LARGEST, LARGEST)),
        ((32, 10), 64, 3, (1, LARGEST), (1, 1)),
        ((10, 32), 64, 3, (LARGEST, 1), (1, 1)),
    ],
)
def test_conv2d_of_huge_strides_and_padding(isa, size, channels, kernel, stride, padding):
    """Few outputs of images whose padding no memory would hold."""
    g = generator(kernel)
    x = torch.randint(0, 256, (1, *size, channels), generator=g, dtype=torch.uint8)
    weight = ops.pack_weight(codes((20, kernel * kernel * channels), 4, g), 4)
    args = (x, weight, 4, 20, [kernel] * 2, stride, padding, [1, 1], 1, 3)
    args = (*args, torch.zeros(20, dtype=torch.int64), torch.ones(20), torch.zeros(20))
    with on_isa(isa):
        actual = ops.packed_conv2d(*args)
    assert torch.equal(actual, reference.packed_conv2d(*args))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_point", [0, 255])
def test_linear_of_few_rows(isa, threads, bits, zero_point):
    g = generator(bits)
    half = 2 ** (bits - 1)
    for rows in range(1, 18):
        for depth, features in ((4 * rows, 33), (8 * rows + 3, 80)):
            x = torch.randint(0, 256, (rows, depth), generator=g, dtype=torch.uint8)
            x[0] = 255
            q = codes((features, depth), bits, g, extreme=True)
            offset = torch.randint(-200, 200, (features,), generator=g)
            offset[:16] = -128 + half  # no code leaves int8
            multiplier = torch.rand(features, generator=g) * 1e-3
            bias = torch.randn(features, generator=g)
            for o in (torch.zeros_like(offset), offset.clamp(-128 + half, 128 - half), offset):
                args = (x, ops.pack_weight(q, bits), bits, features, zero_point)
                args = (*args, o, multiplier, bias)
                with on_isa(isa):
                    actual = with_threads(threads, ops.packed_linear, *args)
                assert torch.equal(actual, reference.packed_linear(*args))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("low", "high", "zero_point"),
    [
        (0, 65535, 0),
        (0, 65535, 12345),
        (0, 65536, 7),
        (-1, 65535, 7),
        (0, 255, -(10**6)),
        (0, 2**31 - 1, 2**31 - 1),
    ],
)
def test_linear_of_sums_around_two_bytes(isa, threads, bits, low, high, zero_point):
    """Around the limits of two bytes; rows around the number that is multiplied at once."""
    g = generator(bits)
    for rows, depth, features in ((1, 512, 70), (7, 9, 16), (8, 66, 33), (15, 4, 1)):
        x = torch.randint(low, high + 1, (rows, depth), generator=g, dtype=torch.int32)
        x[0, 0], x[-1] = low, high
        weight = ops.pack_weight(codes((features, depth), bits, g, extreme=True), bits)
        offset = torch.randint(-300, 300, (features,), generator=g)
        multiplier = torch.rand(features, generator=g) * 1e-5
        args = (x, weight, bits, features, zero_point, offset, multiplier, torch.ones(features))
        with on_isa(isa):
            actual = with_threads(threads, ops.packed_linear, *args)
        assert torch.equal(actual, reference.packed_linear(*args))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "depth", "features"),
    [
        (29, 4096, 50),  # rows a multiple of a page apart
        (600, 2052, 40),  # several blocks of rows
        (900, 32, 300),  # several pairs of panels at once
        (49, 64, 96),  # three pairs of panels
    ],
)
def test_linear_of_many_rows(isa, threads, rows, depth, features):
    g = generator(rows)
    x = torch.randint(0, 256, (rows, depth), generator=g, dtype=torch.uint8)
    residual = torch.randint(0, 256, (rows, features), generator=g, dtype=torch.uint8)
    multiplier = torch.rand(features, generator=g) * 1e-3
    bias = torch.randn(features, generator=g)
    for bits, limit in ((4, 5), (8, 100)):
        weight = ops.pack_weight(codes((features, depth), bits, g), bits)
        offset = torch.randint(-limit, limit + 1, (features,), generator=g)
        for output_range in (None, (3, 250)):
            args = (x, weight, bits, features, 17, offset, multiplier, bias, residual, 0.7)
            args = (*args, output_range)
            with on_isa(isa):
                actual = with_threads(threads, ops.packed_linear, *args)
            assert torch.equal(actual, reference.packed_linear(*args))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("offset", [0, 5000])
@pytest.mark.parametrize(
    ("channels", "out_channels", "groups", "kernel"),
    [(20, 24, 1, 1), (32, 35, 1, 3), (32, 32, 1, 3), (20, 20, 20, 3)],
)
def test_codes_of_values_that_are_no_numbers(isa, offset, channels, out_channels, groups, kernel):
    """A residual of a float network may be NaN, and infinities of both signs may meet."""
    g = generator(out_channels)
    x = torch.randint(0, 60, (2, 9, 9, channels), generator=g, dtype=torch.uint8)
    weight = codes((out_channels, kernel * kernel * channels // groups), 3, g)
    geometry = ([kernel] * 2, [1, 1], [kernel // 2] * 2, [1, 1], groups, 7)
    args = (x, ops.pack_weight(weight, 3), 3, out_channels, *geometry)
    args = (*args, torch.full((out_channels,), offset))
    shape = (2, 9, 9, out_channels)
    bias, full = torch.zeros(out_channels), torch.full(shape, 255, dtype=torch.uint8)
    for multiplier, residual, scale in (
        (1e-3, torch.full(shape, float("nan")), 1.0),
        (3e38, torch.full(shape, float("-inf")), 1.0),
        (3e38, full, -3e38),
    ):
        tail = (torch.full((out_channels,), multiplier), bias, residual, scale)
        for output_range in ((3, 200), (0, 15)):
            expected = reference.packed_conv2d(*args, *tail, output_range)
            with on_isa(isa):
                assert torch.equal(ops.packed_conv2d(*args, *tail, output_range), expected)
        if multiplier < 1:
            assert (expected == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize("rows", [1, 5, 16, 70])
def test_padding_codes_weigh_nothing(isa, dtype, rows):
    """A file may have others than 0 there."""
    g = generator(rows)
    for depth, features in ((5, 20), (7, 33), (66, 16)):
        shape = (-(-features // 16), -(-depth // 4), 4, 8)
        weight = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
        x = torch.randint(0, 256, (rows, depth), generator=g).to(dtype)
        for offset in (0, 300):
            args = (x, weight, 4, features, 9, torch.full((features,), offset))
            args = (*args, torch.ones(features), torch.zeros(features))
            with on_isa(isa):
                actual = ops.packed_linear(*args)
            assert torch.equal(actual, reference.packed_linear(*args))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [2, 20])
def test_offsets_up_to_where_sums_leave_int32(isa, rows):
    depth = 66
    limit = (2**31 - 1) // (255 * depth) - 128
    x = torch.full((rows, depth), 255, dtype=torch.uint8)
    q = torch.full((2, depth), 127, dtype=torch.int8)
    q[1] = -128
    for magnitude in (limit - 1, limit, limit + 1, 2 * limit):
        for zero_point in (0, 255):
            offset = torch.tensor([magnitude, -magnitude])
            args = (x, ops.pack_weight(q, 8), 8, 2, zero_point, offset)
            args = (*args, torch.ones(2), torch.zeros(2))
            with on_isa(isa):
                y = ops.packed_linear(*args)
            sums = (q.long() + offset[:, None]).sum(1) * (255 - zero_point)
            assert torch.equal(y, sums.double().float().expand(rows, 2))


@st.composite
def tiled_convolutions(draw):
    """Around the sizes of AMX's tiles: 16 rows, 32 of a block, 64 of a tall one; 64 inputs."""
    g = generator(draw(SEED))
    bits = draw(BITS)
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    inputs = draw(st.sampled_from([3, 8, 16, 20, 31, 32, 33, 63, 64, 65, 68, 100, 128, 132]))
    outputs = draw(st.sampled_from([16, 32, 48, 20] if groups > 1 else [1, 15, 16, 17, 32, 33, 80]))
    kernel = [draw(st.sampled_from([1, 1, 2, 3, 7])) for _ in range(2)]
    stride = [draw(st.sampled_from([1, 1, 2, 3])) for _ in range(2)]
    padding = [draw(st.integers(0, 3)) for _ in range(2)]
    dilation = [draw(st.integers(1, 2)) for _ in range(2)]
    if draw(st.booleans()):
        kernel, stride, padding = [1, 1], [1, 1], [0, 0]
    size = draw(
        st.sampled_from([(1, 15), (16, 1), (4, 4), (4, 8), (3, 11), (8, 8), (5, 13), (20, 30)])
    )
    size = [
        max(n, d * (k - 1) + 1 - 2 * p)
        for n, k, p, d in zip(size, kernel, padding, dilation, strict=True)
    ]
    shape = (draw(st.integers(1, 3)), *size, groups * inputs)
    x = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    out_channels, depth = groups * outputs, kernel[0] * kernel[1] * inputs
    weight = ops.pack_weight(codes((out_channels, depth), bits, g, draw(st.booleans())), bits)
    limit = draw(st.sampled_from([0, 3, 200, 2**20, 2**33]))
    offset = torch.randint(-limit, limit + 1, (out_channels,), generator=g)
    # 1e9: values beyond int32.
    multiplier = torch.randn(out_channels, generator=g) * draw(st.sampled_from([1e-3, 1e9]))
    multiplier = multiplier / (1 + limit)
    bias = torch.randn(out_channels, generator=g) * 50 + 60
    out_shape = reference_shape(shape, out_channels, kernel, stride, padding, dilation)
    residual = draw_residual(draw, g, out_shape, 255)
    output_range = draw(st.sampled_from([None, [0, 255], [10, 200]]))
    zero_point = draw(st.sampled_from([0, 3, 255]))
    args = (x, weight, bits, out_channels, kernel, stride, padding, dilation, groups, zero_point)
    return (*args, offset, multiplier, bias, residual, 0.37, output_range)


@pytest.mark.skipif("amx" not in ISAS, reason="no AMX here")
@pytest.mark.parametrize("threads", [1, 3])
@settings(QUICK, max_examples=300)
@given(args=tiled_convolutions())
def test_conv2d_on_tiles_equals_avx512vnni(threads, args):
    with on_isa("avx512vnni"):
        expected = torch.ops.fdda.packed_conv2d(*args)
    with on_isa("amx"):
        actual = with_threads(threads, torch.ops.fdda.packed_conv2d, *args)
        kernel = _library._extension.conv_kernel()
    if args[-1] is None:
        assert_same_bits(actual, expected)
    else:
        assert torch.equal(actual, expected)
    one_panel_one_group = args[8] == 1 or args[3] // args[8] % 16 == 0
    images, height, width, _ = expected.shape
    matrix = args[4:7] == ([1, 1], [1, 1], [0, 0])
    outputs = (images if matrix else 1) * height * width
    run = args[0].shape[3] // args[8] * (args[4][1] if args[8] == args[7][1] == 1 else 1)
    on_tiles = one_panel_one_group and outputs >= 16 and run > 4
    assert kernel == ("tiles" if on_tiles else "direct")


def numpy_conv(x, q, kernel, stride, padding, dilation, groups, zero_point, offset):
    """The definition in Python integers."""
    _, height, width, channels = x.shape
    out_channels, depth = len(q), channels // groups
    shape = reference_shape(x.shape, out_channels, kernel, stride, padding, dilation)
    acc = np.zeros(shape, object)
    for n, oh, ow, o in np.ndindex(*shape):
        for kh, kw, c in np.ndindex(*kernel, depth):
            ih = oh * stride[0] - padding[0] + kh * dilation[0]
            iw = ow * stride[1] - padding[1] + kw * dilation[1]
            if 0 <= ih < height and 0 <= iw < width:
                value = int(x[n, ih, iw, o // (out_channels // groups) * depth + c]) - zero_point
                tap = int(q[o, (kh * kernel[1] + kw) * depth + c]) + int(offset[o])
                acc[n, oh, ow, o] += value * tap
    return acc


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("limit", [2, 2**35])
def test_conv2d_against_python_integers(isa, groups, limit):
    g = generator(groups)
    x = torch.randint(0, 256, (2, 5, 6, 6), generator=g, dtype=torch.uint8)
    kernel, stride, padding, dilation = [3, 2], [2, 1], [1, 1], [1, 2]
    q = codes((6, 6 * 6 // groups), 3, g)
    offset = torch.randint(-limit, limit + 1, (6,), generator=g)
    acc = numpy_conv(x, q, kernel, stride, padding, dilation, groups, 9, offset)
    multiplier = torch.rand(6, generator=g) / limit
    bias = torch.randn(6, generator=g)
    residual = torch.randint(0, 256, acc.shape, generator=g, dtype=torch.uint8)
    v = acc.astype(np.float64).astype(np.float32) * multiplier.numpy() + bias.numpy()
    v = v + residual.numpy().astype(np.float32) * np.float32(0.37)
    args = (x, ops.pack_weight(q, 3), 3, 6, kernel, stride, padding, dilation, groups, 9)
    args = (*args, offset, multiplier, bias, residual, 0.37)
    if isa == "reference":
        floats = reference.packed_conv2d(*args)
        quantized = reference.packed_conv2d(*args, [4, 190])
    else:
        with on_isa(isa):
            floats = ops.packed_conv2d(*args)
            quantized = ops.packed_conv2d(*args, (4, 190))
    np.testing.assert_array_equal(floats.numpy().view(np.int32), v.view(np.int32))
    np.testing.assert_array_equal(quantized.numpy(), np.clip(np.rint(v), 4, 190))


@st.composite
def linears(draw):
    g = generator(draw(SEED))
    bits = draw(BITS)
    rows, depth, features = (
        draw(st.integers(low, high)) for low, high in ((0, 70), (1, 90), (1, 90))
    )
    if draw(st.booleans()):
        x = torch.randint(0, 256, (rows, depth), generator=g, dtype=torch.uint8)
        zero_point = draw(st.integers(0, 255))
    else:
        x = torch.randint(-(2**31), 2**31, (rows, depth), generator=g).to(torch.int32)
        zero_point = draw(st.integers(-(2**31), 2**31 - 1))
    weight = ops.pack_weight(codes((features, depth), bits, g), bits)
    limit = draw(st.sampled_from([0, 3, 2**20]))
    offset = torch.randint(-limit, limit + 1, (features,), generator=g)
    multiplier = torch.randn(features, generator=g) * 2.0 ** draw(st.integers(-60, -10))
    bias = torch.randn(features, generator=g) * 50 + 60
    residual = draw_residual(draw, g, (rows, features), 255)
    output_range = draw(st.sampled_from([None, (0, 255), (0, 15)]))
    args = (x, weight, bits, features, zero_point, offset, multiplier, bias)
    return (*args, residual, draw(st.floats(-1, 1)), output_range)


@QUICK
@given(args=linears())
def test_linear_equals_the_reference_on_every_isa(args):
    assert_equals_the_reference_on_every_isa("packed_linear", args)


@pytest.mark.parametrize("isa", ISAS)
def test_large_sums_are_exact(isa):
    """Every product at its extreme, at the largest K that int32 sums hold."""
    depth = (2**31 - 1) // (255 * 128)
    x = torch.full((2, depth), 255, dtype=torch.uint8)
    q = torch.full((3, depth), -128, dtype=torch.int8)
    q[1] = 127
    ones, zeros = torch.ones(3), torch.zeros(3)
    offset = torch.tensor([0, 0, 0])
    with on_isa(isa):
        y = ops.packed_linear(x, ops.pack_weight(q, 8), 8, 3, 0, offset, ones, zeros)
    expected = torch.tensor([-128 * 255 * depth, 127 * 255 * depth, -128 * 255 * depth])
    assert torch.equal(y, expected.double().float().expand(2, 3))
    with pytest.raises(ValueError, match="weight: expected at most"):
        ops.packed_linear(
            torch.zeros(1, depth + 1, dtype=torch.uint8),
            torch.zeros(1, depth // 4 + 1, 8, 8, dtype=torch.uint8),
            8, 3, 0, offset, ones, zeros,
        )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_products_at_their_extremes(isa, bits):
    """Every product alike, so that a sum that saturates or wraps shows; offsets of int8's ends."""
    half = 2 ** (bits - 1)
    ones, zeros = torch.ones(17), torch.zeros(17)
    for top in (1, 3, 15, 31, 63, 127, 128, 255):
        x = torch.full((1, 5, 6, 37), top, dtype=torch.uint8)
        for offset in (0, half - 128, 128 - half, -200):
            for q in (-half, half - 1):
                weight = ops.pack_weight(torch.full((17, 9 * 37), q, dtype=torch.int8), bits)
                args = (x, weight, bits, 17, [3, 3], [1, 1], [1, 1], [1, 1], 1, top // 2)
                args = (*args, torch.full((17,), offset), ones, zeros)
                with on_isa(isa):
                    actual = ops.packed_conv2d(*args)
                assert torch.equal(actual, reference.packed_conv2d(*args)), (top, offset, q)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("limit", [2**9, 2**14, 2**20])
def test_linear_of_sums(isa, limit):
    """int32 inputs small enough, just so and too large for int32 sums, with extreme codes."""
    g = generator(limit)
    for bits, depth in ((2, 33), (4, 512), (8, 512)):
        x = torch.randint(-limit, limit + 1, (3, depth), generator=g).to(torch.int32)
        x[0] = limit
        q = codes((35, depth), bits, g, True)
        q[:2] = torch.tensor([[-(2 ** (bits - 1))], [2 ** (bits - 1) - 1]])
        offset = torch.randint(-300, 300, (35,), generator=g)
        args = (x, ops.pack_weight(q, bits), bits, 35, -7, offset, torch.ones(35), torch.zeros(35))
        with on_isa(isa):
            assert torch.equal(ops.packed_linear(*args), reference.packed_linear(*args))


@pytest.mark.parametrize("isa", ISAS)
def test_noncontiguous_arguments(isa):
    g = generator(0)
    x = torch.randint(0, 256, (2, 8, 5, 6), generator=g, dtype=torch.uint8).permute(0, 2, 3, 1)
    weight = ops.pack_weight(codes((10, 72), 4, g), 4)
    offset = torch.randint(-3, 4, (20,), generator=g)[::2]
    multiplier, bias = torch.rand(20, generator=g)[::2], torch.rand(20, generator=g)[::2]
    residual = torch.rand(2, 10, 5, 6, generator=g).permute(0, 2, 3, 1)
    args = (weight, 4, 10, 3, 1, 1, 1, 1, 3)
    with on_isa(isa):
        y = ops.packed_conv2d(x, *args, offset, multiplier, bias, residual, 0.5)
        expected = ops.packed_conv2d(
            x.contiguous(), *args, offset.contiguous(), multiplier.contiguous(),
            bias.contiguous(), residual.contiguous(), 0.5,
        )  # fmt: skip
    assert torch.equal(y, expected)


@QUICK
@given(
    seed=SEED,
    shape=st.tuples(*[st.integers(0, 3)] + [st.integers(1, 70)] + [st.integers(1, 9)] * 2),
    bits=BITS,
    layout=st.sampled_from(["contiguous", "channels_last", "sliced", "2d"]),
    low=st.floats(-5, 1),
    width=st.floats(0, 10),
)
def test_quantize_gives_the_codes_of_fake_quantize(seed, shape, bits, layout, low, width):
    g = generator(seed)
    x = torch.randn(shape, generator=g) * 3
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.randn((*shape[:3], 2 * shape[3]), generator=g)[..., ::2]
    elif layout == "2d":
        x = torch.randn(shape[:2], generator=g)
    x_min, x_max = torch.tensor(low, dtype=torch.float32), torch.tensor(low + width)
    half = 2.0 ** (bits - 1)
    scale = torch.tensor(2.0**bits - 1) / (x_max - x_min).clamp(min=1e-8)
    zero_point = torch.round(scale * x_min) + half
    y = reference.fake_quantize_range(x, x_min, x_max, bits)
    for isa in [*ISAS, "reference"]:
        if isa == "reference":
            u = reference.quantize(x, scale.item(), zero_point.item(), bits)
        else:
            with on_isa(isa):
                u = ops.quantize(x, scale.item(), zero_point.item(), bits)
        back = (u.float() - half + zero_point) / scale
        assert torch.equal(back, y.permute(0, 2, 3, 1) if x.dim() == 4 else y)


@QUICK
@given(
    seed=SEED,
    shape=st.lists(st.integers(0, 12), max_size=4),
    x_bits=BITS,
    bits=BITS,
    ranges=st.tuples(*[st.tuples(st.floats(-5, 0), st.floats(0, 5))] * 2),
    sliced=st.booleans(),
)
def test_requantize_codes_is_fake_quantize_twice(seed, shape, x_bits, bits, ranges, sliced):
    (wide, narrow) = (torch.tensor(r, dtype=torch.float32) for r in ranges)

    def meaning(limits, width):
        scale = torch.tensor(2.0**width - 1) / (limits[1] - limits[0]).clamp(min=1e-8)
        zero_point = torch.round(scale * limits[0])
        return scale, zero_point

    x = torch.randn([*shape, 2], generator=generator(seed)) * 3
    y = reference.fake_quantize_range(x, *wide, x_bits)
    expected = reference.fake_quantize_range(y, *narrow, bits)
    x_scale, x_zero_point = meaning(wide, x_bits)
    scale, zero_point = meaning(narrow, bits)
    u = torch.round(y * x_scale - x_zero_point).to(torch.uint8)
    if sliced:
        u, expected = u[..., :1], expected[..., :1]
    args = (x_scale.item(), -int(x_zero_point), scale.item())
    args = (*args, zero_point.item() + 2.0 ** (bits - 1), bits)
    assert torch.equal((u.float() - args[1]) / x_scale, y[..., : u.shape[-1]])
    for isa in [*ISAS, "reference"]:
        if isa == "reference":
            codes = reference.requantize_codes(u, *args)
        else:
            with on_isa(isa):
                codes = ops.requantize_codes(u, *args)
        assert torch.equal((codes.float() + zero_point) / scale, expected), isa


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"x": torch.zeros(3)}, "x: expected torch.uint8"),
        ({"x_scale": 0.0}, "x_scale: expected > 0"),
        ({"x_zero_point": 256}, "x_zero_point: expected"),
        ({"bits": 9}, "bits: expected"),
    ],
)
def test_requantize_codes_refuses(changes, error):
    good = dict(x=torch.zeros(3, dtype=torch.uint8), x_scale=1.0, x_zero_point=0)
    good |= dict(scale=1.0, zero_point=0.0, bits=4)
    with pytest.raises((TypeError, ValueError), match=error):
        ops.requantize_codes(**good | changes)


@QUICK
@given(
    seed=SEED,
    batch=st.integers(0, 2),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    channels=st.integers(1, 70),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    ceil_mode=st.booleans(),
    data=st.data(),
)
def test_max_pool(seed, batch, size, channels, kernel, stride, dilation, ceil_mode, data):
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    size = [max(s, d * (k - 1) + 1) for s, d, k in zip(size, dilation, kernel, strict=True)]
    x = torch.randint(0, 256, (batch, *size, channels), generator=generator(seed))
    x = x.to(torch.uint8)
    args = (list(kernel), list(stride), padding, list(dilation), ceil_mode)
    expected = reference.max_pool2d_codes(x, *args)
    for isa in ISAS:
        with on_isa(isa):
            assert torch.equal(ops.max_pool2d_codes(x, *args), expected), isa


def conv_arguments(**changes):
    arguments = dict(
        x=torch.zeros(1, 4, 4, 8, dtype=torch.uint8),
        weight=torch.zeros(1, 18, 4, 8, dtype=torch.uint8),
        bits=4,
        out_channels=6,
        kernel_size=3,
        stride=1,
        padding=1,
        dilation=1,
        groups=1,
        x_zero_point=0,
        weight_offset=torch.zeros(6, dtype=torch.int64),
        multiplier=torch.ones(6),
        bias=torch.zeros(6),
    )
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(1, 4, 4, 8)}, TypeError, "x: expected torch.uint8, got torch.float32"),
        ({"x": torch.zeros(4, 4, 8, dtype=torch.uint8)}, ValueError, "x: expected shape"),
        ({"x": [1]}, TypeError, "x: expected a tensor, got list"),
        ({"bits": 9}, ValueError, "bits: expected 2 to 8, got 9"),
        ({"bits": 4.0}, TypeError, "bits: expected an integer, got float"),
        ({"weight": torch.zeros(1, 18, 3, 8, dtype=torch.uint8)}, ValueError, "weight: expected"),
        ({"groups": 3}, ValueError, "groups: expected a divisor of 8 and 6, got 3"),
        ({"kernel_size": 0}, ValueError, "kernel_size: expected 1 to"),
        ({"padding": (1, 2, 3)}, ValueError, "padding: expected an integer or two"),
        ({"padding": 0, "dilation": 2}, ValueError, "kernel_size: expected a kernel within"),
        ({"x_zero_point": 256}, ValueError, "x_zero_point: expected 0 to 255, got 256"),
        ({"bias": torch.zeros(5)}, ValueError, "bias: expected shape"),
        ({"multiplier": torch.zeros(6).double()}, TypeError, "multiplier: expected"),
        ({"weight_offset": torch.zeros(6)}, TypeError, "weight_offset: expected torch.int64"),
        ({"residual": torch.zeros(1, 4, 4, 5)}, ValueError, "residual: expected shape"),
        ({"output_range": (5, 4)}, ValueError, "output_range: expected"),
        ({"output_range": (0, 256)}, ValueError, "output_range: expected"),
    ],
)
def test_conv2d_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        ops.packed_conv2d(**conv_arguments(**changes))


def test_packing_refuses_values_out_of_range():
    with pytest.raises(ValueError, match="q: expected -8 to 7, got -9 to 0"):
        ops.pack_weight(torch.tensor([[0, -9]]).to(torch.int8), 4)
    with pytest.raises(TypeError, match=r"q: expected torch.int8 or .*, got torch.int64"):
        ops.pack_weight(torch.tensor([[0, 1]]), 4)


def test_opcheck():
    g = generator(0)
    x = torch.randint(0, 256, (2, 5, 6, 8), generator=g, dtype=torch.uint8)
    q = codes((6, 72), 4, g)
    weight = ops.pack_weight(q, 4)
    offset, multiplier = torch.randint(-3, 4, (6,), generator=g), torch.rand(6, generator=g)
    bias, residual = torch.rand(6, generator=g), torch.rand(2, 5, 6, 6, generator=g)
    fdda, check = torch.ops.fdda, torch.library.opcheck
    check(fdda.pack_weight.default, (q, 4))
    check(fdda.unpack_weight.default, (weight, 4, 6, 72))
    for tail in ((None, 0.0, None), (residual, 0.5, [0, 15])):
        geometry = (weight, 4, 6, [3, 3], [1, 1], [1, 1], [1, 1], 1, 7)
        check(fdda.packed_conv2d.default, (x, *geometry, offset, multiplier, bias, *tail))
    rows = torch.randint(0, 256, (3, 72), generator=g, dtype=torch.uint8)
    for r in (rows, rows.to(torch.int32)):
        check(fdda.packed_linear.default, (r, weight, 4, 6, 7, offset, multiplier, bias))
    image = torch.randn(2, 3, 4, 5, generator=g)
    check(fdda.quantize.default, (image, 3.0, -1.0, 4))
    check(fdda.requantize_codes.default, (x, 30.0, 128, 1.5, 0.0, 4))
    check(fdda.max_pool2d_codes.default, (x, [3, 3], [2, 2], [1, 1], [1, 1], True))

"""Weights in the order of the CUDA kernels, and layers on them, on the CPU."""

import pytest
import torch
from backends import generator

from fdda_fast import ops
from fdda_fast.ops import reference


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


def codes(shape, bits):
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, generator=generator(bits), dtype=torch.int8)


def documented(q, bits, depthwise):
    """The order as the docstring of reorder_weight has it, byte by byte."""
    rows, cols = q.shape
    panels, steps = -(-rows // 16), -(-cols // 64)
    padded = torch.zeros(panels * 16, steps * 64, dtype=torch.int64)
    padded[:rows, :cols] = q
    if depthwise:
        return padded[:, :cols].T.flatten().to(torch.uint8)
    tiles = torch.empty(panels, steps, 2 if bits > 4 else 1, 32, 4, 4, dtype=torch.int64)
    for v, lane, w, j in torch.cartesian_prod(*map(torch.arange, tiles.shape[2:])).tolist():
        g, t = divmod(lane, 4)
        channel = 8 * (w // 2) + g
        if bits > 4:
            k = 32 * v + 16 * (w % 2) + 4 * t + j
            tiles[:, :, v, lane, w, j] = padded[channel::16, k::64] & 255
        else:
            k = 32 * (w % 2) + 4 * t + j
            low, high = padded[channel::16, k::64] & 15, padded[channel::16, k + 16 :: 64] & 15
            tiles[:, :, v, lane, w, j] = low | high << 4
    sums = padded.sum(1).int()
    return torch.cat([tiles.to(torch.uint8).flatten(), sums.view(torch.uint8)])


SHAPES = [(1, 1), (16, 64), (17, 65), (40, 190), (3, 0), (0, 3)]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_order(bits, depthwise, shape):
    q = codes(shape, bits)
    packed = ops.pack_weight(q, bits)
    actual = ops.reorder_weight(packed, bits, *shape, depthwise)
    assert_same(actual, documented(q, bits, depthwise))
    assert_same(reference.file_weight(actual, bits, *shape, depthwise), packed)


def arguments(bits, x_bits=8, channels=20, outputs=24, groups=1, kernel=3, residual=None):
    g = generator(bits)
    x = torch.randint(0, 2**x_bits, (2, 5, 6, channels), generator=g, dtype=torch.uint8)
    depth = kernel * kernel * channels // groups
    weight = ops.pack_weight(codes((outputs, depth), bits), bits)
    offset, multiplier = torch.randint(-3, 4, (outputs,), generator=g), torch.rand(outputs) * 1e-2
    if residual is not None:
        residual = (torch.rand(2, 5, 6, outputs, generator=g) * 99).to(residual)
    geometry = (outputs, kernel, 1, kernel // 2, 1, groups, 3)
    epilogue = (offset, multiplier, torch.rand(outputs, generator=g), residual, 0.5, (0, 200))
    return x, weight, bits, *geometry, *epilogue


def reordered(args):
    x, weight, bits, outputs, kernel, *rest = args
    depth, depthwise = kernel * kernel * x.shape[3] // rest[3], rest[3] > 1
    return (x, ops.reorder_weight(weight, bits, outputs, depth, depthwise), *args[2:])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    "shape",
    [{}, {"kernel": 1, "residual": torch.uint8}, {"groups": 20, "outputs": 20}],
)
def test_layers(bits, shape):
    args = arguments(bits, x_bits=4, **shape)
    expected = ops.packed_conv2d(*args)
    assert_same(ops.reordered_conv2d(*reordered(args), x_bits=4), expected)
    strided = args[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(ops.reordered_conv2d(strided, *reordered(args)[1:]), expected)


@pytest.mark.parametrize("residual", [None, torch.float32])
def test_linear(residual):
    x, weight, bits, outputs, *_ = args = arguments(4, kernel=1, residual=residual)
    tail = list(args[9:])
    tail[4] = None if residual is None else tail[4].reshape(60, outputs)
    x = x.reshape(60, -1)
    expected = ops.packed_linear(x, weight, bits, outputs, *tail)
    weight = ops.reorder_weight(weight, bits, outputs, x.shape[1])
    assert_same(ops.reordered_linear(x, weight, bits, outputs, *tail), expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_codes(bits):
    args = list(arguments(bits, 4, channels=64, outputs=96, residual=torch.uint8))
    args[-1] = (0, 15)
    expected = ops.packed_conv2d(*args)
    x, *rest = reordered(args)
    x = ops.pack_codes(x)
    assert_same(ops.reordered_conv2d(x, *rest, x_packed=True), expected)
    actual = ops.reordered_conv2d(x, *rest, x_packed=True, out_packed=True)
    assert_same(actual, ops.pack_codes(expected))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({2: 5}, {"x_packed": True}, "bits: expected 2 to 4, got 5"),
        ({9: 16}, {"x_packed": True}, "x_zero_point: expected 0 to 15, got 16"),
        ({8: 64}, {"out_packed": True}, "groups: expected 1 with packed codes, got 64"),
        ({15: (0, 16)}, {"out_packed": True}, r"output_range: expected up to 15, got \(0, 16\)"),
        ({15: None}, {"out_packed": True}, "output_range: expected up to 15, got None"),
        ({3: 24}, {"out_packed": True}, "out_channels: expected a multiple of 32, got 24"),
    ],
)
def test_refuses_packed_codes(changes, options, message):
    args = list(reordered(arguments(4, 4, channels=64, outputs=64)))
    if options.get("x_packed"):
        args[0] = ops.pack_codes(args[0])
    for index, value in changes.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        ops.reordered_conv2d(*args, **options)


def test_refuses_channels_of_packed_codes():
    args = reordered(arguments(4, 4, channels=48, outputs=64))
    x = torch.zeros(2, 5, 6, 24, dtype=torch.uint8)
    with pytest.raises(ValueError, match="x: expected packed channels, a multiple of 32, got 48"):
        ops.reordered_conv2d(x, *args[1:], x_packed=True)


def test_empty():
    args = reordered(arguments(4))
    assert ops.reordered_conv2d(args[0][:0], *args[1:]).shape == (0, 5, 6, 24)


def test_opcheck():
    check, fdda = torch.library.opcheck, torch.ops.fdda
    args = arguments(4)
    check(fdda.reorder_weight.default, (args[1], 4, 24, 180, False))
    x, weight, bits, outputs, kernel, stride, padding, dilation, *rest = reordered(args)
    geometry = ([n] * 2 for n in (kernel, stride, padding, dilation))
    rest[-1] = list(rest[-1])
    geometry = list(geometry)
    check(fdda.reordered_conv2d.default, (x, weight, bits, outputs, *geometry, *rest, 4))
    weight = ops.reorder_weight(ops.pack_weight(codes((32, 288), 4), 4), 4, 32, 288)
    parameters = (torch.zeros(32, dtype=torch.int64), torch.rand(32), torch.rand(32))
    tail = (1, 3, *parameters, None, 0.0, [0, 15], 4, True, True)
    check(fdda.reordered_conv2d.default, (x[..., :16], weight, 4, 32, *geometry, *tail))


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(2, 5, 6, 20), TypeError, "x: expected torch.uint8, got torch.float32"),
        (1, torch.zeros(7, dtype=torch.uint8), ValueError, r"weight: expected shape \[3200\]"),
        (2, 9, ValueError, "bits: expected 2 to 8, got 9"),
        (8, 2, ValueError, "groups: expected 1, or one of each channel, got 2"),
        (9, 256, ValueError, "x_zero_point: expected 0 to 255, got 256"),
    ],
)
def test_refuses(index, value, error, message):
    args = list(reordered(arguments(4)))
    args[index] = value
    with pytest.raises(error, match=message):
        ops.reordered_conv2d(*args)


def test_refuses_bits_of_inputs():
    with pytest.raises(ValueError, match="x_bits: expected 1 to 8, got 9"):
        ops.reordered_conv2d(*reordered(arguments(4)), x_bits=9)
    with pytest.raises(ValueError, match=r"packed: expected shape \[1, 1, 4, 8\], got \[1, 1, 3"):
        ops.reorder_weight(ops.pack_weight(codes((1, 1), 3), 3), 4, 1, 1)

"""Batch norm on given statistics, alone and with the convolution behind it."""

import pytest
import torch
import torch.nn.functional as F
from backends import ISAS, QUICK, generator, on_isa, with_threads
from hypothesis import given
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import _strips, _winograd_upsample

SLOPE = 0.2


@pytest.fixture(params=[8 << 20, 20_000, 1], ids=["images", "rows", "row"])
def strip_bytes(request, monkeypatch):
    """Several images a strip, several rows, one row."""
    monkeypatch.setattr(_strips, "STRIP_BYTES", request.param)


@st.composite
def cases(draw):
    """x, tables, weight, bias."""
    g = generator(draw(st.integers(0, 2**32 - 1)))
    channels, outputs = draw(st.sampled_from([1, 3, 16, 17, 64])), draw(st.sampled_from([1, 3, 5]))
    shape = [draw(st.integers(0, 3)), channels] + [draw(st.integers(1, 12)) for _ in range(2)]
    kind = draw(st.sampled_from(["contiguous", "channels_last", "sliced"]))
    x = 2 * torch.randn(shape, generator=g) + 1
    x = x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    tables = torch.randn(3, *shape[:2], generator=g)
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "sliced":
        x, tables = torch.cat([x, x], 1)[:, ::2], torch.cat([tables, tables], 2)[:, :, ::2]
    weight = torch.randn(outputs, channels, 3, 3, generator=g) / (3 * channels**0.5)
    return x, tables, weight, torch.randn(outputs, generator=g)


def plain(x, tables):
    mean, scale, bias = tables.double()[:, :, :, None, None]
    return F.leaky_relu((x.double() - mean) * scale + bias, SLOPE)


@QUICK
@given(case=cases())
def test_fixed_bn_lrelu(case):
    x, tables, *_ = case
    expected = plain(x, tables)
    for isa in ISAS:
        with on_isa(isa):
            y = ops.fixed_bn_lrelu(x, tables, SLOPE)
        assert y.dtype == x.dtype
        assert y.is_contiguous(memory_format=torch.channels_last) or not len(y)
        tolerance = 4 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.usefixtures("strip_bytes")
@QUICK
@given(case=cases())
def test_fixed_bn_lrelu_conv3x3(case):
    x, tables, weight, bias = case
    expected = F.conv2d(plain(x, tables), weight.double(), bias.double(), padding=1)
    for isa in ISAS:
        with on_isa(isa):
            y = ops.fixed_bn_lrelu_conv3x3(x, tables, SLOPE, weight, bias)
            apart = ops.conv3x3_few_outputs(ops.fixed_bn_lrelu(x, tables, SLOPE), weight, bias)
        assert y.dtype == x.dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        off, usual = ((t.double() - expected).norm().item() for t in (y, apart))
        assert off <= 1.5 * usual + 4 * torch.finfo(x.dtype).eps * (expected.norm().item() + 0.1)


@pytest.mark.parametrize("isa", ISAS)
def test_slope_of_one_is_no_activation(isa):
    x, tables = torch.randn(2, 5, 3, 4), torch.randn(3, 2, 5)
    with on_isa(isa):
        y = ops.fixed_bn_lrelu(x, tables, 1.0)
    mean, scale, bias = tables[:, :, :, None, None]
    torch.testing.assert_close(y, (x - mean) * scale + bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_the_result(isa, dtype):
    g = generator(3)
    x = torch.randn(3, 64, 40, 30, generator=g).to(dtype)
    tables, weight = torch.randn(3, 3, 64, generator=g), torch.randn(3, 64, 3, 3, generator=g)
    for function, rest in (
        (ops.fixed_bn_lrelu, ()),
        (ops.fixed_bn_lrelu_conv3x3, (weight, torch.zeros(3))),
    ):
        with on_isa(isa):
            one, two = (with_threads(n, function, x, tables, SLOPE, *rest) for n in (1, 2))
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, "x: expected"),
        ({"x": torch.zeros(3, 4, 5, 6).double()}, TypeError, "x: expected"),
        ({"tables": torch.zeros(3, 3, 5)}, ValueError, "tables: expected"),
        ({"tables": torch.zeros(3, 3, 4).double()}, TypeError, "tables: expected"),
        ({"negative_slope": float("nan")}, ValueError, "negative_slope: expected"),
        ({"weight": torch.zeros(3, 5, 3, 3)}, ValueError, "weight: expected"),
        ({"bias": torch.zeros(2)}, ValueError, "bias: expected"),
    ],
)
def test_refuses(changes, error, message):
    good = {
        "x": torch.randn(3, 4, 5, 6), "tables": torch.randn(3, 3, 4), "negative_slope": SLOPE,
        "weight": torch.randn(3, 4, 3, 3), "bias": torch.randn(3),
    }  # fmt: skip
    arguments = good | changes
    with pytest.raises(error, match=message):
        ops.fixed_bn_lrelu_conv3x3(**arguments)
    if not changes.keys() & {"weight", "bias"}:
        with pytest.raises(error, match=message):
            ops.fixed_bn_lrelu(*list(arguments.values())[:3])


def test_opcheck():
    for x in (
        torch.randn(3, 4, 5, 6),
        torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last).bfloat16(),
        torch.randn(3, 8, 5, 6)[:, ::2],
    ):
        arguments = x, torch.randn(3, 3, 4), SLOPE
        torch.library.opcheck(torch.ops.fdda.fixed_bn_lrelu.default, arguments)
        rest = torch.randn(2, 4, 3, 3), torch.randn(2)
        operator = torch.ops.fdda.fixed_bn_lrelu_conv3x3.default
        torch.library.opcheck(operator, (*arguments, *rest))


@pytest.fixture(params=[160, 8, 1], ids=["images", "rows", "row"])
def tiles(request, monkeypatch):
    """Several images a strip, several rows of tiles, one row."""
    monkeypatch.setattr(_winograd_upsample, "TILES", request.param)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 16, 25, 23), torch.float32),
        ((2, 32, 28, 30), torch.float32),
        ((2, 8, 5, 6), torch.float32),
        ((0, 16, 8, 8), torch.float32),
        ((3, 16, 25, 23), torch.bfloat16),
    ],
)
def test_upsampled_equals_its_parts(shape, dtype, isa):
    g = generator(5)
    x = torch.randn(shape, generator=g).to(dtype)
    weight, bias = torch.randn(16, shape[1], 3, 3, generator=g) / 12, torch.randn(16, generator=g)
    tables = torch.randn(3, shape[0], 16, generator=g)
    after = torch.randn(3, 16, 3, 3, generator=g) / 12, torch.randn(3, generator=g)
    with on_isa(isa):
        parts = ops.fixed_bn_lrelu(ops.upsample_conv3x3(x, weight, bias), tables, SLOPE)
        y = ops.upsample_fixed_bn_lrelu(x, weight, bias, tables, SLOPE)
        image = ops.upsample_fixed_bn_lrelu_conv3x3(x, weight, bias, tables, SLOPE, *after)
        image_parts = ops.conv3x3_few_outputs(parts, *after)
    for found, expected in ((y, parts), (image, image_parts)):
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert found.is_contiguous(memory_format=torch.channels_last)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_the_upsampled_result(isa):
    g = generator(4)
    x, tables = torch.randn(2, 16, 40, 30, generator=g), torch.randn(3, 2, 16, generator=g)
    weight, bias = torch.randn(16, 16, 3, 3, generator=g), torch.zeros(16)
    after = torch.randn(3, 16, 3, 3, generator=g), torch.zeros(3)
    for function, rest in (
        (ops.upsample_fixed_bn_lrelu, ()),
        (ops.upsample_fixed_bn_lrelu_conv3x3, after),
    ):
        with on_isa(isa):
            one, two = (
                with_threads(n, function, x, weight, bias, tables, SLOPE, *rest) for n in (1, 2)
            )
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, "x: expected"),
        ({"weight": torch.zeros(6, 5, 3, 3)}, ValueError, "weight: expected"),
        ({"tables": torch.zeros(3, 3, 4)}, ValueError, "tables: expected"),
        ({"negative_slope": float("inf")}, ValueError, "negative_slope: expected"),
        ({"out_weight": torch.zeros(3, 4, 3, 3)}, ValueError, "out_weight: expected"),
        ({"out_bias": torch.zeros(3).double()}, TypeError, "out_bias: expected"),
    ],
)
def test_upsampled_refuses(changes, error, message):
    good = {
        "x": torch.randn(3, 4, 5, 6), "weight": torch.randn(6, 4, 3, 3), "bias": torch.randn(6),
        "tables": torch.randn(3, 3, 6), "negative_slope": SLOPE,
        "out_weight": torch.randn(3, 6, 3, 3), "out_bias": torch.randn(3),
    }  # fmt: skip
    arguments = good | changes
    with pytest.raises(error, match=message):
        ops.upsample_fixed_bn_lrelu_conv3x3(**arguments)
    if not changes.keys() & {"out_weight", "out_bias"}:
        with pytest.raises(error, match=message):
            ops.upsample_fixed_bn_lrelu(*list(arguments.values())[:5])


def test_upsampled_opcheck():
    x, tables = torch.randn(2, 16, 28, 28), torch.randn(3, 2, 16)
    arguments = x, torch.randn(16, 16, 3, 3), torch.randn(16), tables, SLOPE
    torch.library.opcheck(torch.ops.fdda.upsample_fixed_bn_lrelu.default, arguments)
    rest = torch.randn(2, 16, 3, 3), torch.randn(2)
    operator = torch.ops.fdda.upsample_fixed_bn_lrelu_conv3x3.default
    torch.library.opcheck(operator, (*arguments, *rest))

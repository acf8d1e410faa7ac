"""Batch norm on given statistics, alone and with the convolution behind it."""

import pytest
import torch
import torch.nn.functional as F
from backends import ISAS, QUICK, generator, on_isa, with_threads
from hypothesis import given
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import _strips, _upsample_twice

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


@pytest.fixture(params=["plain", "in cache", "in cache, pieces"])
def way(request, monkeypatch):
    """By other products; in the caches, as many images at a time as there are; one by one."""
    monkeypatch.setattr(
        _upsample_twice, "pays", lambda x, *_: request.param != "plain" and x.dtype == torch.float32
    )
    monkeypatch.setattr(_upsample_twice, "PIECE_BYTES", 1 if "pieces" in request.param else 1 << 30)
    monkeypatch.setattr(_upsample_twice, "_PLAIN_PIECE", 2)


def twice_case(shape, middle=16, last=16, outputs=3, seed=5):
    """Arguments of upsample_twice_conv3x3 behind x."""
    g = generator(seed)
    batch, channels = shape[:2]

    def convolution(inputs, outputs):
        weight = torch.randn(outputs, inputs, 3, 3, generator=g) / (3 * inputs**0.5)
        return weight, torch.randn(outputs, generator=g)

    def tables(channels):
        return torch.randn(3, batch, channels, generator=g)

    first = *convolution(channels, middle), tables(middle)
    second = *convolution(middle, last), tables(last)
    return tables(channels), first, second, SLOPE, *convolution(last, outputs)


def apart(x, tables, first, last, slope, *out):
    x = ops.fixed_bn_lrelu(x, tables, 1.0)
    for weight, bias, after in (first, last):
        x = ops.fixed_bn_lrelu(ops.upsample_conv3x3(x, weight, bias), after, slope)
    return ops.conv3x3_few_outputs(x, *out)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("shape", "rest", "dtype"),
    [
        ((3, 16, 25, 23), {}, torch.float32),  # rows of tiles, and edges
        ((3, 16, 5, 130), {}, torch.float32),  # a row of tiles is more than a group
        ((19, 16, 4, 4), {}, torch.float32),  # several images a strip
        ((2, 20, 7, 6), {"middle": 36, "last": 70, "outputs": 1}, torch.float32),
        ((2, 3, 1, 1), {"middle": 2, "last": 5}, torch.float32),
        ((0, 16, 8, 8), {}, torch.float32),
        ((3, 16, 15, 13), {}, torch.bfloat16),
    ],
)
def test_upsampled_twice_equals_its_parts(shape, rest, dtype, isa):
    arguments = torch.randn(shape, generator=generator(4)).to(dtype), *twice_case(shape, **rest)
    with on_isa(isa):
        y, expected = ops.upsample_twice_conv3x3(*arguments), apart(*arguments)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("isa", ISAS)
def test_neither_threads_nor_batch_change_the_image(isa):
    shape = 5, 16, 28, 30
    x, rest = torch.randn(shape, generator=generator(4)), twice_case(shape)

    def rows(part):
        tables, *convolved = (
            (*more, t[:, part].contiguous()) for *more, t in ((rest[0],), *rest[1:3])
        )
        return x[part], *tables, *convolved, *rest[3:]

    with on_isa(isa):
        one, two = (with_threads(n, ops.upsample_twice_conv3x3, x, *rest) for n in (1, 2))
        last = ops.upsample_twice_conv3x3(*rows(slice(2, 5)))
    assert torch.equal(one, two)
    assert torch.equal(one[2:], last)


@pytest.mark.parametrize("isa", ISAS)
def test_changed_weights_are_not_taken_for_those_kept(isa):
    shape = 2, 16, 28, 30
    x, arguments = torch.randn(shape, generator=generator(4)), twice_case(shape)
    with on_isa(isa):
        before = ops.upsample_twice_conv3x3(x, *arguments)
        again = ops.upsample_twice_conv3x3(x, *arguments)
        arguments[2][0].data.neg_()
        after, expected = ops.upsample_twice_conv3x3(x, *arguments), apart(x, *arguments)
    assert torch.equal(before, again)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({0: torch.zeros(3, 4)}, ValueError, "x: expected"),
        ({1: torch.zeros(3, 3, 5)}, ValueError, "tables: expected"),
        ({2: torch.zeros(6, 5, 3, 3)}, ValueError, "first weight: expected"),
        ({3: torch.zeros(6).double()}, TypeError, "first bias: expected"),
        ({4: torch.zeros(3, 3, 4)}, ValueError, "first tables: expected"),
        ({5: torch.zeros(7, 7, 3, 3)}, ValueError, "last weight: expected"),
        ({7: torch.zeros(3, 2, 7)}, ValueError, "last tables: expected"),
        ({8: float("inf")}, ValueError, "negative_slope: expected"),
        ({9: torch.zeros(3, 4, 3, 3)}, ValueError, "out_weight: expected"),
        ({10: torch.zeros(3).double()}, TypeError, "out_bias: expected"),
    ],
)
def test_upsampled_twice_refuses(changes, error, message):
    tables, first, last, *rest = twice_case((3, 4, 5, 6), middle=6, last=7)
    arguments = [torch.randn(3, 4, 5, 6), tables, *first, *last, *rest]
    for place, argument in changes.items():
        arguments[place] = argument
    x, tables, *convolved = arguments
    with pytest.raises(error, match=message):
        ops.upsample_twice_conv3x3(x, tables, convolved[:3], convolved[3:6], *convolved[6:])


def test_upsampled_twice_opcheck():
    shape = 2, 16, 28, 28
    tables, first, last, *rest = twice_case(shape)
    operator = torch.ops.fdda.upsample_twice_conv3x3.default
    torch.library.opcheck(operator, (torch.randn(shape), tables, *first, *last, *rest))

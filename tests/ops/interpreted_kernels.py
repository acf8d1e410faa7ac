"""Numbers of the Triton kernels; test_triton.py runs this file with TRITON_INTERPRET=1."""

import math

import pytest
import torch
from backends import assert_same_bits, generator, limits, norm_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_packed import BITS, LARGEST, SEED, codes, convolutions

from fdda_fast import ops
from fdda_fast.kernels import (
    bn_fake_quantize,
    class_moments,
    conditional_bn,
    convolution,
    fake_quantize,
    minmax,
    packed,
    upsample_conv,
)
from fdda_fast.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["contiguous", "channels_last", "sliced", "2d", "swapped"]
EPS = 1e-5
# Which gradients are asked for: that of x, those of the parameters.
WANTED = st.sampled_from([(True, True), (True, False), (False, True)])
RELUS = st.sampled_from([True, 6.0, False])

CASES = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def lay_out(x, kind):
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "sliced":
        return torch.cat([x, x], 1)[:, ::2]
    return x.transpose(0, 1).contiguous().transpose(0, 1) if kind == "swapped" else x


@st.composite
def tensors(draw, kinds=KINDS):
    """x, now and then empty, or with rows that no vector divides; and the generator it came of."""
    g = generator(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(kinds))
    shape = [draw(st.sampled_from([1, 2, 3, 3, 4, 0])), draw(st.sampled_from([1, 3, 16, 18, 33]))]
    if kind != "2d":
        shape += draw(st.sampled_from([[1, 1], [3, 3], [4, 4], [7, 7], [13, 6], [20, 16]]))
    x = lay_out(2 * torch.randn(shape, generator=g), kind)
    return x.to(draw(st.sampled_from(DTYPES))), g


def gradient_like(x, g):
    return torch.randn(x.shape, generator=g).to(x.dtype)


def in_interpreter(y, x):
    """float32 `y` in x's dtype. The interpreter truncates to bfloat16; compiled code rounds, which
    the offline compilation checks.
    """
    if x.dtype != torch.bfloat16:
        return y.to(x.dtype)
    return (y.contiguous().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def rounded_once(function, x, *args):
    """What `function` gives for x, computed in float32."""
    return in_interpreter(function(x.float(), *args), x)


def assert_near(actual, exact, dtype=torch.float32, terms=None):
    """Within two roundings to dtype, and 8 float32 roundings of the size of the exact result or,
    where that is a sum, of the sum of the sizes of its `terms`.
    """
    assert actual.shape == exact.shape
    size = (exact if terms is None else terms).double().abs()
    size = float(size.max() if terms is None else size.sum()) if size.numel() else 0.0
    rounding = 2 * torch.finfo(dtype).eps
    atol = 1e-6 * size + torch.finfo(dtype).tiny
    torch.testing.assert_close(actual.double(), exact.double(), rtol=rounding, atol=atol)


@st.composite
def affine_cases(draw):
    x, g = draw(tensors())
    axis = draw(st.sampled_from([None, 0, 1]))
    size = () if axis is None else (x.shape[axis],)
    low, high = draw(st.sampled_from([(0, 15), (-8, 7), (0, 1), (-128, 127)]))
    scale = torch.rand(size, generator=g) / (high - low) + 0.01
    zero_point = torch.randint(low, high + 1, size, generator=g).float()
    return x, g, scale, zero_point, low, high, axis


def own_parameters(x, axis, *parameters):
    """Those of every element. Their gradients are what it adds to those of the shared ones."""
    shape = [-1 if d == axis else 1 for d in range(x.dim())]
    return [p.reshape(shape).expand(x.shape).reshape(-1) for p in parameters]


@CASES
@given(case=affine_cases(), wanted=WANTED)
def test_fake_quantize(case, wanted):
    x, g, *parameters = case
    y = fake_quantize.fake_quantize(x, *parameters)
    assert y.stride() == torch.empty_like(x).stride()
    assert_same_bits(y, rounded_once(reference.fake_quantize, x, *parameters))
    grad = gradient_like(x, g)
    scale, zero_point, *codes, axis = parameters
    flat = (grad.reshape(-1), x.reshape(-1), *own_parameters(x, axis, scale, zero_point))
    assert_parameter_gradients(
        fake_quantize.fake_quantize_backward(grad, x, *parameters, *wanted),
        reference.fake_quantize_backward(grad, x, *parameters, *wanted),
        reference.fake_quantize_backward(*flat, *codes, 0, False, True)[1:],
    )


def assert_parameter_gradients(actual, expected, terms):
    """Gradients of x, equal, and of two parameters, sums of `terms`."""
    assert actual[0].stride() == expected[0].stride()
    assert torch.equal(actual[0], expected[0])
    for a, e, t in zip(actual[1:], expected[1:], terms, strict=True):
        assert_near(a, e, terms=t)


@st.composite
def range_cases(draw):
    x, g = draw(tensors())
    axis = draw(st.sampled_from([None, 0, 1]))
    size = () if axis is None else (x.shape[axis],)
    x_min = -torch.rand(size, generator=g) - draw(st.sampled_from([0.0, 1.0]))
    x_max = torch.rand(size, generator=g) + 0.1
    return x, g, x_min, x_max, draw(st.sampled_from([1, 2, 4, 8, 16])), axis


@CASES
@given(case=range_cases(), wanted=WANTED)
def test_fake_quantize_range(case, wanted):
    x, g, *parameters = case
    y = fake_quantize.fake_quantize_range(x, *parameters)
    assert y.stride() == torch.empty_like(x).stride()
    assert_same_bits(y, rounded_once(reference.fake_quantize_range, x, *parameters))
    grad = gradient_like(x, g)
    assert_parameter_gradients(
        fake_quantize.fake_quantize_range_backward(grad, x, *parameters, *wanted),
        reference.fake_quantize_range_backward(grad, x, *parameters, *wanted),
        (grad, grad),
    )


@CASES
@given(case=tensors(), bits=st.sampled_from([1, 2, 4, 8]), axis=st.sampled_from([None, 0, 1]))
def test_fake_quantize_minmax(case, bits, axis):
    x, _ = case
    x[:1] = 0.25
    y = minmax.fake_quantize_minmax(x, bits, axis)
    assert y.stride() == torch.empty_like(x).stride()
    assert_same_bits(y, rounded_once(reference.fake_quantize_minmax, x, bits, axis))


@pytest.mark.parametrize("include_zero", [True, False])
@pytest.mark.parametrize("value", [1.0, math.nan, -math.inf])
def test_observe_range(include_zero, value):
    x = 2 + torch.rand(3, 50, 60, generator=generator(0))
    x[2, 40, 3] = value
    arguments = (x, torch.tensor(-1.0), torch.tensor([1.0]), 0.9, include_zero)
    expected = reference.observe_range(*arguments)
    for a, e in zip(minmax.observe_range(*arguments), expected, strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("length", [9, 256, 257, 3000, 5000, 16384, 20001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_minmax_of_rows(length, dtype):
    """Every row kernel, and what a NaN, an infinity or a constant makes of a row."""
    x = torch.randn(5, length, generator=generator(length)).to(dtype)
    x[1, length // 2], x[2, -1], x[3] = math.nan, math.inf, 1234.0
    y = minmax.fake_quantize_minmax(x, 4, 0)
    assert_same_bits(y, rounded_once(reference.fake_quantize_minmax, x, 4, 0))
    for values in (x[0], x[1], x[2]):
        y = minmax.fake_quantize_minmax(values, 4)
        assert_same_bits(y, rounded_once(reference.fake_quantize_minmax, values, 4))


@st.composite
def moments_cases(draw, kinds=KINDS):
    x, g = draw(tensors(kinds))
    x = (x + draw(st.sampled_from([0.0, 100.0]))).to(x.dtype)
    num_classes = draw(st.integers(1, 4))
    labels = torch.randint(0, num_classes, x.shape[:1], generator=g)
    return x, g, labels, num_classes


def assert_moments(actual, x, labels, num_classes):
    expected = reference.class_moments(x, labels, num_classes)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actual[1], expected[1], rtol=2e-6, atol=1e-6)
    assert torch.equal(actual[2], expected[2])


@CASES
@given(case=moments_cases())
def test_class_moments(case):
    x, g, *classes = case
    moments = class_moments.class_moments(x, *classes)
    assert_moments(moments, x, *classes)
    arguments = (*torch.randn(2, *moments[0].shape, generator=g), x, classes[0], *moments[::2])
    grad_x = class_moments.class_moments_backward(*arguments)
    expected = reference.class_moments_backward(*arguments)
    assert grad_x.stride() == expected.stride()
    assert_near(grad_x, expected, x.dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_class_moments_of_rows_longer_than_a_tile(layout):
    x = torch.randn(2, 2, 50, 47, generator=generator(0)) + 1000
    x, labels = x.contiguous(memory_format=layout), torch.tensor([0, 0])
    mean, var, _ = class_moments.class_moments(x, labels, 1)
    mean64, var64, _ = reference.class_moments(x, labels, 1)
    torch.testing.assert_close(mean, mean64, rtol=2e-7, atol=0)
    torch.testing.assert_close(var, var64, rtol=2e-6, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_programs_that_loop(layout, monkeypatch):
    """More tiles than programs: every program takes several, the last one perhaps fewer."""
    for module in (class_moments, fake_quantize, minmax, conditional_bn, bn_fake_quantize):
        monkeypatch.setattr(module, "PROGRAMS", 6)
    g = generator(0)
    x = torch.randn(1, 3, 97, 75, generator=g).contiguous(memory_format=layout)
    labels = torch.tensor([0])
    assert_moments(class_moments.class_moments(x, labels, 1), x, labels, 1)
    for axis in (None, 1):
        y = minmax.fake_quantize_minmax(torch.cat([x, x]), 4, axis)
        assert_same_bits(y, reference.fake_quantize_minmax(torch.cat([x, x]), 4, axis))
    low, high, grad = torch.tensor(-1.0), torch.tensor(0.8), gradient_like(x, g)
    arguments = (grad, x, low, high, 4, None, False, True)
    assert_parameter_gradients(
        fake_quantize.fake_quantize_range_backward(*arguments),
        reference.fake_quantize_range_backward(*arguments),
        (grad, grad),
    )


@CASES
@given(
    case=moments_cases(),
    relu=RELUS,
    with_residual=st.booleans(),
)
def test_bn_relu_class_moments(case, relu, with_residual):
    x, g, *classes = case
    norm = (*norm_tensors(x.shape[1], g), EPS)
    residual = gradient_like(x, g) if with_residual else None
    arguments = (x, *norm, *classes, *limits(relu), residual)
    y, *moments = class_moments.bn_relu_class_moments(*arguments)
    assert y.stride() == torch.empty_like(x).stride()
    exact = reference.bn_relu_class_moments(
        x.float(), *norm, *classes, *limits(relu), None if residual is None else residual.float()
    )[0]
    assert_same_bits(y + 0, in_interpreter(exact, x) + 0)
    assert_moments(moments, x, *classes)
    mean, _, count = moments
    gradients = (gradient_like(x, g), *torch.randn(2, *mean.shape, generator=g))
    arguments = (*gradients, x, *norm, classes[0], mean, count, *limits(relu), residual)
    actual = class_moments.bn_relu_class_moments_backward(*arguments)
    expected = reference.bn_relu_class_moments_backward(*arguments)
    for a, e in zip(actual, expected, strict=True):
        assert a.stride() == e.stride()
        assert_near(a, e, x.dtype)


@CASES
@given(case=tensors(), classes=st.integers(1, 3), slope=st.sampled_from([0.2, 1.0]))
def test_conditional_bn_lrelu(case, classes, slope):
    x, g = case
    batch, channels = x.shape[:2]
    groups = [batch] if batch < 4 else [1, 3] if x.dim() == 4 and x[0, 0].numel() > 1 else [2, 2]
    labels = torch.randint(0, classes, (batch,), generator=g)
    weight, bias = torch.randn(2, classes, channels, generator=g)
    arguments = (x, labels, weight, bias, groups, EPS, slope)
    y, mean, var = conditional_bn.conditional_bn_lrelu(*arguments)
    assert y.stride() == torch.empty_like(x).stride()
    group = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
    assert_moments((mean, var, torch.tensor(groups)), x, group, len(groups))
    assert_near(y, reference.conditional_bn_lrelu(*arguments)[0], x.dtype)
    # No gradient where rounding may decide between the slopes.
    linear = reference.conditional_bn_lrelu(x.float(), *arguments[1:-1], 1.0)[0]
    grad_y = gradient_like(x, g).masked_fill(linear.abs() < 1e-4, 0.0)
    arguments = (grad_y, *arguments[:4], mean, var, *arguments[4:])
    actual = conditional_bn.conditional_bn_lrelu_backward(*arguments)
    expected = reference.conditional_bn_lrelu_backward(*arguments)
    assert actual[0].stride() == expected[0].stride()
    # The three terms of the gradient of x may cancel.
    size = max(grad_y.abs().flatten().tolist(), default=0.0)
    assert_near(
        actual[0], expected[0], x.dtype, 3 * size * weight.abs().max() * (var.min() + EPS).rsqrt()
    )
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_near(a, e, terms=3 * grad_y)


@CASES
@given(
    case=tensors(),
    bits=st.sampled_from([2, 4, 8]),
    relu=RELUS,
    with_residual=st.booleans(),
    clipped=st.booleans(),
    ends=st.booleans(),
)
def test_bn_relu_fake_quantize(case, bits, relu, with_residual, clipped, ends):
    x, g = case
    norm = norm_tensors(x.shape[1], g)
    residual = gradient_like(x, g) if with_residual else None
    settings = (EPS, torch.tensor(-0.3), torch.tensor(1.2), bits, *limits(relu))
    y = bn_fake_quantize.bn_relu_fake_quantize(x, *norm, *settings, residual, clipped)
    assert y.stride() == torch.empty_like(x).stride()
    added = None if residual is None else residual.float()
    exact = reference.bn_relu_fake_quantize(x.float(), *norm, *settings, added)
    assert_same_bits(y, in_interpreter(exact, x))

    grad = gradient_like(x, g)
    arguments = (grad, x, *norm, *settings, residual, clipped, ends)
    actual = bn_fake_quantize.bn_relu_fake_quantize_backward(*arguments)
    expected = reference.bn_relu_fake_quantize_backward(*arguments)
    flat = [t if t is None else t.reshape(1, -1) for t in (grad, x, residual)]
    own = own_parameters(x, 1, *norm)
    terms = reference.bn_relu_fake_quantize_backward(
        *flat[:2], *own, *settings, flat[2], clipped, False
    )
    assert_near(actual[0], expected[0], x.dtype)
    for a, e in zip(actual[:2], expected[:2], strict=True):
        assert a.stride() == e.stride()
    assert_same_bits(actual[1] + 0, expected[1] + 0)
    for a, e, t in zip(actual[2:], expected[2:], (*terms[2:4], grad, grad), strict=True):
        assert_near(a, e, terms=t)


@settings(CASES, max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(
        st.integers(0, 2), st.sampled_from([1, 6, 16, 70]), st.integers(1, 7), st.integers(1, 7)
    ),
    filters=st.sampled_from([1, 3, 16, 66]),
    kind=st.sampled_from(["contiguous", "channels_last", "sliced"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_upsample_conv3x3(seed, shape, filters, kind, dtype):
    g = generator(seed)
    x = lay_out(torch.randn(shape, generator=g), kind).to(dtype)
    weight = torch.randn(filters, shape[1], 3, 3, generator=g) / (9 * shape[1]) ** 0.5
    bias = torch.randn(filters, generator=g)
    y = upsample_conv.upsample_conv3x3(x, weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = reference.upsample_conv3x3(x.double(), weight, bias)
    # In half precision the sums of taps are rounded, too: by that much more of the largest term.
    rounding = torch.finfo(dtype).eps
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=8 * rounding)
    grad_y = gradient_like(exact, g).to(dtype)
    actual = upsample_conv.upsample_conv3x3_backward(grad_y, x, weight)
    expected = reference.upsample_conv3x3_backward(grad_y, x.double(), weight)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        size = 1 + float(e.abs().max()) if e.numel() else 1.0
        unit = rounding if a.dtype == dtype else torch.finfo(torch.float32).eps
        torch.testing.assert_close(a.double(), e.double(), rtol=rounding, atol=8 * unit * size)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv3x3_few_outputs(batch, dtype):
    g = generator(0)
    x = torch.randn(batch, 16, 9, 7, generator=g).to(dtype)
    weight = torch.randn(3, 16, 3, 3, generator=g) / 12
    bias = torch.randn(3, generator=g)
    y = convolution.conv3x3_few_outputs(x, weight, bias)
    grad_y = gradient_like(y, g)
    actual = (y, *convolution.conv3x3_few_outputs_backward(grad_y, x, weight))
    expected = (
        reference.conv3x3_few_outputs(x, weight, bias),
        *reference.conv3x3_few_outputs_backward(grad_y, x, weight),
    )
    rounding = torch.finfo(dtype).eps
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.stride() == e.stride()
        torch.testing.assert_close(a, e, rtol=4 * rounding, atol=16 * rounding)


def assert_packed(operator, args):
    expected = getattr(reference, operator)(*args)
    actual = getattr(packed, operator)(*args)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)


@settings(CASES, max_examples=60)
@given(args=convolutions())
def test_packed_conv2d(args):
    assert_packed("packed_conv2d", args)


@pytest.mark.parametrize("tile", [packed.LARGE, packed.SMALL, packed.THIN])
@pytest.mark.parametrize("groups", [1, 2])
def test_packed_conv2d_in_every_tile(tile, groups, monkeypatch):
    """More pixels, filters and inputs than a tile has, and not a multiple of them."""
    monkeypatch.setattr(packed, "_tile", lambda *_: tile)
    g = generator(groups)
    for channels, size in ((32, (11, 13)), (160, (5, 27))):
        x = torch.randint(0, 256, (1, *size, channels), generator=g, dtype=torch.uint8)
        weight = reference.pack_weight(codes((134, 9 * channels // groups), 8, g, True), 8)
        args = (x, weight, 8, 134, [3, 3], [1, 1], [2, 0], [1, 1], groups, 130)
        args = (*args, torch.arange(134) - 67, torch.rand(134, generator=g), torch.zeros(134))
        assert_packed("packed_conv2d", args)


def test_packed_conv2d_of_huge_strides_and_padding():
    g = generator(0)
    for channels, stride, padding in ((8, 2**29, LARGEST), (64, LARGEST, LARGEST), (64, 1, 1)):
        x = torch.randint(0, 256, (1, 9, 2, channels), generator=g, dtype=torch.uint8)
        weight = reference.pack_weight(codes((20, 9 * channels), 4, g), 4)
        args = (x, weight, 4, 20, [3, 3], [stride, stride], [padding, 1], [1, 1], 1, 3)
        args = (*args, torch.zeros(20, dtype=torch.int64), torch.ones(20), torch.zeros(20))
        assert torch.equal(packed.packed_conv2d(*args), ops.packed_conv2d(*args))


def test_packed_linear_of_a_nan_and_extreme_sums(monkeypatch):
    """Codes of NaN and infinity; sums at the end of int32, in few steps."""
    monkeypatch.setattr(packed, "_tile", lambda *_: packed.Tile(16, 16, 4096, 128))
    monkeypatch.setattr(packed, "UNPACK_DEPTH", 4096)
    depth = 65793
    weight = reference.pack_weight(torch.full((3, depth), -128, dtype=torch.int8), 8)
    x = torch.full((2, depth), 255, dtype=torch.uint8)
    args = (x, weight, 8, 3, 0, torch.tensor([0, 1, 2**33]))
    multiplier, bias = torch.tensor([1.0, math.nan, math.inf]), torch.zeros(3)
    for output_range in (None, (2, 15)):
        expected = reference.packed_linear(*args, multiplier, bias, None, 0.0, output_range)
        actual = packed.packed_linear(*args, multiplier, bias, None, 0.0, output_range)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.nan_to_num(7), expected.nan_to_num(7))


@st.composite
def linear_layers(draw):
    """uint8, or int32 with sums that need all 32 bits; now and then no rows, or no inputs."""
    g = generator(draw(SEED))
    rows, features = draw(st.integers(0, 37)), draw(st.integers(1, 70))
    depth, bits = draw(st.sampled_from([0, 1, 16, 30, 64, 70, 200])), draw(BITS)
    if draw(st.booleans()):
        x = torch.randint(0, 256, (rows, depth), generator=g, dtype=torch.uint8)
        zero_point = draw(st.integers(0, 255))
    else:
        low, high = draw(st.sampled_from([(0, 4000), (-(2**31), 2**31 - 1)]))
        x = torch.randint(low, high, (rows, depth), generator=g, dtype=torch.int32)
        zero_point = draw(st.sampled_from([0, 12345, -(2**31), 2**31 - 1]))
    if draw(st.booleans()):
        x = x.T.contiguous().T
    weight = reference.pack_weight(codes((features, depth), bits, g), bits)
    limit = draw(st.sampled_from([1, 200]))
    offset = torch.randint(-limit, limit, (features,), generator=g)
    multiplier, bias = torch.randn(2, features, generator=g)
    residual = (torch.rand(rows, features, generator=g) * 255).to(torch.uint8)
    residual = draw(st.sampled_from([None, residual, residual.float()]))
    args = (x, weight, bits, features, zero_point, offset, multiplier, bias, residual, 0.3)
    return (*args, draw(st.sampled_from([None, (0, 255), (3, 11)])))


@settings(CASES, max_examples=60)
@given(args=linear_layers())
def test_packed_linear(args):
    assert_packed("packed_linear", args)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_padding_codes_weigh_nothing(dtype):
    """A file may have others than 0 there."""
    g = generator(0)
    for depth, features in ((5, 20), (66, 33)):
        shape = (-(-features // 16), -(-depth // 4), 4, 8)
        weight = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
        x = torch.randint(0, 256, (3, depth), generator=g).to(dtype)
        args = (x, weight, 4, features, 9, torch.full((features,), 300))
        assert_packed("packed_linear", (*args, torch.ones(features), torch.zeros(features)))


@pytest.mark.parametrize("bits", range(2, 9))
def test_unpack_weight(bits):
    for rows, columns in ((0, 3), (1, 1), (17, 5), (40, 130)):
        q = codes((rows, columns), bits, generator(bits))
        assert_packed("unpack_weight", (reference.pack_weight(q, bits), bits, rows, columns))

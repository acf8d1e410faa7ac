"""Numbers of the Triton kernels; test_triton.py runs this file with TRITON_INTERPRET=1."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import assert_same_bits, generator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdda_fast.kernels import (
    bn_fake_quantize,
    class_moments,
    conditional_bn,
    fake_quantize,
    minmax,
    upsample_conv,
)
from fdda_fast.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["contiguous", "channels_last", "sliced", "2d", "swapped"]
EPS = 1e-5

CASES = settings(
    max_examples=25,
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


@CASES
@given(case=affine_cases())
def test_fake_quantize(case):
    x, g, *parameters = case
    y = fake_quantize.fake_quantize(x, *parameters)
    assert y.stride() == torch.empty_like(x).stride()
    assert_same_bits(y, rounded_once(reference.fake_quantize, x, *parameters))
    grad = gradient_like(x, g)
    grad_x = fake_quantize.fake_quantize_backward(grad, x, *parameters)
    assert grad_x.stride() == torch.empty_like(x).stride()
    assert_same_bits(grad_x, reference.fake_quantize_backward(grad, x, *parameters))


def sum_along(t, axis, shape):
    dims = [d for d in range(t.dim()) if d != axis]
    return t.double().sum(dims).reshape(shape) if dims else t.double()


@CASES
@given(case=affine_cases())
def test_gradients_of_scale_and_zero_point(case):
    """LSQ's: dy/ds = (q - z) - x / s and dy/dz = 0 inside; q - z and -s where clipped."""
    x, g, scale, zero_point, low, high, axis = case
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    s, z = scale.reshape(shape), zero_point.reshape(shape)
    steps = x.float() / s
    code = torch.round(steps + z)
    inside = (code >= low) & (code <= high)
    shifted = code.clamp(low, high) - z
    grad = gradient_like(x, g)
    arguments = (grad, x, *case[2:])
    clipped = fake_quantize.fake_quantize_backward(*arguments)
    for write in (True, False):
        grad_x, grad_scale, grad_zero = fake_quantize.fake_quantize_gradients(
            *arguments, write, True
        )
        assert torch.equal(grad_x, clipped if write else x.new_empty(0))
        for actual, slope in (
            (grad_scale, shifted - steps * inside),
            (grad_zero, -(s * ~inside).expand(x.shape)),
        ):
            terms = grad.double() * slope.double()
            assert_near(actual, sum_along(terms, axis, scale.shape), terms=terms)


@st.composite
def range_cases(draw):
    x, g = draw(tensors())
    axis = draw(st.sampled_from([None, 0, 1]))
    size = () if axis is None else (x.shape[axis],)
    x_min = -torch.rand(size, generator=g) - draw(st.sampled_from([0.0, 1.0]))
    x_max = torch.rand(size, generator=g) + 0.1
    return x, g, x_min, x_max, draw(st.sampled_from([1, 2, 4, 8, 16])), axis


def end_gradients(x, grad, x_min, x_max, bits, axis=None):
    """The formula of `_LearnedRange`, in float64 on the float32 quantiser's result."""
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    low, high = x_min.reshape(shape), x_max.reshape(shape)
    x = x.float()
    error = reference.fake_quantize_range(x, x_min, x_max, bits, axis).double() - x
    below, above, grad = x < low, x > high, grad.double()
    stretch = grad * ~(below | above) * error / (high - low).clamp(min=1e-8).double()
    terms = (grad * below - stretch, grad * above + stretch)
    return [sum_along(t, axis, x_min.shape) for t in terms], ~(below | above)


@CASES
@given(case=range_cases())
def test_fake_quantize_range(case):
    x, g, *parameters = case
    y = fake_quantize.fake_quantize_range(x, *parameters)
    assert y.stride() == torch.empty_like(x).stride()
    assert_same_bits(y, rounded_once(reference.fake_quantize_range, x, *parameters))
    grad = gradient_like(x, g)
    exact, inside = end_gradients(x, grad, *parameters)
    for clipped, ends in ((True, True), (True, False), (False, True)):
        grad_x, *of_ends = fake_quantize.fake_quantize_range_backward(
            grad, x, *parameters, clipped, ends
        )
        assert torch.equal(grad_x, torch.where(inside, grad, 0.0) if clipped else x.new_empty(0))
        for actual, expected in zip(of_ends, exact, strict=True):
            if ends:
                assert_near(actual, expected, terms=grad)
            else:
                assert not actual.numel()


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
    old = torch.tensor(-1.0), torch.tensor(1.0)
    new = minmax.observe_range(x, *old, 0.9, include_zero)
    low, high = (x.min(), x.max()) if math.isfinite(value) else torch.full((2,), math.nan)
    if include_zero:
        low = low.clamp(max=0)
    for actual, o, t in zip(new, old, (low, high), strict=True):
        torch.testing.assert_close(actual, 0.9 * o + 0.1 * t, equal_nan=True)


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
    exact, _ = end_gradients(x, grad, low, high, 4)
    actual = fake_quantize.fake_quantize_range_backward(grad, x, low, high, 4, None, False, True)
    for a, e in zip(actual[1:], exact, strict=True):
        assert_near(a, e, terms=grad)


def norm_tensors(channels, g):
    weight, bias, mean = torch.randn(3, channels, generator=g)
    return weight, bias, mean, torch.rand(channels, generator=g) + 0.05


@CASES
@given(
    case=moments_cases(),
    limits=st.sampled_from([(0.0, math.inf), (0.0, 6.0), (-math.inf, math.inf)]),
    with_residual=st.booleans(),
)
def test_bn_relu_class_moments(case, limits, with_residual):
    x, g, *classes = case
    norm = (*norm_tensors(x.shape[1], g), EPS)
    residual = gradient_like(x, g) if with_residual else None
    arguments = (x, *norm, *classes, *limits, residual)
    y, *moments = class_moments.bn_relu_class_moments(*arguments)
    assert y.stride() == torch.empty_like(x).stride()
    exact = reference.bn_relu_class_moments(
        x.float(), *norm, *classes, *limits, None if residual is None else residual.float()
    )[0]
    assert_same_bits(y + 0, in_interpreter(exact, x) + 0)
    assert_moments(moments, x, *classes)
    mean, _, count = moments
    gradients = (gradient_like(x, g), *torch.randn(2, *mean.shape, generator=g))
    arguments = (*gradients, x, *norm, classes[0], mean, count, *limits, residual)
    actual = class_moments.bn_relu_class_moments_backward(*arguments)
    expected = reference.bn_relu_class_moments_backward(*arguments)
    for a, e in zip(actual, expected, strict=True):
        assert a.stride() == e.stride()
        assert_near(a, e, x.dtype)


def conditional_reference(x, labels, weight, bias, groups, eps, negative_slope):
    """Plain PyTorch, differentiable: batch norm of each group, then scale and shift by class."""
    shape = (-1, x.shape[1], *[1] * (x.dim() - 2))
    parts = [F.batch_norm(p, None, None, training=True, eps=eps) for p in x.split(groups)]
    v = weight[labels].view(shape) * torch.cat(parts) + bias[labels].view(shape)
    return F.leaky_relu(v, negative_slope)


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
    per_sample = x[0, 0].numel() if x.numel() else 0
    if min(groups) * per_sample < 2:  # one value, which batch norm refuses to normalise
        return
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = conditional_reference(leaves[0], labels, *leaves[1:], groups, EPS, slope)
    assert_near(y, exact.detach(), x.dtype)
    # No gradient where rounding may decide between the slopes.
    grad_y = gradient_like(x, g).masked_fill(exact.abs() < 1e-4, 0.0)
    actual = conditional_bn.conditional_bn_lrelu_backward(
        grad_y, x, labels, weight, bias, mean, var, groups, EPS, slope
    )
    assert actual[0].stride() == torch.empty_like(x).stride()
    expected = torch.autograd.grad(exact, leaves, grad_y.double())
    # The three terms of the gradient of x may cancel.
    size = weight.abs().max() * grad_y.abs().max() * (var.min() + EPS).rsqrt()
    assert_near(actual[0], expected[0], x.dtype, 3 * size)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_near(a, e, terms=3 * grad_y)


@CASES
@given(
    case=tensors(),
    bits=st.sampled_from([2, 4, 8]),
    limits=st.sampled_from([(0.0, math.inf), (0.0, 6.0), (-math.inf, math.inf)]),
    with_residual=st.booleans(),
    clipped=st.booleans(),
    ends=st.booleans(),
)
def test_bn_relu_fake_quantize(case, bits, limits, with_residual, clipped, ends):
    x, g = case
    norm = (*norm_tensors(x.shape[1], g), EPS)
    residual = gradient_like(x, g) if with_residual else None
    x_min, x_max = torch.tensor(-0.3), torch.tensor(1.2)
    settings = (x_min, x_max, bits, *limits, residual, clipped)
    y = bn_fake_quantize.bn_relu_fake_quantize(x, *norm, *settings)
    assert y.stride() == torch.empty_like(x).stride()
    added = None if residual is None else residual.float()
    no_labels = torch.zeros(x.shape[0], dtype=torch.int64)
    read = (x.float(), *norm, no_labels, 1)
    kept = reference.bn_relu_class_moments(*read, *limits, added)[0]
    exact = reference.fake_quantize_range(kept, x_min, x_max, bits)
    assert_same_bits(y, in_interpreter(exact, x))

    grad = gradient_like(x, g)
    actual = bn_fake_quantize.bn_relu_fake_quantize_backward(grad, x, *norm, *settings, ends)
    v = reference.bn_relu_class_moments(*read, -math.inf, math.inf, added)[0]
    passes = (v > limits[0]) & (v < limits[1])
    if clipped:
        passes &= (kept >= x_min) & (kept <= x_max)
    through = grad.double() * passes
    weight, _, mean, var, _ = norm
    shape = (-1, *[1] * (x.dim() - 2))
    inverse = (var.double() + EPS).rsqrt().view(shape)
    normalized = (x.double() - mean.double().view(shape)) * inverse
    assert_near(actual[0], through * inverse * weight.double().view(shape), x.dtype)
    if residual is None:
        assert not actual[1].numel()
    else:
        assert_same_bits(actual[1] + 0, through.to(x.dtype) + 0)
    for a, terms in ((actual[2], through * normalized), (actual[3], through)):
        assert_near(a, sum_along(terms, 1, weight.shape), terms=terms)
    exact, _ = end_gradients(kept, grad, x_min, x_max, bits)
    for a, e in zip(actual[4:], exact, strict=True):
        if ends:
            assert_near(a, e, terms=grad)
        else:
            assert not a.numel()


@CASES
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
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    big = leaves[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    exact = F.conv2d(big, *leaves[1:], padding=1)
    # In half precision the sums of taps are rounded, too: by that much more of the largest term.
    rounding = torch.finfo(dtype).eps
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=8 * rounding)
    grad_y = gradient_like(exact, g).to(dtype)
    actual = upsample_conv.upsample_conv3x3_backward(grad_y, x, weight)
    expected = torch.autograd.grad(exact, leaves, grad_y.double())
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        size = 1 + float(e.abs().max()) if e.numel() else 1.0
        unit = rounding if a.dtype == dtype else torch.finfo(torch.float32).eps
        torch.testing.assert_close(a.double(), e, rtol=rounding, atol=8 * unit * size)

import numpy as np
import pytest
import torch
from backends import (
    ISAS,
    QUICK,
    assert_same_bits,
    assert_threads_agree,
    generator,
    on_isa,
    with_threads,
)
from hypothesis import given
from hypothesis import strategies as st

from fdda_fast import ops
from fdda_fast.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numpy_range(x, x_min, x_max, bits):
    """The paper's quantiser in numpy float32; ranges broadcast against x."""
    f = np.float32
    x_min, x_max = f(x_min), f(x_max)
    scale = f(2**bits - 1) / np.maximum(x_max - x_min, f(1e-8))
    zero_point = np.rint(scale * x_min) + f(2 ** (bits - 1))
    q = np.clip(np.rint(scale * x - zero_point), f(-(2 ** (bits - 1))), f(2 ** (bits - 1) - 1))
    return (q + zero_point) / scale


@st.composite
def tensors(draw):
    g = generator(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    if draw(st.booleans()):
        shape[-1] = draw(st.integers(60, 200))
    x = torch.randn(shape, generator=g) * 10.0 ** draw(st.integers(-4, 4))
    kind = draw(st.sampled_from(["normal", "positive", "negative", "constant", "zero", "sparse"]))
    if kind == "positive":
        x = x.abs()
    elif kind == "negative":
        x = -x.abs()
    elif kind == "constant":
        x = torch.full(shape, float(x.flatten()[0]))
    elif kind == "zero":
        x = torch.zeros(shape)
    elif kind == "sparse":
        x = x * (torch.rand(shape[0], *[1] * (len(shape) - 1), generator=g) < 0.5)
    x = x.to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
    if layout == "transposed":
        x = x.transpose(0, -1)
    elif layout == "sliced":
        x = torch.cat([x, x], -1)[..., ::2]
    elif layout == "expanded":
        x = x.unsqueeze(0).expand(3, *x.shape)
    axis = draw(st.sampled_from([None, *range(-x.dim(), x.dim())]))
    return x, axis


def ranges(x, axis):
    dims = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
    x = x.float()
    return (x.amin(dims), x.amax(dims)) if dims else (x.clone(), x.clone())


@QUICK
@given(case=tensors(), bits=st.integers(1, 16))
def test_range_and_minmax_equal_the_reference_on_every_isa(case, bits):
    x, axis = case
    x_min, x_max = ranges(x, axis)
    positive = None if axis is None else axis % x.dim()
    expected = reference.fake_quantize_range(x, x_min, x_max, bits, positive)
    for isa in ISAS:
        with on_isa(isa):
            for y in (
                ops.fake_quantize_range(x, x_min, x_max, bits, axis),
                ops.fake_quantize_minmax(x, bits, axis),
            ):
                assert y.stride() == torch.empty_like(x).stride()
                assert_same_bits(y, expected)


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_range_against_numpy(isa, bits):
    g = generator(bits)
    x = torch.randn(6, 301, generator=g) * 3
    x[1] = x[1].abs()
    x[2] = -x[2].abs()
    x[3] = 0.7
    x[4] = 0.0
    x_min, x_max = x.amin(1), x.amax(1)
    x_max[5] = 1.0  # values beyond the range
    expected = numpy_range(x.numpy(), x_min.numpy()[:, None], x_max.numpy()[:, None], bits)
    whole = numpy_range(x.numpy(), x.min().numpy(), x.max().numpy(), bits)
    if isa == "reference":
        y = reference.fake_quantize_range(x, x_min, x_max, bits, 0)
        z = reference.fake_quantize_minmax(x, bits)
    else:
        with on_isa(isa):
            y = ops.fake_quantize_range(x, x_min, x_max, bits, 0)
            z = ops.fake_quantize_minmax(x, bits)
    np.testing.assert_array_equal(y.numpy().view(np.int32), expected.view(np.int32))
    np.testing.assert_array_equal(z.numpy().view(np.int32), whole.view(np.int32))


@QUICK
@given(
    case=tensors(),
    quant=st.sampled_from([(0, 255), (-128, 127), (0, 15), (-8, 7), (-5, 1000)]),
    seed=st.integers(0, 1000),
)
def test_torch_convention_and_its_gradients(case, quant, seed):
    x, axis = case
    g = generator(seed)
    positive = None if axis is None else axis % x.dim()
    size = () if axis is None else (x.shape[positive],)
    spread = float(x.float().abs().max()) / 8 + 1e-6
    scale = (torch.rand(size, generator=g) + 0.1) * spread
    zero_point = torch.randint(-3, 10, size, generator=g).float()
    grad = torch.randn(x.shape, generator=g).to(x.dtype)
    expected = reference.fake_quantize(x, scale, zero_point, *quant, positive)
    masked = reference.fake_quantize_backward(grad, x, scale, zero_point, *quant, positive)[0]
    for isa in ISAS:
        with on_isa(isa):
            for ste, expected_grad in (("identity", grad), ("clipped", masked)):
                leaf = x.detach().requires_grad_()
                y = ops.fake_quantize(leaf, scale, zero_point, *quant, axis, ste)
                assert_same_bits(y.detach(), expected)
                (actual,) = torch.autograd.grad(y, leaf, grad)
                assert torch.equal(actual, expected_grad), (isa, ste)


def test_clipped_gradient_follows_the_rounded_code():
    x = torch.tensor([-2.6, -2.4, -0.5, 0.5, 3.4, 3.6, float("nan")], requires_grad=True)
    y = ops.fake_quantize(x, torch.tensor(1.0), torch.tensor(2.0), 0, 5, ste="clipped")
    assert torch.equal(y[:-1], torch.tensor([-2.0, -2.0, 0.0, 0.0, 3.0, 3.0]))
    y[:-1].sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("isa", ISAS)
def test_conversions_of_half_precision_round_to_nearest_even(isa):
    """Every finite value as input; outputs in steps that no half-precision format holds."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    with on_isa(isa):
        for dtype in (torch.bfloat16, torch.float16):
            x = every.view(dtype)
            x = x[x.isfinite()]
            for top in (2.0**-16, 1e-3, 1.0, 60000.0, 1e30):
                top = torch.tensor(top)
                assert_same_bits(
                    ops.fake_quantize_range(x, -top, top, 11),
                    reference.fake_quantize_range(x, -top, top, 11),
                )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_not_hidden(isa, special):
    x = torch.randn(3, 100, generator=generator(0))
    x[1, 70] = special
    with on_isa(isa):
        y = ops.fake_quantize_minmax(x, 4, axis=0)
        assert_same_bits(y, reference.fake_quantize_minmax(x, 4, 0))
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()
        assert ops.fake_quantize_minmax(x, 4).isnan().all()
        assert ops.fake_quantize_minmax(x.T.contiguous().T, 4, axis=0)[1].isnan().all()


def test_threads_do_not_change_the_result():
    x = torch.randn(8, 32, 40, 40, generator=generator(0))
    assert_threads_agree(
        lambda: (ops.fake_quantize_minmax(x, 4), ops.fake_quantize_minmax(x, 4, 1))
    )


def assert_small_error(found, exact, plain, magnitude):
    """Twice plain float32's error at most, with room for one rounding of what was added up."""
    error = (found.double() - exact).abs()
    limit = 2 * (plain.double() - exact).abs() + 2.0**-21 * magnitude
    assert (error <= limit).all(), (error / limit).max()


def channel_sum(addends, axis):
    dims = [d for d in range(addends.dim()) if d != axis]
    return addends.sum(dims) if dims else addends


@QUICK
@given(
    case=tensors(),
    quant=st.sampled_from([(0, 255), (-8, 7), (0, 3)]),
    clipped=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gradients_of_scale_and_zero_point(case, quant, clipped, seed):
    """LSQ's, written out: in float64 from the same codes, and in float32."""
    x, axis = case
    g = generator(seed)
    positive = None if axis is None else axis % x.dim()
    size = () if axis is None else (x.shape[positive],)
    shape = [-1 if d == positive else 1 for d in range(x.dim())]
    scale = (torch.rand(size, generator=g) + 0.1) * (float(x.float().abs().max()) / 8 + 1e-6)
    zero_point = torch.randint(-3, 10, size, generator=g).float()
    grad = torch.randn(x.shape, generator=g).to(x.dtype)
    s, z = scale.view(shape), zero_point.view(shape)
    position = x.float() / s + z
    q = position.round()
    inside = (q >= quant[0]) & (q <= quant[1])
    q = q.clamp(*quant)
    slope = torch.where(inside, q - position, q - z)
    offset = torch.where(inside, torch.zeros(()), -s.expand(x.shape))
    for isa in ISAS:
        with on_isa(isa):
            leaves = [t.detach().requires_grad_() for t in (x, scale, zero_point)]
            ste = "clipped" if clipped else "identity"
            y = ops.fake_quantize(*leaves, *quant, axis, ste)
            found = torch.autograd.grad(y, leaves, grad)
        assert torch.equal(found[0], torch.where(inside, grad, 0.0) if clipped else grad)
        for actual, factor in zip(found[1:], (slope, offset), strict=True):
            addends = grad.double() * factor.double()
            exact = channel_sum(addends, positive)
            plain = channel_sum(grad.float() * factor, positive)
            assert actual.shape == torch.Size(size)
            assert_small_error(actual, exact, plain, channel_sum(addends.abs(), positive))


@QUICK
@given(case=tensors(), bits=st.integers(2, 8), clipped=st.booleans(), seed=st.integers(0, 1000))
def test_gradients_of_the_range(case, bits, clipped, seed):
    """Clipped values give theirs to the end that clips them, others their rounding error."""
    x, axis = case
    g = generator(seed)
    positive = None if axis is None else axis % x.dim()
    shape = [-1 if d == positive else 1 for d in range(x.dim())]
    x_min, x_max = ranges(x, axis)
    x_min, x_max = 0.6 * x_min, 0.7 * x_max + 1e-3
    low, high = x_min.view(shape), x_max.view(shape)
    grad = torch.randn(x.shape, generator=g).to(x.dtype)
    below, above = x.float() < low, x.float() > high
    y = reference.fake_quantize_range(x.float(), x_min, x_max, bits, positive)
    error = torch.where(below | above, 0.0, grad.double() * (y.double() - x.double()))
    stretch = error / (high - low).clamp(min=1e-8)
    ends = (
        torch.where(below, grad.double(), -stretch),
        torch.where(above, grad.double(), stretch),
    )
    # A position of up to 2^bits codes is rounded before its distance to the code is taken.
    unit = 2.0**bits * grad.double().abs() / (2**bits - 1) + grad.double().abs()
    for isa in ISAS:
        with on_isa(isa):
            leaves = [t.detach().requires_grad_() for t in (x, x_min, x_max)]
            ste = "clipped" if clipped else "identity"
            out = ops.fake_quantize_range(*leaves, bits, axis, ste)
            found = torch.autograd.grad(out, leaves, grad)
        assert torch.equal(found[0], torch.where(below | above, 0.0, grad) if clipped else grad)
        for actual, addends in zip(found[1:], ends, strict=True):
            exact = channel_sum(addends, positive)
            plain = channel_sum(addends.float(), positive)
            assert_small_error(actual, exact, plain, channel_sum(unit, positive))
    backward = reference.fake_quantize_range_backward(
        grad, x, x_min, x_max, bits, positive, clipped, True
    )
    torch.testing.assert_close(found[1:], backward[1:], rtol=1e-4, atol=1e-4 * (1 + x.numel()))


@QUICK
@given(case=tensors(), keep=st.sampled_from([0.0, 0.9, 1.0]), include_zero=st.booleans())
def test_observed_range(case, keep, include_zero):
    x, _ = case
    old = torch.tensor(-0.3), torch.tensor([1.7])
    expected = reference.observe_range(x, *old, keep, include_zero)
    low, high = float(x.min()), float(x.max())
    low, high = (min(low, 0), max(high, 0)) if include_zero else (low, high)
    assert expected[0].item() == pytest.approx(-0.3 * keep + low * (1 - keep), rel=1e-6, abs=1e-6)
    assert expected[1].item() == pytest.approx(1.7 * keep + high * (1 - keep), rel=1e-6, abs=1e-6)
    for isa in ISAS:
        with on_isa(isa):
            found = ops.observe_range(x, *old, keep, include_zero)
        assert found[1].shape == (1,)
        for actual, wanted in zip(found, expected, strict=True):
            assert_same_bits(actual, wanted)


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_observing_hides_no_special_value(special):
    x = torch.zeros(300)
    x[201] = special
    low, high = ops.observe_range(x, torch.tensor(0.0), torch.tensor(0.0), 0.9, True)
    assert low.isnan()
    assert high.isnan()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
def test_threads_do_not_change_a_gradient(isa, axis):
    g = generator(5)
    x = torch.randn(9, 70, 40, 30, generator=g)
    size = () if axis is None else (x.shape[axis],)
    low, high = torch.full(size, -1.0), torch.full(size, 1.3)
    grad = torch.randn(x.shape, generator=g)

    def run():
        leaves = [t.detach().requires_grad_() for t in (x, low, high)]
        y = ops.fake_quantize_range(*leaves, 4, axis, "clipped")
        found = list(torch.autograd.grad(y, leaves, grad))
        leaves = [t.detach().requires_grad_() for t in (x, -low, high)]
        y = ops.fake_quantize(*leaves, 0, 5, axis)
        found += torch.autograd.grad(y, leaves, grad)
        return *found, *ops.observe_range(x, torch.tensor(0.0), torch.tensor(0.0), 0.9, False)

    with on_isa(isa):
        assert_threads_agree(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "odd channels_last", "shifted"])
def test_tensors_larger_than_the_caches(dtype, layout):
    """They are written past the caches, line by line, with what is left at both ends."""
    channels = 64 if layout == "channels_last" else 65
    shape = (5, channels, 120, 229)
    x = torch.randn(shape, generator=generator(6)).to(dtype)
    if "channels_last" in layout:
        x = x.contiguous(memory_format=torch.channels_last)
    low, high = torch.full((channels,), -1.0), torch.linspace(1, 2, channels)
    whole = reference.fake_quantize_range(x, low[0], high[0], 4)
    parts = reference.fake_quantize_range(x, low, high, 4, 1)
    norm = torch.linspace(0.5, 1.5, channels)
    case = (x, norm, low, low, norm, 1e-5, low[0], high[0], 4, 0.0, 6.0, x)
    normed = reference.bn_relu_fake_quantize(*case)
    if layout == "shifted":  # rows start inside a line
        x = torch.cat([x[:1, :1, :1, :1].flatten(), x.flatten()])[1:].view(shape)

    def check():
        assert torch.equal(ops.fake_quantize_range(x, low[0], high[0], 4), whole)
        assert torch.equal(ops.fake_quantize_range(x, low, high, 4, 1), parts)
        assert torch.equal(torch.ops.fdda.bn_relu_fake_quantize(x, *case[1:]), normed)

    for isa in ISAS:
        for threads in (1, 2):
            with on_isa(isa):
                with_threads(threads, check)


def test_only_wanted_gradients_are_made():
    x = torch.randn(5, requires_grad=True)
    low, high = torch.tensor(-1.0), torch.tensor(1.0, requires_grad=True)
    y = ops.fake_quantize_range(x, low, high, 4)
    y.backward(torch.ones(5), inputs=[high])
    assert high.grad is not None
    assert ops.fake_quantize_range(x, low, high.detach(), 4).grad_fn.saved_tensors == ()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_empty(shape):
    x = torch.empty(shape)
    assert ops.fake_quantize_minmax(x, 4).shape == x.shape
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    assert ops.fake_quantize_range(x, zero, one, 4).shape == x.shape
    leaves = [t.requires_grad_() for t in (x, one, zero)]
    y = ops.fake_quantize(*leaves, 0, 15, ste="clipped")
    assert y.shape == x.shape
    assert [g.sum().item() for g in torch.autograd.grad(y.sum(), leaves)] == [0, 0, 0]
    y = ops.fake_quantize_range(x, zero, one, 4)
    assert [g.item() for g in torch.autograd.grad(y.sum(), [zero, one])] == [0, 0]
    with pytest.raises(ValueError, match="x: expected at least one element"):
        ops.observe_range(x, zero, one, 0.9, True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x, s: ops.fake_quantize_minmax(x.double(), 4),
            TypeError,
            "x: expected torch.float",
        ),
        (
            lambda x, s: ops.fake_quantize_minmax(x, 17),
            ValueError,
            "bits: expected 1 to 16, got 17",
        ),
        (
            lambda x, s: ops.fake_quantize_minmax(x, 4, 2),
            ValueError,
            "axis: expected -2 to 1, got 2",
        ),
        (
            lambda x, s: ops.fake_quantize_range(x, s, x, 4),
            ValueError,
            "x_max: expected one element",
        ),
        (lambda x, s: ops.fake_quantize_range(x, s, s, 4, 1), ValueError, "x_min: expected shape"),
        (lambda x, s: ops.fake_quantize(x, s, s, 5, 4), ValueError, "quant_max: expected 5 to"),
        (lambda x, s: ops.fake_quantize(x, s, s, 0, 4, ste="x"), ValueError, "ste: expected"),
        (lambda x, s: ops.fake_quantize(x, s.int(), s, 0, 4), TypeError, "scale: expected"),
        (lambda x, s: ops.fake_quantize_range(x, s, s, 4, ste="x"), ValueError, "ste: expected"),
        (lambda x, s: ops.observe_range(x, s, s, 1.1, True), ValueError, "keep: expected 0 to 1"),
        (lambda x, s: ops.observe_range(x, x, s, 0.9, True), ValueError, "x_min: expected one"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3), torch.tensor(1.0))


def test_opcheck():
    g = generator(0)
    fdda, check = torch.ops.fdda, torch.library.opcheck
    for x in (
        torch.randn(2, 3, 4, 5, generator=g, requires_grad=True),
        torch.randn(2, 3, 4, 5, generator=g).to(memory_format=torch.channels_last).bfloat16(),
        torch.randn(2, 3, 8, 5, generator=g)[:, :, ::2],
    ):
        scale, zero = torch.rand(3, generator=g) + 0.1, torch.zeros(3)
        check(fdda.fake_quantize_minmax.default, (x, 4, 1))
        low, y = -scale, x.detach()
        for clipped in (False, True):
            for parameter in (scale, zero, low):
                parameter.requires_grad_(clipped)
            check(fdda.fake_quantize_range.default, (x, low, scale, 4, 1, clipped))
            check(fdda.fake_quantize.default, (x, scale, zero, -2, 3, 1, clipped))
        scale, zero, low = scale.detach(), zero.detach(), low.detach()
        for flags in ((False, True), (True, False), (True, True)):
            check(fdda.fake_quantize_backward.default, (y, y, scale, zero, -2, 3, 1, *flags))
            check(fdda.fake_quantize_range_backward.default, (y, y, low, scale, 4, 1, *flags))
        check(fdda.observe_range.default, (y, zero[0], scale[0], 0.9, True))
